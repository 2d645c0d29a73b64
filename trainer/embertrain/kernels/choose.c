// An indexer's choice: the rows of the highest scores of each query, of equal ones the lowest (`model/attend.py`).
//
// The least score that is taken is found from its highest bits down, by counting: scores are read four times, and nothing is
// sorted or copied.

#include "few.h"

enum { DIGIT = 11 }; // bits; three digits are a score

struct choice {
    const float *scores; // [queries, count]
    const long long *visible; // [queries]
    long long *chosen; // [queries, k]
    long queries, count, k;
};

// Whole numbers in the order of the scores; zeros are alike, whatever their sign.
INLINE unsigned ordered(float score)
{
    unsigned b;
    score += 0.0f;
    memcpy(&b, &score, sizeof b);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

static void choose(const float *scores, long visible, long k, long long *chosen)
{
    long taken = 0, room = k;
    unsigned least = 0, known = 0; // its bits that are known, and which these are
    for (int shift = 32 - DIGIT; visible > k && known != ~0u; shift = shift > DIGIT ? shift - DIGIT : 0) {
        int counts[1 << DIGIT] = {0};
        const unsigned digit = (1 << DIGIT) - 1;
        for (long n = 0; n < visible; n++) {
            unsigned score = ordered(scores[n]);
            if ((score & known) == least)
                counts[score >> shift & digit]++;
        }
        unsigned at = digit;
        for (; counts[at] < room; at--)
            room -= counts[at];
        least |= at << shift;
        known |= digit << shift;
    }
    for (long n = 0; n < visible; n++) {
        unsigned score = ordered(scores[n]);
        if (score > least || (score == least && room > 0)) {
            room -= score == least;
            chosen[taken++] = n;
        }
    }
    for (; taken < k; taken++)
        chosen[taken] = -1;
}

static void choose_part(void *job, int part, int parts)
{
    const struct choice *c = job;
    long begin, end;
    share(c->queries, 1, part, parts, &begin, &end);
    for (long t = begin; t < end; t++)
        choose(c->scores + t * c->count, c->visible[t], c->k, c->chosen + t * c->k);
}

// chosen [queries, k] of the first `visible` scores each, at most count: ascending, then -1.
PUBLIC void emberline_choose(const float *scores, const long long *visible, long long *chosen, long queries, long count, long k,
                             int threads)
{
    struct choice c = {scores, visible, chosen, queries, count, k};
    in_parts(choose_part, &c, 4 * queries * count, threads);
}
