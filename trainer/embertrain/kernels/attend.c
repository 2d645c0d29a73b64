// The core of attention for one query of each of some sequences: heads over rows that are key and value at once, named by
// their places in two pools, in one softmax with a sink (`model/attend.py`). Nothing is gathered or copied first.
//
// Rows are read once, a few at a time, for all heads of a thread: scores, then their share of the sum, rescaled when a score
// exceeds all before (Milakov and Gimelshein 2018). Long contexts are cut into pieces of a fixed length, so that threads may
// share one query, and sums of pieces are joined in their order.

#include "few.h"

enum { HEADS = LANES == 16 ? 8 : 4, ROWS = 16 }; // at once: sums of so many heads fit in the registers
enum { BLOCK = 4, PIECE = 1024 }; // heads and rows that are left to one thread
enum { SUMS_BYTES_MAX = 64 << 20 }; // of queries that are worked through together
enum { AHEAD = 8 }; // rows that the memory is asked for before they are multiplied

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
    long pieces; // of a query
    float *sums; // [queries, pieces, heads, value_width + 2]: weighted sum, sum of weights, greatest score; of several pieces
};

#ifdef __AVX512BF16__
#define WEIGHTS(type) (type) // What attention's weights are: bf16 where they are multiplied in pairs.
#else
#define WEIGHTS(type) FP32
#endif

// Scores of two rows by some heads, from sums that were not summed up yet.
INLINE void store_scores(vec total[HEADS][2], int heads, float scale, float *scores)
{
#if LANES >= 8
    if (heads == HEADS) {
        float all[2 * HEADS];
        store(all, 0, sums(total[0]) * scale, FP32);
        for (int h = 0; h < HEADS; h++)
            memcpy(scores + h * ROWS, all + 2 * h, 2 * sizeof(float));
        return;
    }
#endif
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
            scores[h * ROWS + r] = sum(total[h][r]) * scale;
}

#ifdef __AVX512BF16__
// `dots` of bf16 numbers, two at a time into an fp32 sum.
INLINE void dots_of_pairs(const float *q, int heads, const void *const *rows, long width, float scale, float *scores)
{
    vec total[HEADS][2];
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++)
        total[h][0] = total[h][1] = (vec){0};
    for (long d = 0; d < width; d += 2 * LANES) {
        __m512bh row[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            row[r] = (__m512bh)_mm512_loadu_si512(at(rows[r], d, BF16));
            __builtin_prefetch(at(rows[r], d + AHEAD * width, BF16)); // Mostly the row that comes so many later.
        }
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            __m512bh a = (__m512bh)_mm512_loadu_si512(at(q + h * width, d, BF16));
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++)
                total[h][r] = (vec)_mm512_dpbf16_ps((__m512)total[h][r], row[r], a);
        }
    }
    store_scores(total, heads, scale, scores);
}

// `add` of bf16 rows, two at a time with two weights, which are bf16 too.
INLINE void add_pairs(const void *const *rows, const float *weights, long count, int heads, float *sums, long value_width)
{
    for (long d = 0; d < value_width; d += 2 * LANES) {
        __m512 even[HEADS], odd[HEADS];
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            even[h] = _mm512_loadu_ps(sums + h * (value_width + 2) + d);
            odd[h] = _mm512_loadu_ps(sums + h * (value_width + 2) + d + LANES);
        }
        for (long i = 0; i < count; i += 2) {
            __m512i a = _mm512_loadu_si512(at(rows[i], d, BF16));
            __m512i b = _mm512_loadu_si512(at(rows[i + 1 < count ? i + 1 : i], d, BF16)); // The weight beyond the last is 0.
            __m512bh evens = (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
            __m512bh odds = (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
#pragma GCC unroll 8
            for (int h = 0; h < heads; h++) {
                int two;
                memcpy(&two, at(weights + h * ROWS, i, BF16), sizeof two);
                even[h] = _mm512_dpbf16_ps(even[h], evens, (__m512bh)_mm512_set1_epi32(two));
                odd[h] = _mm512_dpbf16_ps(odd[h], odds, (__m512bh)_mm512_set1_epi32(two));
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            _mm512_storeu_ps(sums + h * (value_width + 2) + d, even[h]);
            _mm512_storeu_ps(sums + h * (value_width + 2) + d + LANES, odd[h]);
        }
    }
}
#endif

// Scores of two rows, each read number after number, by some heads: more than one row to keep the multipliers busy.
INLINE void dots(const float *q, int heads, const void *const *rows, long width, float scale, float *scores, int type)
{
#ifdef __AVX512BF16__
    if (type == BF16) {
        dots_of_pairs(q, heads, rows, width, scale, scores);
        return;
    }
#endif
    vec total[HEADS][2];
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++)
        total[h][0] = total[h][1] = (vec){0};
    for (long d = 0; d < width; d += 2 * LANES) {
        vec even[2], odd[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
            load_pair(rows[r], d, type, &even[r], &odd[r]);
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            vec a = load(q, h * width + d, FP32), b = load(q, h * width + d + LANES, FP32);
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
                total[h][r] += even[r] * a;
                total[h][r] += odd[r] * b;
            }
        }
    }
    store_scores(total, heads, scale, scores);
}

