// What is done to rows one by one around the products: norms and rotations, and the streams of hyper-connections.

#include "few.h"

struct norm {
    const void *x;
    void *y;
    const float *weight; // [width], or NULL
    const float *turns; // complex [rows / share, pairs], or NULL: what pairs at a row's end are multiplied by
    long rows, width, pairs, share; // `share` rows have a turn in common
    float eps; // below 0: no norm
    int back; // by the turns' conjugates
};

INLINE void norm_part(const struct norm *n, int part, int parts, int type)
{
    long begin, end;
    share(n->rows, 1, part, parts, &begin, &end);
    for (long r = begin; r < end; r++) {
        const void *x = at(n->x, r * n->width, type);
        void *y = (void *)at(n->y, r * n->width, type);
        vec squares = {0};
        float factor = 1.0f;
        if (n->eps >= 0) {
            for (long i = 0; i < n->width; i += LANES) {
                vec v = load(x, i, type);
                squares += v * v;
            }
            factor = 1.0f / sqrtf(sum(squares) / (float)n->width + n->eps);
        }
        for (long i = 0; i < n->width; i += LANES) {
            vec v = load(x, i, type) * factor;
            store(y, i, n->weight ? v * load(n->weight, i, FP32) : v, type);
        }
        if (n->turns == NULL)
            continue;
        const float *turn = n->turns + r / n->share * n->pairs * 2;
        for (long i = 0, d = n->width - 2 * n->pairs; i < n->pairs; i++, d += 2) {
            float re = load1(y, d, type), im = load1(y, d + 1, type), c = turn[2 * i], s = turn[2 * i + 1];
            s = n->back ? -s : s;
            store1(y, d, re * c - im * s, type);
            store1(y, d + 1, re * s + im * c, type);
        }
    }
}

static void norm_bf16(void *n, int part, int parts) { norm_part(n, part, parts, BF16); }
static void norm_fp32(void *n, int part, int parts) { norm_part(n, part, parts, FP32); }

// Rows over the root of their mean square, times a weight, their last numbers turned. width is a multiple of 16.
PUBLIC void emberline_norm(const void *x, void *y, const float *weight, float eps, const float *turns, long pairs, long share_,
                           int back, long rows, long width, int type, int threads)
{
    struct norm n = {x, y, weight, turns, rows, width, pairs, share_, eps, back};
    in_parts(type == BF16 ? norm_bf16 : norm_fp32, &n, rows * width, threads);
}

struct expansion {
    const void *y, *x; // [tokens, width], [tokens, streams, width]
    const float *post, *comb; // [tokens, streams], [tokens, streams, streams]
    void *out; // like x
    long tokens, streams, width;
};

INLINE void expand_part(const struct expansion *e, int part, int parts, int type)
{
    long begin, end, S = e->streams;
    share(e->tokens, 1, part, parts, &begin, &end);
    for (long t = begin; t < end; t++)
        for (long k = 0; k < S; k++)
            for (long i = 0; i < e->width; i += LANES) {
                vec total = load(e->y, t * e->width + i, type) * e->post[t * S + k];
                for (long j = 0; j < S; j++)
                    total += load(e->x, (t * S + j) * e->width + i, type) * e->comb[(t * S + j) * S + k];
                store(e->out, (t * S + k) * e->width + i, total, type);
            }
}

static void expand_bf16(void *e, int part, int parts) { expand_part(e, part, parts, BF16); }
static void expand_fp32(void *e, int part, int parts) { expand_part(e, part, parts, FP32); }

// The streams after a block (`model/hyper.py`, expand). width is a multiple of 16.
PUBLIC void emberline_expand(const void *y, const float *post, const float *comb, const void *x, void *out, long tokens,
                             long streams, long width, int type, int threads)
{
    struct expansion e = {y, x, post, comb, out, tokens, streams, width};
    in_parts(type == BF16 ? expand_bf16 : expand_fp32, &e, tokens * streams * streams * width, threads);
}
