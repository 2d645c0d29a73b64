/* What the parts of the native lane share: the messages on a lane, the checksum, and the table of extents.

   There are two kinds. A *local* lane is a SOCK_SEQPACKET pair between a client and a storage server of one host; each
   message is one packet, and the bytes land in memory of the client. A *stream* is a TCP connection, and its answers
   bring the bytes along:

       head       LANE_COUNTS
       promises   a lane_part for each item: all of it, or 0 bytes of one that is declined
       payload    the promised bytes, item after item
       verdicts   a lane_part for each item

   Numbers are little-endian; other machines have no lanes. */

#ifndef EMBERFS_LANE_H
#define EMBERFS_LANE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define LANE_MAGIC 0x324c4d45u /* "EML2": its answers have checksums */
#define LANE_ITEMS_MAX 2048
#define LANE_BYTES_MAX (64u << 20)
#define LANE_REGIONS_MAX 1024

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lanes are for little-endian machines"
#endif

enum lane_kind {
    LANE_READ = 1,   /* followed by `count` lane_items, and of a reader perhaps by a grant, for the place that the first
                        item names; answered by LANE_COUNTS of the same call */
    LANE_COUNTS = 2, /* followed by `count` lane_parts: the bytes that were read, or LANE_DECLINED, and their CRC or 0 */
    LANE_REGION = 3, /* `call` names the memory whose descriptor comes along (SCM_RIGHTS) */
    LANE_FORGET = 4, /* `call` names memory that is not used any more */
    LANE_READ_SUMS = 5, /* as LANE_READ, of a local lane; the answer has CRCs */
};

#define LANE_DECLINED (-1)

struct lane_head {
    uint32_t magic;
    uint16_t kind;
    uint16_t count;
    uint64_t call;
};

struct lane_item {
    uint64_t inode, index; /* the chunk */
    uint64_t chain_version;
    uint64_t region, place; /* where its bytes go: `place` bytes into the memory of that number */
    uint32_t chain;
    uint32_t offset, length; /* within the chunk */
    uint32_t grant; /* of a reader: the place of the grant that it reads under, of LANE_GRANTS_MAX from 1 on */
};

/* What comes of an item. In a stream its bytes are right if their CRC, continued from that of the promise, is that of the
   verdict. */
struct lane_part {
    int32_t count; /* LANE_DECLINED: whatever came is worth nothing */
    uint32_t crc;
};

enum lane_crc_way { LANE_CRC_TABLE = 1, LANE_CRC_INSTRUCTION = 2, LANE_CRC_FOLDS = 3 };

/* The CRC32C (Castagnoli) of `size` bytes, continued from `crc`, which is 0 at the beginning. */
uint32_t lane_crc32c(uint32_t crc, const void *data, size_t size);
/* The CRC of two pieces together. `lane_crc32c_join(first, both, second_bytes)`, in turn, is that of the second one. */
uint32_t lane_crc32c_join(uint32_t first, uint32_t second, uint64_t second_bytes);
/* Of `size` bytes at `data`: a CRC was `before`, and is `after`, when continued over them. */
uint32_t lane_crc32c_own(uint32_t before, uint32_t after, const void *data, size_t size);
/* How this processor computes it. */
int lane_crc32c_way(void);

/* Nanoseconds of the clock that leases are counted on. */
int64_t lane_now_ns(void);

/* ---- the table: where the committed bytes of chunks lie, for as long as that is certain */

struct lane_table;

struct lane_file; /* an open file, which stays open as long as somebody has found it */

struct lane_found {
    struct lane_file *file; /* NULL: nothing is known, or nobody may serve it */
    int fd;
    int64_t block;         /* where the chunk begins in that file */
    uint32_t length;       /* of the chunk */
    uint32_t granule_log2; /* what one checksum covers */
    uint32_t sum_before, sum_after; /* the cumulative CRC before and after the granules of the range */
    uint32_t slot;
    uint64_t generation; /* of the slot: another one means that the entry is gone */
};

struct lane_table *lane_table_new(size_t bytes_max);
void lane_table_free(struct lane_table *table);
/* A target of `chain` serves clients that go by `version`; 0: none of them. */
void lane_table_allow(struct lane_table *table, uint32_t chain, uint64_t version);
/* Nothing is served after that moment. */
void lane_table_lease(struct lane_table *table, int64_t until_ns);
/* `sums`: one cumulative CRC per granule. What was there of the chunk is replaced. Without memory, or a descriptor for
   the file, nothing is. */
