/* Where a word of 32 bits stands. */

#include "lane.h"

#define BLOCK_WORDS 32 /* looked at together, so that the compiler does it in vectors: most blocks do not have the word */

size_t lane_find_word(const uint32_t *words, size_t count, uint32_t word, int64_t *places, size_t room) {
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
