// Products of rows sorted by expert with their experts' weights, and both gradients of them (`model/experts.py`):
//
//     y = x @ W_e.T      dx = dy @ W_e      dW_e = dy.T @ x      of the rows of expert e
//
// An expert has some dozens of rows, too few for a library to be called for each of them. Threads share columns: each goes
// through all experts, so that their numbers of rows need not be alike.

#include "products.h"

#if LANES == 16
enum { COLUMN = 8 }; // rows of a tile of a gradient, which is two vectors wide: what the registers hold
#elif LANES == 8
enum { COLUMN = 6 };
#else
enum { COLUMN = 4 };
#endif

struct grouped {
    const void *a, *b;
    void *y;
    const long long *begins; // [experts + 1], of their rows
    long experts, in, out;
    int type;
};

INLINE void product_part(const struct grouped *g, int part, int parts, int type)
{
    long begin, end;
    share(g->out, LANES, part, parts, &begin, &end);
    for (long e = 0; e < g->experts; e++) {
        long first = g->begins[e];
        outputs_of_many(at(g->a, first * g->in, type), g->in, g->begins[e + 1] - first,
                        at(g->b, (e * g->out + begin) * g->in, type), g->in, end - begin,
                        (void *)at(g->y, first * g->out + begin, type), g->out, type);
    }
}

// y [count, 2 * LANES] = the sum over k < depth of a[m * a_row + k * a_step] * b[k * b_row ...].
INLINE void tile(const float *a, long a_row, long a_step, int count, const float *b, long b_row, long depth, void *y, long y_row,
                 int type)
{
    vec left[COLUMN], right[COLUMN];
#pragma GCC unroll 8
    for (int m = 0; m < count; m++)
        left[m] = right[m] = (vec){0};
    for (long k = 0; k < depth; k++, a += a_step, b += b_row) {
        vec p = load(b, 0, FP32), q = load(b, LANES, FP32);
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            left[m] += p * a[m * a_row];
            right[m] += q * a[m * a_row];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        store(y, m * y_row, left[m], type);
        store(y, m * y_row + LANES, right[m], type);
    }
}

INLINE void tiles(const float *a, long a_row, long a_step, long count, const float *b, long b_row, long depth, void *y, long y_row,
                  int type)
{
    for (; count > 0; count -= COLUMN, a += COLUMN * a_row, y = (void *)at(y, COLUMN * y_row, type))
        switch (count) {
        case 1: tile(a, a_row, a_step, 1, b, b_row, depth, y, y_row, type); break;
        case 2: tile(a, a_row, a_step, 2, b, b_row, depth, y, y_row, type); break;
        case 3: tile(a, a_row, a_step, 3, b, b_row, depth, y, y_row, type); break;
#if LANES >= 8
        case 4: tile(a, a_row, a_step, 4, b, b_row, depth, y, y_row, type); break;
        case 5: tile(a, a_row, a_step, 5, b, b_row, depth, y, y_row, type); break;
#endif
#if LANES >= 16
        case 6: tile(a, a_row, a_step, 6, b, b_row, depth, y, y_row, type); break;
        case 7: tile(a, a_row, a_step, 7, b, b_row, depth, y, y_row, type); break;
#endif
        default: tile(a, a_row, a_step, COLUMN, b, b_row, depth, y, y_row, type);
        }
}

// Rows as fp32: themselves where they are, else a copy in `held`.
INLINE const float *as_fp32(const void *x, long rows, long width, float *held, int type)
{
    if (type == FP32)
        return x;
    for (long i = 0; i < rows * width; i += LANES)
        store(held, i, load(x, i, type), FP32);
    return held;
}

INLINE long most_rows(const struct grouped *g)
{
    long most = 0;
    for (long e = 0; e < g->experts; e++)
        if (most < g->begins[e + 1] - g->begins[e])
            most = g->begins[e + 1] - g->begins[e];
    return most;
}

// Each thread has its columns of a weight beside one another first: at their distance they would push each other out of the
// cache before the next rows need them.
INLINE void input_gradient_part(const struct grouped *g, int part, int parts, int type)
{
    long begin, end;
    share(g->in, 2 * LANES, part, parts, &begin, &end);
    float *panel = scratch((size_t)(g->out * 2 * LANES + (type == BF16 ? most_rows(g) * g->out : 0)));
    for (long e = 0; e < g->experts; e++) {
        long first = g->begins[e], rows = g->begins[e + 1] - first;
        const float *a = as_fp32(at(g->a, first * g->out, type), rows, g->out, panel + g->out * 2 * LANES, type);
        for (long column = begin; column < end && rows > 0; column += 2 * LANES) {
            for (long o = 0; o < g->out; o++)
                for (long i = 0; i < 2 * LANES; i += LANES)
                    store(panel, o * 2 * LANES + i, load(g->b, (e * g->out + o) * g->in + column + i, type), FP32);
            tiles(a, g->out, 1, rows, panel, 2 * LANES, g->out, (void *)at(g->y, first * g->in + column, type), g->in, type);
        }
    }
}