void lane_table_put(struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index, int fd, int64_t block,
                   uint32_t length, uint32_t granule_log2, const uint32_t *sums, uint32_t sums_count);
void lane_table_drop(struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index);
/* Drop all of a chain: its files may be closed, and their numbers used again. What is being read goes on from
   descriptors of our own, and is declined. */
void lane_table_clear(struct lane_table *table, uint32_t chain);
size_t lane_table_count(struct lane_table *table);

/* Look the items up. To be ended by `lane_table_finish`. */
void lane_table_find(struct lane_table *table, const struct lane_item *items, size_t count, struct lane_found *found);
/* After the read: set the count of `parts[i]` to LANE_DECLINED where what was found may not be served any more, and let go of it. */
void lane_table_finish(struct lane_table *table, const struct lane_item *items, size_t count,
                       const struct lane_found *found, struct lane_part *parts);

/* ---- reads of files that are open in this process (read.c) */

/* Whether an item and the one after it are of one chunk, as it was found, and lie side by side there. */
int lane_goes_on(const struct lane_found *found, const struct lane_item *item);
/* Read and check items that were found and lie side by side, or one. `scratch`: twice `scratch_bytes`, for the rest of their
   granules. What preadv2 does not read whole with `flags` is declined, and what has another checksum is damaged as well: of
   several only that which is. With `wants_sums` the parts get their CRCs. */
void lane_read_items(const struct lane_found *found, const struct lane_item *items, uint8_t *const *into, size_t count,
                     uint8_t *scratch, uint64_t scratch_bytes, int flags, int wants_sums, struct lane_part *parts,
                     int *is_damaged);
/* Read items of the table in this very thread, which may wait for disks; item i goes to into[i]. 0, or -1: no memory. */
int lane_read_here(struct lane_table *table, const struct lane_item *items, size_t count, uint8_t *const *into,
                   int wants_sums, struct lane_part *parts);
/* Read ranges of files, unchecked, one after the other into `into`. How many were read whole; the next one met the end of
   its file, or `error`. */
size_t lane_read_files(const int32_t *fds, const int64_t *offsets, const int64_t *lengths, size_t count, uint8_t *into,
                       int *error);

/* ---- words (words.c) */

/* How many of the words are `word`; `places` gets where, of the first `room` of them. */
size_t lane_find_word(const uint32_t *words, size_t count, uint32_t word, int64_t *places, size_t room);

/* ---- grants */

#define LANE_GRANTS_MAX 64 /* that a lane remembers */
#define LANE_GRANT_FILES_MAX 1024
#define LANE_GRANT_RANGES_MAX 2048
#define LANE_TENANT_BYTES_MAX 1024
#define LANE_GRANT_BYTES_MAX (32 + 40 * LANE_GRANT_FILES_MAX + 16 * LANE_GRANT_RANGES_MAX + LANE_TENANT_BYTES_MAX + 32)
#define LANE_KEY_BYTES 32
#define LANE_KEYS_MAX 4

struct lane_keys {
    uint32_t count;
    uint8_t keys[LANE_KEYS_MAX][LANE_KEY_BYTES];
};

struct lane_grant; /* free() lets go of it */

/* What was made with one of the keys for the tenant, of 0 bytes: for whichever. NULL: it is no such grant. */
struct lane_grant *lane_grant_new(const struct lane_keys *keys, const uint8_t *data, size_t size, const char *tenant,
                                  size_t tenant_size);
/* It names all bytes of the item, and has not expired. */
int lane_grant_covers(const struct lane_grant *grant, const struct lane_item *item, int64_t now_s);

/* ---- the server */

struct lane_server;

struct lane_stats {
    uint64_t lanes, requests, items, declined, damaged, bytes;
};

struct lane_server *lane_server_new(struct lane_table *table, int threads, int spin_us); /* NULL: errno */
/* Serve a local lane, or a stream. Takes `fd` as its own; 0, or -1: errno. `tenant`: it is a reader's, and nothing is read
   but under grants of that tenant ("": of any); NULL: it is not. */
