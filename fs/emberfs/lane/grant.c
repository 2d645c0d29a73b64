/* Grants of readers, as `emberfs.grants` makes them: the signature is checked once for a lane, then each item of a read is
   looked for among the ranges.

   Does not know: who shows a grant, beside the tenant that it must be of; or whether it has expired. */

#include "lane.h"

#include <stdlib.h>
#include <string.h>

/* ---- HMAC-SHA256 (FIPS 180-4, RFC 2104) */

#define BLOCK 64
#define DIGEST 32

struct sha256 {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[BLOCK];
};

static const uint32_t rounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t right(uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

/* One round. Who calls it names the eight variables one place further each time, so that none has to move. */
#define ROUND(a, b, c, d, e, f, g, h, at)                                                                              \
    do {                                                                                                               \
        h += (right(e, 6) ^ right(e, 11) ^ right(e, 25)) + (g ^ (e & (f ^ g))) + rounds[at] + words[at];               \
        d += h;                                                                                                        \
        h += (right(a, 2) ^ right(a, 13) ^ right(a, 22)) + ((a & b) | (c & (a | b)));                                  \
    } while (0)

static void add_block(struct sha256 *hash, const uint8_t *block) {
    uint32_t words[64];
    for (int at = 0; at < 16; at++) {
        memcpy(&words[at], block + 4 * at, 4);
        words[at] = __builtin_bswap32(words[at]);
    }
    for (int at = 16; at < 64; at++) {
        uint32_t a = words[at - 15], b = words[at - 2];
        words[at] = words[at - 16] + (right(a, 7) ^ right(a, 18) ^ a >> 3) + words[at - 7] +
                    (right(b, 17) ^ right(b, 19) ^ b >> 10);
    }
    uint32_t *state = hash->state;
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
    for (int at = 0; at < 64; at += 8) {
        ROUND(a, b, c, d, e, f, g, h, at);
        ROUND(h, a, b, c, d, e, f, g, at + 1);
        ROUND(g, h, a, b, c, d, e, f, at + 2);
        ROUND(f, g, h, a, b, c, d, e, at + 3);
        ROUND(e, f, g, h, a, b, c, d, at + 4);
        ROUND(d, e, f, g, h, a, b, c, at + 5);
        ROUND(c, d, e, f, g, h, a, b, at + 6);
        ROUND(b, c, d, e, f, g, h, a, at + 7);
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void begin(struct sha256 *hash) {
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(hash->state, first, sizeof first);
    hash->size = 0;
}

static void add(struct sha256 *hash, const uint8_t *data, size_t size) {
    while (size) {
        size_t held = hash->size % BLOCK, step = BLOCK - held < size ? BLOCK - held : size;
        if (step == BLOCK) add_block(hash, data);
        else {
            memcpy(hash->block + held, data, step);
            if (held + step == BLOCK) add_block(hash, hash->block);
        }
        hash->size += step;
        data += step;
        size -= step;
    }
}

static void end(struct sha256 *hash, uint8_t *digest) {
    uint8_t tail[2 * BLOCK] = {0x80};
    uint64_t bits = __builtin_bswap64(8 * hash->size);
    size_t size = 1 + (2 * BLOCK - 9 - hash->size % BLOCK) % BLOCK; /* so that 8 bytes more end a block */
    memcpy(tail + size, &bits, 8);
    add(hash, tail, size + 8);
    for (int at = 0; at < 8; at++) {
        uint32_t word = __builtin_bswap32(hash->state[at]);
        memcpy(digest + 4 * at, &word, 4);
    }
}

static void hmac(const uint8_t *key, const uint8_t *data, size_t size, uint8_t *digest) {
    struct sha256 hash;
    uint8_t pad[BLOCK], inner[DIGEST];
    for (int at = 0; at < BLOCK; at++) pad[at] = 0x36 ^ (at < LANE_KEY_BYTES ? key[at] : 0);
    begin(&hash);
    add(&hash, pad, BLOCK);
    add(&hash, data, size);
    end(&hash, inner);
    for (int at = 0; at < BLOCK; at++) pad[at] ^= 0x36 ^ 0x5c;
    begin(&hash);
    add(&hash, pad, BLOCK);
    add(&hash, inner, DIGEST);
    end(&hash, digest);
}

static int is_signed(const struct lane_keys *keys, const uint8_t *data, size_t size) {
    int found = 0;
    for (uint32_t at = 0; at < keys->count; at++) {
        uint8_t digest[DIGEST], differs = 0;
        hmac(keys->keys[at], data, size - DIGEST, digest);
        for (int byte = 0; byte < DIGEST; byte++) differs |= digest[byte] ^ data[size - DIGEST + byte]; /* all of them */
        found |= !differs;
    }
    return found;
}

/* ---- what a grant says */

struct head {
    char magic[4];
    uint32_t tenant_size;
    uint64_t expires_s, lease;
    uint32_t files, ranges;
};

struct file {
    uint64_t number, inode, seed;
    uint32_t chunk_size, chains, stripe, zeros;
};

struct range {
    uint64_t begin;
    uint32_t length, file;
};

struct lane_grant {
    struct head head;
    struct file files[]; /* by inode; behind them the ranges, by file and begin */
};

_Static_assert(sizeof(struct head) == 32 && sizeof(struct file) == 40 && sizeof(struct range) == 16, "as in Python");
_Static_assert(sizeof(struct head) + LANE_GRANT_FILES_MAX * sizeof(struct file) + LANE_GRANT_RANGES_MAX * sizeof(struct range) +
                       LANE_TENANT_BYTES_MAX + DIGEST ==
                   LANE_GRANT_BYTES_MAX,
               "the longest one");

struct lane_grant *lane_grant_new(const struct lane_keys *keys, const uint8_t *data, size_t size, const char *tenant,
                                  size_t tenant_size) {
    struct head head;
    if (size < sizeof head + DIGEST) return NULL;
    memcpy(&head, data, sizeof head);
    if (memcmp(head.magic, "EMG1", 4) != 0 || head.files > LANE_GRANT_FILES_MAX || head.ranges > LANE_GRANT_RANGES_MAX ||
        head.tenant_size > LANE_TENANT_BYTES_MAX)
        return NULL;
    size_t said = sizeof head + head.files * sizeof(struct file) + head.ranges * sizeof(struct range);
    if (size != said + head.tenant_size + DIGEST || !is_signed(keys, data, size)) return NULL;
    if (tenant_size && (tenant_size != head.tenant_size || memcmp(tenant, data + said, tenant_size) != 0)) return NULL;
    struct lane_grant *grant = malloc(said);
    if (grant != NULL) memcpy(grant, data, said);
    return grant;
}

int lane_grant_covers(const struct lane_grant *grant, const struct lane_item *item, int64_t now_s) {
    const struct range *ranges = (const struct range *)(grant->files + grant->head.files);
    uint32_t low = 0, high = grant->head.files;
    uint64_t begin, end;
    if (now_s >= (int64_t)grant->head.expires_s) return 0;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (grant->files[middle].inode < item->inode) low = middle + 1;
        else high = middle;
    }
    if (low == grant->head.files || grant->files[low].inode != item->inode) return 0;
    uint32_t file = low, chunk_size = grant->files[low].chunk_size;
    if (item->length > chunk_size || item->offset > chunk_size - item->length ||
        __builtin_mul_overflow(item->index, (uint64_t)chunk_size, &begin) ||
        __builtin_add_overflow(begin, (uint64_t)item->offset, &begin) ||
        __builtin_add_overflow(begin, (uint64_t)item->length, &end))
        return 0;
    /* The last range that does not begin behind the item. */
    low = 0, high = grant->head.ranges;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (ranges[middle].file < file || (ranges[middle].file == file && ranges[middle].begin <= begin)) low = middle + 1;
        else high = middle;
    }
    return low && ranges[low - 1].file == file && end <= ranges[low - 1].begin + ranges[low - 1].length;
}
