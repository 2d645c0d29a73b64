// SwiGLUs of a few tokens, each by some of many experts: y_t = sum over k of weight_tk * (silu(x W1) * (x W3)) W2 of expert
// e_tk (`model/experts.py`). Each expert that somebody chose is read once. One expert for all is the same loop.

#include "products.h"

struct mixture {
    const void *x, *gate, *up, *down; // [tokens, hidden]; of expert 0
    long gate_step, down_step; // from expert to expert, in numbers
    long tokens, choices, hidden, inner;
    float limit; // of what goes into silu, 0: none
    // Rows sorted by expert.
    long count;
    const int *expert, *assignment; // [count]
    void *middle; // [count, inner]
    float *given; // [tokens * choices, hidden]
    const float *weights; // [tokens, choices], NULL: 1
    void *y;
};

// From row r on, how many rows of its expert, up to TILE.
INLINE long run_of(const struct mixture *m, long r)
{
    long n = 1;
    while (n < TILE && r + n < m->count && m->expert[r + n] == m->expert[r])
        n++;
    return n;
}

INLINE void first_part(const struct mixture *m, int part, int parts, int type)
{
    long begin, end;
    share(m->inner, LANES, part, parts, &begin, &end);
    long width = end - begin;
    float *x = scratch((size_t)(TILE * (m->hidden + 2 * width)));
    float *gate = x + TILE * m->hidden, *up = gate + TILE * width;
    for (long r = 0, n; r < m->count; r += n) {
        n = run_of(m, r);
        for (long i = 0; i < n; i++) {
            long token = m->assignment[r + i] / m->choices;
            lay(x + i * m->hidden, at(m->x, token * m->hidden, type), m->hidden, type);
        }
        long from = m->expert[r] * m->gate_step + begin * m->hidden;
        outputs(x, n, at(m->gate, from, type), m->hidden, width, gate, width, type, FP32);
        outputs(x, n, at(m->up, from, type), m->hidden, width, up, width, type, FP32);
        for (long i = 0; i < n; i++)
            for (long k = 0; k < width; k += LANES) {
                vec g = load(gate, i * width + k, FP32), u = load(up, i * width + k, FP32);
                if (m->limit > 0) {
                    g = at_most(g, m->limit);
                    u = -at_most(-at_most(u, m->limit), m->limit);
                }
                store(m->middle, (r + i) * m->inner + begin + k, silu(g) * u, type);
            }
    }
}

INLINE void second_part(const struct mixture *m, int part, int parts, int type)
{
    long begin, end;
    share(m->hidden, LANES, part, parts, &begin, &end);
    float *h = scratch((size_t)(TILE * (m->inner + m->hidden)));
    float *out = h + TILE * m->inner;
    for (long r = 0, n; r < m->count; r += n) {
        n = run_of(m, r);
        for (long i = 0; i < n; i++)
            lay(h + i * m->inner, at(m->middle, (r + i) * m->inner, type), m->inner, type);
        const void *down = at(m->down, m->expert[r] * m->down_step + begin * m->inner, type);
        outputs(h, n, down, m->inner, end - begin, out, m->hidden, type, FP32);
        for (long i = 0; i < n; i++)
            memcpy(m->given + m->assignment[r + i] * m->hidden + begin, out + i * m->hidden, (size_t)(end - begin) * 4);
    }
    for (long t = 0; t < m->tokens; t++)
        for (long d = begin; d < end; d += LANES) {
            vec total = {0};
            for (long k = 0; k < m->choices; k++) {
                long a = t * m->choices + k;
                total += load(m->given, a * m->hidden + d, FP32) * (m->weights ? m->weights[a] : 1.0f);
            }
            store(m->y, t * m->hidden + d, total, type);
        }
}

static void first_bf16(void *m, int part, int parts) { first_part(m, part, parts, BF16); }
static void first_fp32(void *m, int part, int parts) { first_part(m, part, parts, FP32); }
static void second_bf16(void *m, int part, int parts) { second_part(m, part, parts, BF16); }
static void second_fp32(void *m, int part, int parts) { second_part(m, part, parts, FP32); }

// chosen [tokens, choices], -1: nobody; NULL: expert 0. hidden and inner are multiples of 32. Returns 1 without memory, else 0.
PUBLIC int emberline_experts(const void *x, const void *gate, const void *up, const void *down, long gate_step, long down_step,
                             const long long *chosen, const float *weights, void *y, long tokens, long choices, long experts,
                             long hidden, long inner, float limit, int type, int threads)
{
    long all = tokens * choices;
    size_t places = (size_t)(2 * all + experts + 1) * sizeof(int);
    size_t given = (size_t)(all * hidden) * sizeof(float), middle = (size_t)(all * inner) * sizeof(float);
    float *memory = aligned_alloc(64, (given + middle + places + 63) / 64 * 64);
    if (memory == NULL)
        return 1;
    int *expert = (int *)((char *)memory + given + middle), *assignment = expert + all, *next = assignment + all;
    memset(next, 0, (size_t)(experts + 1) * sizeof(int));
    for (long a = 0; a < all; a++)
        if (!chosen || chosen[a] >= 0)
            next[(chosen ? chosen[a] : 0) + 1]++;
    for (long e = 0; e < experts; e++)
        next[e + 1] += next[e];
    long count = next[experts];
    for (long a = 0; a < all; a++) {
        long e = chosen ? chosen[a] : 0;
        if (e < 0) {
            memset(memory + a * hidden, 0, (size_t)hidden * sizeof(float));
            continue;
        }
        expert[next[e]] = (int)e;
        assignment[next[e]++] = (int)a;
    }
    struct mixture m = {.x = x, .gate = gate, .up = up, .down = down, .gate_step = gate_step, .down_step = down_step,
                        .tokens = tokens, .choices = choices, .hidden = hidden, .inner = inner, .limit = limit, .count = count,
                        .expert = expert, .assignment = assignment, .middle = (char *)memory + given, .given = memory,
                        .weights = weights, .y = y};
    in_parts(type == BF16 ? first_bf16 : first_fp32, &m, 2 * count * hidden * inner, threads);
    in_parts(type == BF16 ? second_bf16 : second_fp32, &m, count * hidden * inner, threads);
    free(memory);
    return 0;
}