int lane_server_adopt(struct lane_server *server, int fd, int is_stream, const char *tenant);
/* Those that grants are checked with from now on. */
void lane_server_set_keys(struct lane_server *server, const struct lane_keys *keys);

/* ---- the server's end of a stream; it has a thread of its own */

#define LANE_STEP_BYTES (256u << 10) /* read, and checked or sent, in one go: it stays in the core's cache */
#define LANE_SCRATCH_BYTES (1u << 20)
#define LANE_PACKET_BYTES_MAX \
    (sizeof(struct lane_head) + LANE_ITEMS_MAX * sizeof(struct lane_item) + LANE_GRANT_BYTES_MAX)

/* Serve until the client leaves or breaks the rules. */
void lane_stream_serve(struct lane_table *table, int fd, struct lane_stats *stats);
/* Add an answered request to the counters. */
void lane_count(struct lane_stats *stats, const struct lane_part *parts, size_t count);
void lane_server_stats(struct lane_server *server, struct lane_stats *stats);
/* Ends the threads and every lane, and frees it. -1: a thread waits for a disk that does not answer; all is left to it. */
int lane_server_stop(struct lane_server *server);

/* ---- the client */

struct lane_piece {
    int server;        /* index of the lane that serves it */
    uint32_t item;     /* of the caller's items */
    uint32_t position; /* within the request to that server */
    uint8_t *staged;   /* where its bytes are copied from; NULL: they land where they belong */
    uint8_t *into;
};

/* What is asked of local lanes, in steps: while we copy the bytes of one from the stage, servers read those after it, and
   what they bring is in the processors' caches still when it is copied. */
struct lane_steps {
    const struct lane_piece *pieces;
    const size_t *ends; /* of each step's pieces */
    size_t count;
    size_t ahead; /* so many are under way at most: the stage has no place for more */
    void (*finish)(void *context, size_t begin, size_t end); /* what was asked for with these pieces has come */
    void *context;
};

#define LANE_STAGE_STEP_BYTES (1u << 19)
#define LANE_STAGE_SLOT_BYTES (LANE_STAGE_STEP_BYTES + 4096) /* pieces do not lie close to each other */

/* What is asked of a stream for the items of a request: those that lie one after the other are one, and a long one has
   whole granules, which a server sends without a look at them. */
struct lane_span {
    uint32_t before; /* bytes in front of its items */
    uint32_t items;
};

struct lane_spans {
    struct lane_span *parts; /* one for each of what is sent, which is the head and the items that follow it here */
    struct lane_head head;
    struct lane_item items[];
};

/* Where the chunk of an item ends its `place` says. NULL: no memory. free() lets go of it. */
struct lane_spans *lane_stream_spans(const struct lane_head *request);
/* The answer of a stream to spans that were sent: into[i] gets the bytes of item i of the request, which may be
   LANE_READ_SUMS. 0, or -1 as `lane_exchange`. */
int lane_stream_take(int fd, const struct lane_spans *spans, const struct lane_head *request, uint8_t *const *into,
                     struct lane_part *parts, int64_t until_ns);
/* Who waits asks this now and then, and gives up if it is not 0: a signal has come, and its handler has raised. */
extern int (*lane_is_interrupted)(void);
#define LANE_LOOK_NS 100000000

struct lane_request {
    int fd;
    int is_stream;
    struct lane_head *head; /* and all items; NULL: nothing is asked of this lane */
    const void *grant; /* shown with the first of them */
    size_t grant_size; /* 0: none is */
    uint8_t **into; /* of a stream: where the bytes of each item go */
    struct lane_spans *spans; /* of a stream, while it is asked: what is sent instead of the head and its items */
    struct lane_part *parts; /* what comes of each item */
    uint32_t asked, answered; /* items */
    int pending; /* requests of which a part was sent, and that were not answered */
};

/* Nanoseconds for which this thread should look for an answer before it sleeps: `spin_ns`, or 0 if that was in vain of
   late. `lane_looked` tells whether it came meanwhile. */
int64_t lane_spin_ns(int64_t spin_ns);
void lane_looked(int has_come);

/* Ask all lanes. 0, or -1: a lane is lost, or says nothing in time, or a signal came. */
int lane_exchange(struct lane_request *requests, int count, const struct lane_steps *steps, int64_t spin_ns, int64_t until_ns);

#endif