// The state of a head: a weighted sum of rows as they are `spread`, the sum of the weights, and the greatest score.
struct head {
    float *sum, *total, *most;
};

INLINE struct head head_of(float *sums, long head, long value_width)
{
    float *sum = sums + head * (value_width + 2);
    return (struct head){sum, sum + value_width, sum + value_width + 1};
}

INLINE void scaled(float *x, float by, long count)
{
    for (long i = 0; i < count; i += LANES)
        store(x, i, load(x, i, FP32) * by, FP32);
}

// Scores to weights of type `type` beside the greatest score so far, which may have grown: what was summed up before is scaled
// down.
INLINE void weigh(float *scores, long count, struct head head, long value_width, int type)
{
    float most = *head.most;
    for (long i = 0; i < count; i++)
        most = fmaxf(most, scores[i]);
    if (most > *head.most) {
        float by = expf(*head.most - most);
        scaled(head.sum, by, value_width);
        *head.total *= by;
        *head.most = most;
    }
    for (long i = count; i < ROWS; i++)
        scores[i] = -INFINITY;
    vec sums = {0};
    for (long i = 0; i < ROWS; i += LANES) {
        vec e = exponential(load(scores, i, FP32) - most);
        sums += as_stored(e, type);
        store(scores, i, e, type);
    }
    *head.total += sum(sums);
}

// Rows times their weights are added to the sums of some heads.
INLINE void add(const void *const *rows, const float *weights, long count, int heads, float *sums, long value_width, int type)
{
#ifdef __AVX512BF16__
    if (type == BF16) {
        add_pairs(rows, weights, count, heads, sums, value_width);
        return;
    }
#endif
    for (long d = 0; d < value_width; d += 2 * LANES) {
        vec even[HEADS], odd[HEADS];
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            even[h] = load(sums, h * (value_width + 2) + d, FP32);
            odd[h] = load(sums, h * (value_width + 2) + d + LANES, FP32);
        }
        for (long i = 0; i < count; i++) {
            vec a, b;
            load_pair(rows[i], d, type, &a, &b);
#pragma GCC unroll 8
            for (int h = 0; h < heads; h++) {
                even[h] += a * weights[h * ROWS + i];
                odd[h] += b * weights[h * ROWS + i];
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            store(sums, h * (value_width + 2) + d, even[h], FP32);
            store(sums, h * (value_width + 2) + d + LANES, odd[h], FP32);
        }
    }
}

INLINE void some_heads(const struct attention *a, const float *q, const void *const *rows, long count, int heads, float *sums,
                       int type)
{
    float scores[HEADS * ROWS];
    for (long i = 0; i < count; i += 2)
        dots(q, heads, (const void *const[]){rows[i], rows[i + 1 < count ? i + 1 : i]}, a->width, a->scale, scores + i, type);
    for (int h = 0; h < heads; h++)
        weigh(scores + h * ROWS, count, head_of(sums, h, a->value_width), a->value_width, WEIGHTS(type));
    add(rows, scores, count, heads, sums, a->value_width, type);
}

