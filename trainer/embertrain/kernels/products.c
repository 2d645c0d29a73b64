// Products of a few rows with a weight, y = x @ weight.T, also in groups: heads, or blocks of a block-diagonal weight.

#include "products.h"

struct product {
    const void *x, *weight;
    void *y;
    long rows, in, out, groups;
    long x_row, x_group, w_group, y_row, y_group; // steps, in numbers
    int type;
};

INLINE void product_part(const struct product *p, int part, int parts, int type)
{
    long begin, end;
    share(p->out, OUTS, part, parts, &begin, &end); // What is left over is added up in another order.
    for (long group = 0; group < p->groups; group++)
        outputs_of_many(at(p->x, group * p->x_group, type), p->x_row, p->rows,
                        at(p->weight, group * p->w_group + begin * p->in, type), p->in, end - begin,
                        (void *)at(p->y, group * p->y_group + begin, type), p->y_row, type);
}

static void product_bf16(void *p, int part, int parts) { product_part(p, part, parts, BF16); }
static void product_fp32(void *p, int part, int parts) { product_part(p, part, parts, FP32); }

// x [groups, rows, in] and y [groups, rows, out] by their steps, weight [groups, out, in]; in is a multiple of 32.
PUBLIC void emberline_product(const void *x, const void *weight, void *y, long rows, long in, long out, long groups, long x_row,
                              long x_group, long w_group, long y_row, long y_group, int type, int threads)
{
    struct product p = {x, weight, y, rows, in, out, groups, x_row, x_group, w_group, y_row, y_group, type};
    in_parts(type == BF16 ? product_bf16 : product_fp32, &p, rows * in * out * groups, threads);
}
