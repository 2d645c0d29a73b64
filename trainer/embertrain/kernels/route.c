// A router's choice for a few tokens: scores, the best experts by score and bias, and their weights (`model/router.py`).

#include "products.h"

enum { SQRTSOFTPLUS = 0, SIGMOID = 1, SOFTMAX = 2 };

struct router {
    long experts, groups, groups_kept, top_k;
    const float *bias; // [experts]
    const int *table; // [vocabulary, top_k], or NULL: chosen by score
    int scoring, normalise;
    float scale, tiny, eps;
};

static void to_scores(const struct router *r, float *x)
{
    float most = -INFINITY, total = 0.0f;
    for (long e = 0; e < r->experts; e++) {
        most = fmaxf(most, x[e]);
        if (r->scoring == SIGMOID)
            x[e] = 1.0f / (1.0f + expf(-x[e]));
        else if (r->scoring == SQRTSOFTPLUS)
            x[e] = sqrtf(fmaxf(x[e] > 20.0f ? x[e] : log1pf(expf(x[e])), r->tiny));
    }
    if (r->scoring != SOFTMAX)
        return;
    for (long e = 0; e < r->experts; e++)
        total += x[e] = expf(x[e] - most);
    for (long e = 0; e < r->experts; e++)
        x[e] /= total;
}

// The `k` highest, highest first, of equal ones the first. What is taken becomes -inf.
static void take_best(float *x, long count, long k, long long *best)
{
    for (long i = 0; i < k; i++) {
        long at = 0;
        for (long e = 1; e < count; e++)
            if (x[e] > x[at])
                at = e;
        best[i] = at;
        x[at] = -INFINITY;
    }
}

// Experts of groups that are not among the best become -inf; a group is worth the sum of its two best.
static void keep_groups(const struct router *r, float *choice, float *worth, long long *kept)
{
    long size = r->experts / r->groups;
    for (long g = 0; g < r->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (long e = g * size; e < (g + 1) * size; e++) {
            second = fmaxf(second, fminf(first, choice[e]));
            first = fmaxf(first, choice[e]);
        }
        worth[g] = size > 1 ? first + second : first;
    }
    take_best(worth, r->groups, r->groups_kept, kept); // leaves -inf at those that are kept
    for (long g = 0; g < r->groups; g++)
        for (long e = g * size; e < (g + 1) * size && worth[g] != -INFINITY; e++)
            choice[e] = -INFINITY;
}

// x [tokens, hidden]; weight [experts, hidden] fp32; ids [tokens], for a table.
// Gives scores [tokens, experts], chosen and weights [tokens, top_k]. hidden is a multiple of 32.
PUBLIC void emberline_route(const void *x, const float *weight, const float *bias, const int *table, const long long *ids,
                            float *scores, long long *chosen, float *weights, long tokens, long hidden, long experts, long groups,
                            long groups_kept, long top_k, int scoring, int normalise, float scale, float tiny, float eps, int type)
{
    struct router r = {experts, groups, groups_kept, top_k, bias, table, scoring, normalise, scale, tiny, eps};
    float *row = scratch((size_t)(hidden + 2 * groups_kept + experts + groups));
    long long *kept = (long long *)(row + hidden);
    float *choice = row + hidden + 2 * groups_kept, *worth = choice + experts;
    for (long t = 0; t < tokens; t++, scores += experts, chosen += top_k, weights += top_k) {
        for (long i = 0; i < hidden; i += LANES)
            store(row, i, load(x, t * hidden + i, type), FP32);
        outputs(row, 1, weight, hidden, experts, scores, experts, FP32, FP32);
        to_scores(&r, scores);
        if (table) {
            for (long k = 0; k < top_k; k++)
                chosen[k] = table[ids[t] * top_k + k];
        } else {
            for (long e = 0; e < experts; e++)
                choice[e] = scores[e] + bias[e];
            if (groups > 1)
                keep_groups(&r, choice, worth, kept);
            take_best(choice, experts, top_k, chosen);
        }
        float total = 0.0f;
        for (long k = 0; k < top_k; k++)
            total += weights[k] = scores[chosen[k]];
        for (long k = 0; k < top_k; k++)
            weights[k] = (normalise ? weights[k] / (total + eps) : weights[k]) * scale;
    }
}
