// The core of attention for one query of each of some sequences: heads over rows that are key and value at once, named by
// their places in two pools, in one softmax with a sink (`model/attend.py`). Nothing is gathered or copied first.

#include "few.h"

enum { HEADS = 4 }; // of one query at once

struct rows {
    const void *pool;
    const long long *slots; // [queries, count], -1: no row
    long count;
};

struct attention {
    const void *q; // [queries, heads, width]
    void *out; // [queries, heads, value_width]
    struct rows near, far;
    const float *sink; // [heads], or NULL
    long queries, heads, width, value_width;
    float scale;
};

INLINE void dots(const float *q, int heads, const void *row, long width, float scale, float *scores, long step, int type)
{
    vec total[HEADS][2];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        total[h][0] = total[h][1] = (vec){0};
    for (long d = 0; d < width; d += 2 * LANES) {
        vec even, odd;
        load_pair(row, d, type, &even, &odd);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            total[h][0] += even * load(q, h * width + d, FP32);
            total[h][1] += odd * load(q, h * width + d + LANES, FP32);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        scores[h * step] = sum(total[h][0] + total[h][1]) * scale;
}

// exp(x) for x <= 0 to 2 in the last place or so, 0 below -87: 2^n times a polynomial. (Cephes; Moshier 1989)
INLINE vec exponential(vec x)
{
    bits tiny = (bits)(x < -87.0f);
    x = (vec)((bits)x & ~tiny);
    vec n = x * 1.44269504088896341f;
    typedef int whole __attribute__((vector_size(4 * LANES)));
    whole k = __builtin_convertvector(n - 0.5f, whole); // towards zero: n is not positive
    n = __builtin_convertvector(k, vec);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return (vec)((bits)(y * (vec)((k + 127) << 23)) & ~tiny);
}

// Scores to weights that sum to one with the sink's; `count` is padded with -inf to a multiple of LANES.
INLINE void softmax(float *scores, long count, const float *sink)
{
    float most = sink ? *sink : -INFINITY, total = 0.0f;
    for (long i = 0; i < count; i++)
        most = fmaxf(most, scores[i]);
    vec sums = {0};
    for (long i = 0; i < count; i += LANES) {
        vec e = exponential(load(scores, i, FP32) - most);
        sums += e;
        store(scores, i, e, FP32);
    }
    total = sum(sums) + (sink ? expf(*sink - most) : 0.0f);
    for (long i = 0; i < count; i += LANES)
        store(scores, i, load(scores, i, FP32) / total, FP32);
}

// The weighted sum of rows, twice LANES columns of it.
INLINE void columns(const void *const *rows, const float *weights, long step, long count, int heads, long d, void *out,
                    long out_step, int type)
{
    vec even[HEADS], odd[HEADS];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        even[h] = odd[h] = (vec){0};
    for (long i = 0; i < count; i++) {
        if (rows[i] == NULL)
            continue;
        vec a, b;
        load_pair(rows[i], d, type, &a, &b);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            even[h] += a * weights[h * step + i];
            odd[h] += b * weights[h * step + i];
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        store_pair(out, h * out_step + d, even[h], odd[h], type);
}

INLINE void some_heads(const struct attention *a, long query, long head, int heads, int type)
{
    long count = a->near.count + a->far.count, step = (count + LANES - 1) / LANES * LANES;
    float *q = scratch((size_t)(HEADS * (a->width + step) + 2 * count + LANES));
    float *scores = q + HEADS * a->width;
    const void **rows = (const void **)(scores + HEADS * step);
    for (long i = 0; i < count; i++) {
        const struct rows *from = i < a->near.count ? &a->near : &a->far;
        long long slot = from->slots[query * from->count + (i < a->near.count ? i : i - a->near.count)];
        rows[i] = slot < 0 ? NULL : at(from->pool, slot * a->width, type);
    }
    for (int h = 0; h < heads; h++) {
        spread(q + h * a->width, at(a->q, (query * a->heads + head + h) * a->width, type), a->width, type);
        for (long i = count; i < step; i++)
            scores[h * step + i] = -INFINITY;
    }
    for (long i = 0; i < count; i++)
        if (rows[i])
            dots(q, heads, rows[i], a->width, a->scale, scores + i, step, type);
        else
            for (int h = 0; h < heads; h++)
                scores[h * step + i] = -INFINITY;
    for (int h = 0; h < heads; h++)
        softmax(scores + h * step, step, a->sink ? a->sink + head + h : NULL);
    void *out = (void *)at(a->out, (query * a->heads + head) * a->value_width, type);
    for (long d = 0; d < a->value_width; d += 2 * LANES)
        columns(rows, scores, step, count, heads, d, out, a->value_width, type);
}

INLINE void attend_part(const struct attention *a, int part, int parts, int type)
{
    long blocks = (a->heads + HEADS - 1) / HEADS, begin, end;
    share(a->queries * blocks, 1, part, parts, &begin, &end);
    for (long i = begin; i < end; i++) {
        long query = i / blocks, head = i % blocks * HEADS;
        switch (a->heads - head) {
        case 1: some_heads(a, query, head, 1, type); break;
        case 2: some_heads(a, query, head, 2, type); break;
        case 3: some_heads(a, query, head, 3, type); break;
        default: some_heads(a, query, head, 4, type);
        }
    }
}

static void attend_bf16(void *a, int part, int parts) { attend_part(a, part, parts, BF16); }
static void attend_fp32(void *a, int part, int parts) { attend_part(a, part, parts, FP32); }

// Widths are multiples of 32; `far` may have no rows. A query that sees nothing and has no sink gives NaN.
PUBLIC void emberline_attend(const void *q, void *out, const void *near_pool, const long long *near_slots, long near_count,
                             const void *far_pool, const long long *far_slots, long far_count, const float *sink, long queries,
                             long heads, long width, long value_width, float scale, int type, int threads)
{
    struct attention a = {q,     out,     {near_pool, near_slots, near_count}, {far_pool, far_slots, far_count}, sink, queries,
                          heads, width, value_width, scale};
    long cost = queries * heads * (near_count + far_count) * (width + value_width);
    in_parts(type == BF16 ? attend_bf16 : attend_fp32, &a, cost, threads);
}