INLINE void weight_gradient_part(const struct grouped *g, int part, int parts, int type)
{
    long begin, end;
    share(g->in, 2 * LANES, part, parts, &begin, &end);
    float *held = type == BF16 ? scratch((size_t)(most_rows(g) * (g->out + g->in))) : NULL;
    for (long e = 0; e < g->experts; e++) {
        long first = g->begins[e], rows = g->begins[e + 1] - first;
        const float *a = as_fp32(at(g->a, first * g->out, type), rows, g->out, held, type);
        const float *b = as_fp32(at(g->b, first * g->in, type), rows, g->in, held + rows * g->out, type);
        for (long o = 0; o < g->out; o += COLUMN)
            for (long column = begin; column < end; column += 2 * LANES)
                tiles(a + o, 1, g->out, g->out - o < COLUMN ? g->out - o : COLUMN, b + column, g->in, rows,
                      (void *)at(g->y, (e * g->out + o) * g->in + column, type), g->in, type);
    }
}

static void product_bf16(void *g, int part, int parts) { product_part(g, part, parts, BF16); }
static void product_fp32(void *g, int part, int parts) { product_part(g, part, parts, FP32); }
static void input_gradient_bf16(void *g, int part, int parts) { input_gradient_part(g, part, parts, BF16); }
static void input_gradient_fp32(void *g, int part, int parts) { input_gradient_part(g, part, parts, FP32); }
static void weight_gradient_bf16(void *g, int part, int parts) { weight_gradient_part(g, part, parts, BF16); }
static void weight_gradient_fp32(void *g, int part, int parts) { weight_gradient_part(g, part, parts, FP32); }

// kind 0: y [R, out] of a [R, in] and b [E, out, in]; 1: y [R, in] of a [R, out] and b [E, out, in]; 2: y [E, out, in] of
// a [R, out] and b [R, in], zeros for experts without rows. in and out are multiples of 32; nothing is strided.
PUBLIC void emberline_grouped(int kind, const void *a, const void *b, void *y, const long long *begins, long experts, long in,
                              long out, int type, int threads)
{
    static const work_fn works[3][2] = {
        {product_bf16, product_fp32}, {input_gradient_bf16, input_gradient_fp32}, {weight_gradient_bf16, weight_gradient_fp32}};
    struct grouped g = {a, b, y, begins, experts, in, out, type};
    in_parts(works[kind][type], &g, begins[experts] * in * out, threads);
}

struct swiglu {
    const void *gate_up, *grads; // [rows, 2 * width], [rows, width] or NULL
    void *y;
    long rows, width;
    float limit; // 0: none
};

INLINE void swiglu_part(const struct swiglu *s, int part, int parts, int type)
{
    long begin, end;
    share(s->rows, 1, part, parts, &begin, &end);
    for (long r = begin; r < end; r++)
        for (long i = 0; i < s->width; i += LANES) {
            long gate_at = 2 * r * s->width + i, up_at = gate_at + s->width, y_at = r * s->width + i;
            vec raw_gate = load(s->gate_up, gate_at, type), raw_up = load(s->gate_up, up_at, type);
            vec gate = raw_gate, up = raw_up;
            if (s->limit > 0) {
                gate = at_most(gate, s->limit);
                up = -at_most(-at_most(up, s->limit), s->limit);
            }
            vec share_of = logistic(gate);
            if (s->grads == NULL) {
                store(s->y, y_at, gate * share_of * up, type);
                continue;
            }
            vec grad = load(s->grads, y_at, type);
            vec to_gate = grad * up * share_of * (1.0f + gate * (1.0f - share_of)), to_up = grad * gate * share_of;
            if (s->limit > 0) { // What was clamped changes nothing.
                to_gate = (vec)((bits)to_gate & ~(bits)(raw_gate > s->limit));
                to_up = (vec)((bits)to_up & ~(bits)(raw_up > s->limit) & ~(bits)(raw_up < -s->limit));
            }
            store(s->y, gate_at, to_gate, type);
            store(s->y, up_at, to_up, type);
        }
}

static void swiglu_bf16(void *s, int part, int parts) { swiglu_part(s, part, parts, BF16); }
static void swiglu_fp32(void *s, int part, int parts) { swiglu_part(s, part, parts, FP32); }

// y [rows, width] = silu(gate) * up of [rows, gate | up], both clamped; or, given what y's gradient is, that of gate and up.
// width is a multiple of 32.
PUBLIC void emberline_swiglu(const void *gate_up, const void *grads, void *y, long rows, long width, float limit, int type,
                             int threads)
{
    struct swiglu s = {gate_up, grads, y, rows, width, limit};
    in_parts(type == BF16 ? swiglu_bf16 : swiglu_fp32, &s, 16 * rows * width, threads);
}
