/* CRC32C: by carry-less multiplication of 64 bytes at a time where the processor has it (AVX-512 VPCLMULQDQ), else by
   its CRC instruction, else by a table.

   Folding is described in "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009).
   A block that lies D bits before another one may be added to it, multiplied by x^D mod P; for each 64-bit half
   the factor is the reflected x^(D+32) or x^(D-32) mod P, as a 33-bit number. */

#include "lane.h"

#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected */

static uint32_t table[256];

static void fill_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
        table[byte] = value;
    }
}

static uint32_t by_table(uint32_t state, const uint8_t *data, size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    while (size--) state = state >> 8 ^ table[(state ^ *data++) & 255];
    return state;
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t state, const uint8_t *data, size_t size) {
    uint64_t wide = state;
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    state = (uint32_t)wide;
    while (size--) state = _mm_crc32_u8(state, *data++);
    return state;
}

#define FOLD_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,vpclmulqdq,pclmul,sse4.2")))

/* x^(D+32) and x^(D-32) mod P, reflected, for D = 2048 and 512 bits: see tests/fs/test_lane_server.py, which derives them. */
#define FACTOR_2048_LOW 0x0dcb17aa4ull
#define FACTOR_2048_HIGH 0x0b9e02b86ull
#define FACTOR_512_LOW 0x0740eef02ull
#define FACTOR_512_HIGH 0x09e4addf8ull

FOLD_TARGET static inline __m512i fold(__m512i value, __m512i factors, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(value, factors, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(value, factors, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* xor of all three */
}

FOLD_TARGET static uint32_t by_folding(uint32_t state, const uint8_t *data, size_t size) {
    const __m512i far = _mm512_broadcast_i32x4(_mm_set_epi64x(FACTOR_2048_HIGH, FACTOR_2048_LOW));
    const __m512i near = _mm512_broadcast_i32x4(_mm_set_epi64x(FACTOR_512_HIGH, FACTOR_512_LOW));
    __m512i first = _mm512_loadu_si512(data), second = _mm512_loadu_si512(data + 64);
    __m512i third = _mm512_loadu_si512(data + 128), fourth = _mm512_loadu_si512(data + 192);
    first = _mm512_xor_si512(first, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
        first = fold(first, far, _mm512_loadu_si512(data));
        second = fold(second, far, _mm512_loadu_si512(data + 64));
        third = fold(third, far, _mm512_loadu_si512(data + 128));
        fourth = fold(fourth, far, _mm512_loadu_si512(data + 192));
    }
    first = fold(fold(fold(first, near, second), near, third), near, fourth);
    for (; size >= 64; data += 64, size -= 64) first = fold(first, near, _mm512_loadu_si512(data));
    uint8_t rest[64];
    _mm512_storeu_si512(rest, first);
    return by_instruction(by_instruction(0, rest, sizeof rest), data, size);
}

static int find_way(void) {
    __builtin_cpu_init();
    int folds = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul");
    return folds ? LANE_CRC_FOLDS : __builtin_cpu_supports("sse4.2") ? LANE_CRC_INSTRUCTION : LANE_CRC_TABLE;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#define HWCAP_CRC32_BIT (1u << 7)

static uint32_t by_instruction(uint32_t state, const uint8_t *data, size_t size) {
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(state) : "r"(word));
    }
    return by_table(state, data, size);
}

static uint32_t by_folding(uint32_t state, const uint8_t *data, size_t size) { return by_instruction(state, data, size); }

static int find_way(void) { return getauxval(AT_HWCAP) & HWCAP_CRC32_BIT ? LANE_CRC_INSTRUCTION : LANE_CRC_TABLE; }

#else

static uint32_t by_instruction(uint32_t state, const uint8_t *data, size_t size) { return by_table(state, data, size); }

static uint32_t by_folding(uint32_t state, const uint8_t *data, size_t size) { return by_table(state, data, size); }

static int find_way(void) { return LANE_CRC_TABLE; }

#endif

int lane_crc32c_way(void) {
    static int way; /* 0: not known yet; who finds out twice finds the same */
    int known = __atomic_load_n(&way, __ATOMIC_RELAXED);
    if (!known) {
        known = find_way();
        __atomic_store_n(&way, known, __ATOMIC_RELAXED);
    }
    return known;
}

uint32_t lane_crc32c(uint32_t crc, const void *data, size_t size) {
    int way = lane_crc32c_way();
    if (way == LANE_CRC_FOLDS && size >= 256) return ~by_folding(~crc, data, size);
    return way == LANE_CRC_TABLE ? ~by_table(~crc, data, size) : ~by_instruction(~crc, data, size);
}

/* ---- of two pieces

   The CRC of two pieces is that of the first one, times x^(8 * size of the second) mod P, plus that of the second. */

#define POWERS 64 /* x^(8 * 2^k) mod P, reflected: bit 31 is x^0 */

static uint32_t powers[POWERS];

static uint32_t times(uint32_t first, uint32_t second) {
    uint32_t product = 0;
    for (; first; first <<= 1) {
        if (first >> 31) product ^= second;
        second = second >> 1 ^ (second & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

static void fill_powers(void) {
    powers[0] = 1u << 23;
    for (int at = 1; at < POWERS; at++) powers[at] = times(powers[at - 1], powers[at - 1]);
}

uint32_t lane_crc32c_join(uint32_t first, uint32_t second, uint64_t second_bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_powers);
    for (int at = 0; second_bytes && first; second_bytes >>= 1, at++)
        if (second_bytes & 1) first = times(powers[at], first);
    return first ^ second;
}

#define JOIN_BYTES (8u << 10) /* are summed in the time of a multiplication, one for each bit of the size that is set */

uint32_t lane_crc32c_own(uint32_t before, uint32_t after, const void *data, size_t size) {
    if (size < JOIN_BYTES * (size_t)__builtin_popcountll(size)) return lane_crc32c(0, data, size);
    return lane_crc32c_join(before, after, size);
}
