/* Where a word of 32 bits stands. */

#include "lane.h"

#define BLOCK_WORDS 32 /* looked at together, so that the compiler does it in vectors: most blocks do not have the word */

static inline __attribute__((always_inline)) size_t find(const uint32_t *words, size_t count, uint32_t word,
                                                         int64_t *places, size_t room) {
    size_t found = 0;
    for (size_t begin = 0; begin < count; begin += BLOCK_WORDS) {
        size_t end = count - begin < BLOCK_WORDS ? count : begin + BLOCK_WORDS;
        uint32_t is_there = 0;
        if (end - begin == BLOCK_WORDS)
            for (int at = 0; at < BLOCK_WORDS; at++) is_there |= words[begin + at] == word;
        else is_there = 1;
        if (!is_there) continue;
        for (size_t at = begin; at < end; at++) {
            if (words[at] != word) continue;
            if (found < room) places[found] = (int64_t)at;
            found++;
        }
    }
    return found;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static size_t find_by_eight(const uint32_t *words, size_t count, uint32_t word,
                                                            int64_t *places, size_t room) {
    return find(words, count, word, places, room);
}
#endif

size_t lane_find_word(const uint32_t *words, size_t count, uint32_t word, int64_t *places, size_t room) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return find_by_eight(words, count, word, places, room);
#endif
    return find(words, count, word, places, room);
}
