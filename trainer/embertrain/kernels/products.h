// A few rows times a weight, the part that several loops need.

#pragma once

#include "few.h"

enum { TILE = 8, HALF = 4 }; // rows at once, and of those in registers

#ifdef __AVX512BF16__
// `block` of bf16 numbers, two at a time into an fp32 sum.
INLINE void block_of_pairs(const float *x, int rows, const void *weight, int outs, long in, void *y, long y_row, int y_type)
{
    __m512 total[HALF][2];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
        total[m][0] = total[m][1] = _mm512_setzero_ps();
    for (long k = 0; k < in; k += 2 * LANES) {
        __m512bh w[2];
#pragma GCC unroll 2
        for (int n = 0; n < outs; n++)
            w[n] = (__m512bh)_mm512_loadu_si512(at(weight, n * in + k, BF16));
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            __m512bh a = (__m512bh)_mm512_loadu_si512(at(x + m * in, k, BF16));
#pragma GCC unroll 2
            for (int n = 0; n < outs; n++)
                total[m][n] = _mm512_dpbf16_ps(total[m][n], w[n], a);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < outs; n++)
            store1(y, m * y_row + n, sum((vec)total[m][n]), y_type);
}
#endif

// `outs` outputs of `rows` rows, numbers known when compiled; rows of `x` are laid.
INLINE void block(const float *x, int rows, const void *weight, int outs, long in, void *y, long y_row, int type, int y_type)
{
#ifdef __AVX512BF16__
    if (type == BF16) {
        block_of_pairs(x, rows, weight, outs, in, y, y_row, y_type);
        return;
    }
#endif
    // Where there are few sums they are two each, to keep the multipliers busy.
    const int sums = rows * outs <= 4 ? 2 : 1;
    vec total[HALF][2][2];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < outs; n++)
            total[m][n][0] = total[m][n][1] = (vec){0};
    for (long k = 0; k < in; k += 2 * LANES) {
        vec even[2], odd[2];
#pragma GCC unroll 2
        for (int n = 0; n < outs; n++)
            load_pair(weight, n * in + k, type, &even[n], &odd[n]);
        if (outs == 2) { // Two readings side by side are more than the processor foresees.
            __builtin_prefetch(at(weight, 2 * in + k, type));
            __builtin_prefetch(at(weight, 3 * in + k, type));
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            vec a = load(x, m * in + k, FP32), b = load(x, m * in + k + LANES, FP32);
#pragma GCC unroll 2
            for (int n = 0; n < outs; n++) {
                total[m][n][0] += even[n] * a;
                total[m][n][sums - 1] += odd[n] * b;
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < outs; n++)
            store1(y, m * y_row + n, sum(sums == 2 ? total[m][n][0] + total[m][n][1] : total[m][n][0]), y_type);
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
        for (; n + 2 <= count; n += 2)
            blocks(x, rows, at(weight, n * in, type), 2, in, (void *)at(y, n, y_type), y_row, type, y_type);
    for (; n < count; n++)
        blocks(x, rows, at(weight, n * in, type), 1, in, (void *)at(y, n, y_type), y_row, type, y_type);
}
