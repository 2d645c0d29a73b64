// A few rows times a weight, the part that several loops need.

#pragma once

#include "few.h"

enum { TILE = 8, HALF = 4 }; // rows at once, and of those in registers
enum { OUTS = LANES == 16 ? 4 : 2 }; // outputs at once, where rows are many: so many sums fit in the registers

// The sums of `rows` rows and `outs` outputs.
INLINE void store_sums(vec total[HALF][OUTS], int rows, int outs, void *y, long y_row, int y_type)
{
#if LANES >= 8
    if (rows == HALF && outs == OUTS) {
        float all[HALF * OUTS];
        store(all, 0, sums(total[0]), y_type);
        for (int m = 0; m < HALF; m++)
            memcpy((void *)at(y, m * y_row, y_type), at(all, m * OUTS, y_type), OUTS * bytes_of(y_type));
        return;
    }
#endif
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < outs; n++)
            store1(y, m * y_row + n, sum(total[m][n]), y_type);
}

#ifdef __AVX512BF16__
// `block` of bf16 numbers, two at a time into an fp32 sum.
INLINE void block_of_pairs(const float *x, int rows, const void *weight, int outs, long in, vec total[HALF][OUTS])
{
    for (long k = 0; k < in; k += 2 * LANES) {
        __m512bh w[OUTS];
#pragma GCC unroll 4
        for (int n = 0; n < outs; n++)
            w[n] = (__m512bh)_mm512_loadu_si512(at(weight, n * in + k, BF16));
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            __m512bh a = (__m512bh)_mm512_loadu_si512(at(x + m * in, k, BF16));
#pragma GCC unroll 4
            for (int n = 0; n < outs; n++)
                total[m][n] = (vec)_mm512_dpbf16_ps((__m512)total[m][n], w[n], a);
        }
    }
}
#endif

// `outs` outputs of `rows` rows, numbers known when compiled; rows of `x` are laid.
INLINE void block(const float *x, int rows, const void *weight, int outs, long in, void *y, long y_row, int type, int y_type)
{
    vec total[HALF][OUTS], more[HALF][OUTS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < outs; n++)
            total[m][n] = more[m][n] = (vec){0};
#ifdef __AVX512BF16__
    if (type == BF16) {
        block_of_pairs(x, rows, weight, outs, in, total);
        store_sums(total, rows, outs, y, y_row, y_type);
        return;
    }
#endif
    const int is_few = rows * outs <= 4; // Then sums are two each, to keep the multipliers busy.
    for (long k = 0; k < in; k += 2 * LANES) {
        vec even[OUTS], odd[OUTS];
#pragma GCC unroll 4
        for (int n = 0; n < outs; n++) {
            load_pair(weight, n * in + k, type, &even[n], &odd[n]);
            if (outs > 1) // More than one reading side by side is what the processor does not foresee.
                __builtin_prefetch(at(weight, (outs + n) * in + k, type));
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            vec a = load(x, m * in + k, FP32), b = load(x, m * in + k + LANES, FP32);
#pragma GCC unroll 4
            for (int n = 0; n < outs; n++) {
                total[m][n] += even[n] * a;
                if (is_few)
                    more[m][n] += odd[n] * b;
                else
                    total[m][n] += odd[n] * b;
            }
        }
    }
    if (is_few)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < outs; n++)
                total[m][n] += more[m][n];
    store_sums(total, rows, outs, y, y_row, y_type);
}

INLINE void blocks(const float *x, long rows, const void *weight, int outs, long in, void *y, long y_row, int type, int y_type)
{
    for (; rows > 0; rows -= HALF, x += HALF * in, y = (void *)at(y, HALF * y_row, y_type))
        switch (rows) {
        case 1: block(x, 1, weight, outs, in, y, y_row, type, y_type); break;
        case 2: block(x, 2, weight, outs, in, y, y_row, type, y_type); break;
        case 3: block(x, 3, weight, outs, in, y, y_row, type, y_type); break;
        default: block(x, 4, weight, outs, in, y, y_row, type, y_type);
        }
}

// `count` outputs of up to TILE rows. The weight's rows follow one another, and are read in the order in which they lie: the
// memory is what few rows wait for, and gives half as much to two readings side by side. More rows wait for the multipliers.
INLINE void outputs(const float *x, long rows, const void *weight, long in, long count, void *y, long y_row, int type,
                    int y_type)
{
    long n = 0;
    if (rows > HALF)
        for (; n + OUTS <= count; n += OUTS)
            blocks(x, rows, at(weight, n * in, type), OUTS, in, (void *)at(y, n, y_type), y_row, type, y_type);
    for (; n < count; n++)
        blocks(x, rows, at(weight, n * in, type), 1, in, (void *)at(y, n, y_type), y_row, type, y_type);
}

// The same of any number of rows, `x_row` numbers apart and not laid yet.
INLINE void outputs_of_many(const void *x, long x_row, long rows, const void *weight, long in, long count, void *y, long y_row,
                            int type)
{
    float *laid = scratch((size_t)(TILE * in));
    for (long row = 0; row < rows; row += TILE) {
        long some = rows - row < TILE ? rows - row : TILE;
        for (long m = 0; m < some; m++)
            lay(laid + m * in, at(x, (row + m) * x_row, type), in, type);
        outputs(laid, some, weight, in, count, (void *)at(y, row * y_row, type), y_row, type, type);
    }
}
