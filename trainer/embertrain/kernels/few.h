// What the loops share: as many numbers at a time as the processor takes, bf16 and fp32 numbers alike, and torch's threads.
//
// A product of a few rows is bound by reading its weights, and around it by calling; both are what these loops save. They
// add up in fp32, whatever comes in. Every output, or piece of a sum, is computed by one thread alone: their number does not
// show in its bits. Nor do the rows beside it, except in products, which add up in another order where they are many.

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default")))

enum { BF16 = 0, FP32 = 1 };

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef unsigned bits __attribute__((vector_size(4 * LANES)));
typedef unsigned short half __attribute__((vector_size(2 * LANES)));

// LANES numbers of type `type` from index i on.
INLINE vec load(const void *p, long i, int type)
{
    if (type == BF16) {
        half h;
        memcpy(&h, (const unsigned short *)p + i, sizeof h);
        return (vec)(__builtin_convertvector(h, bits) << 16);
    }
    vec x;
    memcpy(&x, (const float *)p + i, sizeof x);
    return x;
}

// fp32 rounded to bf16, ties to even, in the low half; NaN stays one.
INLINE bits rounded(vec x)
{
    bits b = (bits)x, nan = (bits)(x != x);
    bits even = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return (even & ~nan) | (0x7fc0 & nan);
}

INLINE void store(void *p, long i, vec x, int type)
{
    if (type == BF16) {
        half h = __builtin_convertvector(rounded(x), half);
        memcpy((unsigned short *)p + i, &h, sizeof h);
    } else {
        memcpy((float *)p + i, &x, sizeof x);
    }
}

// As it would be read again after a store.
INLINE vec as_stored(vec x, int type) { return type == BF16 ? (vec)(rounded(x) << 16) : x; }

INLINE float load1(const void *p, long i, int type)
{
    if (type == FP32)
        return ((const float *)p)[i];
    unsigned b = (unsigned)((const unsigned short *)p)[i] << 16;
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

INLINE void store1(void *p, long i, float x, int type)
{
    if (type == FP32) {
        ((float *)p)[i] = x;
        return;
    }
    unsigned b;
    memcpy(&b, &x, sizeof b);
    ((unsigned short *)p)[i] = (unsigned short)(x != x ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

typedef float vec4 __attribute__((vector_size(16)));

// In halves, until one is left.
INLINE float sum(vec x)
{
#if LANES == 16
    typedef float vec8 __attribute__((vector_size(32)));
    vec8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    vec4 z = __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#elif LANES == 8
    vec4 z = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
    vec4 z = x;
#endif
    z += __builtin_shufflevector(z, z, 2, 3, 0, 1);
    return z[0] + z[1];
}

#if LANES >= 8
// `sum` of LANES vectors, each in the same order, in a third of the operations: lane l is that of `t[l]`.
INLINE vec sums(const vec *t)
{
    vec b[4]; // Of every fourth: quarters, of 128 bits, are what is left of each.
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
#if LANES == 16
        vec a[2];
#pragma GCC unroll 2
        for (int m = 0; m < 2; m++) {
            vec x = t[4 * m + n], y = t[4 * m + 8 + n];
            a[m] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        }
        b[n] = __builtin_shufflevector(a[0], a[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(a[0], a[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#else
        b[n] = __builtin_shufflevector(t[n], t[4 + n], 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(t[n], t[4 + n], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
    }
    vec c[2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        vec x = b[2 * n], y = b[2 * n + 1];
#if LANES == 16
        c[n] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#else
        c[n] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
#endif
    }
#if LANES == 16
    return __builtin_shufflevector(c[0], c[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#else
    return __builtin_shufflevector(c[0], c[1], 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(c[0], c[1], 1, 3, 9, 11, 5, 7, 13, 15);
#endif
}
#endif

// Twice LANES weights as two vectors: of fp32 the first half and the second; of bf16 those of even places and those of odd
// ones, which is two operations where keeping their order would be six. What they are multiplied by is `spread` likewise.
INLINE void load_pair(const void *p, long i, int type, vec *first, vec *second)
{
    if (type == FP32) {
        *first = load(p, i, FP32);
        *second = load(p, i + LANES, FP32);
        return;
    }
    bits b;
    memcpy(&b, (const unsigned short *)p + i, sizeof b);
    *first = (vec)(b << 16);
    *second = (vec)(b & 0xffff0000);
}

// The reverse: both as twice LANES numbers in their order.
INLINE void store_pair(void *p, long i, vec first, vec second, int type)
{
    if (type == FP32) {
        store(p, i, first, FP32);
        store(p, i + LANES, second, FP32);
        return;
    }
    bits b = rounded(first) | rounded(second) << 16;
    memcpy((unsigned short *)p + i, &b, sizeof b);
}

// Numbers of type `type` as fp32, in the order in which weights of that type are loaded; count is a multiple of twice LANES.
INLINE void spread(float *out, const void *x, long count, int type)
{
    for (long i = 0; i < count; i += 2 * LANES) {
        vec first, second;
        load_pair(x, i, type, &first, &second);
        store(out, i, first, FP32);
        store(out, i + LANES, second, FP32);
    }
}

// Numbers that rows or weights are multiplied by: `spread`, or as they are where the processor multiplies bf16 numbers.
INLINE void lay(float *out, const void *x, long count, int type)
{
#ifdef __AVX512BF16__
    if (type == BF16) {
        memcpy(out, x, (size_t)count * 2);
        return;
    }
#endif
    spread(out, x, count, type);
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

INLINE vec logistic(vec x)
{
    bits positive = (bits)(((bits)x & 0x80000000u) == 0);
    vec e = exponential((vec)((bits)x | 0x80000000u)); // of -|x|
    return (vec)(((bits)(vec){0} + 0x3f800000u) & positive | (bits)e & ~positive) / (1.0f + e);
}

INLINE vec silu(vec x) { return x * logistic(x); }

// NaN stays one.
INLINE vec at_most(vec x, float limit)
{
    bits over = (bits)(x > limit);
    return (vec)(((bits)x & ~over) | ((bits)((vec){0} + limit) & over));
}

INLINE size_t bytes_of(int type) { return type == BF16 ? 2 : 4; }
INLINE const void *at(const void *p, long i, int type) { return (const char *)p + (size_t)i * bytes_of(type); }

// Runs work(job, part, parts) for every part, on torch's threads where they are known and `cost` (multiplications, about)
// is worth waking them.
typedef void (*work_fn)(void *job, int part, int parts);
void in_parts(work_fn work, void *job, long cost, int threads);

// The part of 0..count that is a thread's, in multiples of `step`.
INLINE void share(long count, long step, int part, int parts, long *begin, long *end)
{
    long steps = (count + step - 1) / step;
    *begin = steps * part / parts * step;
    *end = steps * (part + 1) / parts * step;
    if (*end > count)
        *end = count;
    if (*begin > count)
        *begin = count;
}

// Memory of this thread's for as long as a kernel runs. Where there is none the process ends, and says so.
float *scratch(size_t numbers);