// The next rows that a query sees, up to ROWS, from place `*at` of its piece on.
INLINE long next_rows(const struct attention *a, long query, long *at_place, long end, const void **rows, int type)
{
    long count = 0;
    for (; *at_place < end && count < ROWS; ++*at_place) {
        int near = *at_place < a->near.count;
        const struct rows *from = near ? &a->near : &a->far;
        long long slot = from->slots[query * from->count + *at_place - (near ? 0 : a->near.count)];
        if (slot >= 0)
            rows[count++] = at(from->pool, slot * a->width, type);
    }
    return count;
}

// Of so many heads. Powers of two, for each number of them is a loop of its own.
INLINE int at_once(long heads) { return heads >= HEADS ? HEADS : heads >= 4 ? 4 : heads >= 2 ? 2 : 1; }

// Heads `first` to `last` of one query over one piece of its rows.
INLINE void piece_part(const struct attention *a, long query, long piece, long first, long last, float *q, float *sums, int type)
{
    for (long h = first; h < last; h++) {
        lay(q + (h - first) * a->width, at(a->q, (query * a->heads + h) * a->width, type), a->width, type);
        struct head head = head_of(sums, h - first, a->value_width);
        memset(head.sum, 0, (size_t)a->value_width * sizeof(float));
        *head.total = 0.0f;
        *head.most = -INFINITY;
    }
    long place = piece * PIECE, end = a->near.count + a->far.count;
    if (end > place + PIECE)
        end = place + PIECE;
    const void *rows[ROWS];
    for (long count; (count = next_rows(a, query, &place, end, rows, type)) > 0;)
        for (long h = 0, heads; h < last - first; h += heads) {
            const float *some = q + h * a->width;
            float *to = sums + h * (a->value_width + 2);
            heads = at_once(last - first - h);
            switch (heads) {
            case 1: some_heads(a, some, rows, count, 1, to, type); break;
            case 2: some_heads(a, some, rows, count, 2, to, type); break;
            case 4: some_heads(a, some, rows, count, 4, to, type); break;
            default: some_heads(a, some, rows, count, HEADS, to, type);
            }
        }
}

// What heads `first` to `last` of a query come to: pieces' sums [pieces, heads of a piece, value_width + 2] are joined.
INLINE void finish(const struct attention *a, long query, long first, long last, float *sums, long heads, int type)
{
    for (long h = first; h < last; h++) {
        struct head all = head_of(sums, h - first, a->value_width);
        for (long piece = 1; piece < a->pieces; piece++) {
            struct head more = head_of(sums, piece * heads + h - first, a->value_width);
            float most = fmaxf(*all.most, *more.most);
            if (most == -INFINITY)
                continue;
            float by = expf(*all.most - most), by_more = expf(*more.most - most);
            for (long d = 0; d < a->value_width; d += LANES)
                store(all.sum, d, load(all.sum, d, FP32) * by + load(more.sum, d, FP32) * by_more, FP32);
            *all.total = *all.total * by + *more.total * by_more;
            *all.most = most;
        }
        float by = 1.0f / *all.total;
        if (a->sink) { // Another row, of zeros.
            float most = fmaxf(*all.most, a->sink[h]), own = expf(*all.most - most);
            by = own / (*all.total * own + expf(a->sink[h] - most));
        }
        void *out = (void *)at(a->out, (query * a->heads + h) * a->value_width, type);
        for (long d = 0; d < a->value_width; d += 2 * LANES)
            store_pair(out, d, load(all.sum, d, FP32) * by, load(all.sum, d + LANES, FP32) * by, type);
    }
}

// Pieces of queries are dealt out to threads in turn, for the last of a query may be short.
INLINE void pieces_part(const struct attention *a, int part, int parts, int type)
{
    float *q = scratch((size_t)(a->heads * a->width));
    for (long i = part; i < a->queries * a->pieces; i += parts)
        piece_part(a, i / a->pieces, i % a->pieces, 0, a->heads, q, a->sums + i * a->heads * (a->value_width + 2), type);
}

// Where threads are as many, each takes blocks of heads of pieces of queries.
INLINE void blocks_part(const struct attention *a, int part, int parts, int type)
{
    long blocks = (a->heads + BLOCK - 1) / BLOCK, begin, end, width = a->value_width + 2;
    share(a->queries * a->pieces * blocks, 1, part, parts, &begin, &end);
    float *q = scratch((size_t)(a->heads * (a->width + width)));
    for (long i = begin, next; i < end; i = next) {
        long unit = i / blocks, query = unit / a->pieces, piece = unit % a->pieces;
        next = (unit + 1) * blocks < end ? (unit + 1) * blocks : end;
        long first = i % blocks * BLOCK, last = first + (next - i) * BLOCK;
        if (last > a->heads)
            last = a->heads;
        float *sums = a->pieces > 1 ? a->sums + (unit * a->heads + first) * width : q + a->heads * a->width;
        piece_part(a, query, piece, first, last, q, sums, type);
        if (a->pieces == 1)
            finish(a, query, first, last, sums, a->heads, type);
    }
}

INLINE void attend_part(const struct attention *a, int part, int parts, int type)
{
    if (a->pieces > 1 && a->queries * a->pieces >= 2 * parts)
        pieces_part(a, part, parts, type);
    else
        blocks_part(a, part, parts, type);
}

INLINE void join_part(const struct attention *a, int part, int parts, int type)
{
    long begin, end;
    share(a->queries * a->heads, 1, part, parts, &begin, &end);
    for (long i = begin; i < end; i++) {
        long query = i / a->heads, head = i % a->heads;
        float *sums = a->sums + (query * a->pieces * a->heads + head) * (a->value_width + 2);
        finish(a, query, head, head + 1, sums, a->heads, type);
    }
}

static void attend_bf16(void *a, int part, int parts) { attend_part(a, part, parts, BF16); }
static void attend_fp32(void *a, int part, int parts) { attend_part(a, part, parts, FP32); }
static void join_bf16(void *a, int part, int parts) { join_part(a, part, parts, BF16); }
static void join_fp32(void *a, int part, int parts) { join_part(a, part, parts, FP32); }

// Widths are multiples of 32; `far` may have no rows. A query that sees nothing and has no sink gives NaN. Returns 1 without
// memory, else 0.
PUBLIC int emberline_attend(const void *q, void *out, const void *near_pool, const long long *near_slots, long near_count,
                            const void *far_pool, const long long *far_slots, long far_count, const float *sink, long queries,
                            long heads, long width, long value_width, float scale, int type, int threads)
{
    long count = near_count + far_count, pieces = count > PIECE ? (count + PIECE - 1) / PIECE : 1;
    size_t sums_bytes = (size_t)(pieces * heads * (value_width + 2)) * sizeof(float); // of a query
    long most = pieces > 1 && queries * sums_bytes > SUMS_BYTES_MAX ? (long)(SUMS_BYTES_MAX / sums_bytes) : queries;
    if (most == 0)
        most = 1;
    float *sums = NULL;
    if (pieces > 1 && (sums = malloc(most * sums_bytes)) == NULL)
        return 1;
    for (long first = 0; first < queries; first += most) {
        long some = queries - first < most ? queries - first : most;
        struct attention a = {.q = at(q, first * heads * width, type), .out = (void *)at(out, first * heads * value_width, type),
                              .near = {near_pool, near_slots + first * near_count, near_count},
                              .far = {far_pool, far_slots + first * far_count, far_count}, .sink = sink, .queries = some,
                              .heads = heads, .width = width, .value_width = value_width, .scale = scale, .pieces = pieces,
                              .sums = sums};
        in_parts(type == BF16 ? attend_bf16 : attend_fp32, &a, some * heads * count * (width + value_width), threads);
        if (pieces > 1)
            in_parts(type == BF16 ? join_bf16 : join_fp32, &a, some * pieces * heads * value_width, threads);
    }
    free(sums);
    return 0;
}
