/* Both ends of a stream: a lane over TCP, to a client of another machine.

   The server promises what it finds in the table and in the page cache, sends it, and says at last whether it was still
   there. It checks only what the client cannot: of an item that covers whole granules the client gets the stored sums and
   checks the bytes itself, which finds damage of the disk and of the way together.

   So a client asks for whole granules where it wants much, and lets go of what it did not want: those bytes cost less
   than the server's look at all of them, and a file is sent without passing through anybody's memory. */

#include "lane.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define SENDFILE_BYTES_MIN (64u << 10) /* below, to copy costs less than a system call of its own */
#define DIRECT_BYTES_MIN (32u << 10)
#define SPIN_NS 50000
#define GRANULE_BYTES (4u << 10) /* what a checksum covers, mostly */
#define SPAN_BYTES_MAX (2u << 20) /* items are one up to so much: where a byte of it is not to be had, all of it is not */

#define PATIENCE_MS 30000 /* a client that takes nothing for so long is gone */

struct stream {
    struct lane_table *table;
    int fd;
    uint8_t *packet, *out, *scratch;
    size_t out_bytes;
    struct lane_found found[LANE_ITEMS_MAX];
    struct lane_part promises[LANE_ITEMS_MAX], verdicts[LANE_ITEMS_MAX];
};

/* ---- the server */

static int wait_for(int fd, short events, int timeout_ms) {
    struct pollfd wait = {.fd = fd, .events = events};
    int ready;
    do ready = poll(&wait, 1, timeout_ms);
    while (ready < 0 && errno == EINTR);
    return ready > 0 ? 0 : -1;
}

static int receive_all(int fd, void *into, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t count = recv(fd, (uint8_t *)into + done, size - done, 0);
        if (count < 0 && errno == EAGAIN && wait_for(fd, POLLIN, -1) == 0) continue;
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return -1;
        done += (size_t)count;
    }
    return 0;
}

static int flush(struct stream *stream) {
    for (size_t done = 0; done < stream->out_bytes;) {
        ssize_t count = send(stream->fd, stream->out + done, stream->out_bytes - done, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN && wait_for(stream->fd, POLLOUT, PATIENCE_MS) == 0) continue;
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return -1;
        done += (size_t)count;
    }
    stream->out_bytes = 0;
    return 0;
}

static int put(struct stream *stream, const void *from, size_t size) {
    for (size_t done = 0; done < size;) {
        if (stream->out_bytes == LANE_STEP_BYTES && flush(stream) != 0) return -1;
        size_t room = LANE_STEP_BYTES - stream->out_bytes, step = size - done < room ? size - done : room;
        memcpy(stream->out + stream->out_bytes, (const uint8_t *)from + done, step);
        stream->out_bytes += step;
        done += step;
    }
    return 0;
}

/* All of it seems to be in the page cache: what is not is declined before it is promised, since the service reads many
   such items side by side. */
static int is_warm(const struct lane_item *item, const struct lane_found *found) {
    for (uint64_t at = 0; at < item->length; at += LANE_STEP_BYTES) {
        uint64_t last = at + LANE_STEP_BYTES < item->length ? at + LANE_STEP_BYTES : item->length;
        uint8_t byte;
        struct iovec part = {&byte, 1};
        off_t begin = (off_t)(found->block + (int64_t)(item->offset + at));
        off_t end = (off_t)(found->block + (int64_t)(item->offset + last - 1));
        if (preadv2(found->fd, &part, 1, begin, RWF_NOWAIT) != 1) return 0;
        if (preadv2(found->fd, &part, 1, end, RWF_NOWAIT) != 1) return 0;
    }
    return 1;
}

/* Read all of [offset, offset + size) of the chunk, or declare it declined and make zeros of it. */
static void read_step(const struct lane_found *found, uint8_t *into, size_t size, uint64_t offset,
                      struct lane_part *verdict) {
    size_t done = 0;
    while (done < size) {
        ssize_t count = pread(found->fd, into + done, size - done, (off_t)(found->block + (int64_t)(offset + done)));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) break;
        done += (size_t)count;
    }
    if (done == size) return;
    memset(into + done, 0, size - done); /* What was promised has to be sent. */
    verdict->count = LANE_DECLINED;
}

/* How much of the item has left, without a copy through our memory; -1: the stream is over. */
static ssize_t send_from_file(struct stream *stream, const struct lane_item *item, const struct lane_found *found) {
    size_t done = 0;
    if (flush(stream) != 0) return -1;
    while (done < item->length) {
        off_t offset = (off_t)(found->block + (int64_t)(item->offset + done));
        ssize_t count = sendfile(stream->fd, found->fd, &offset, item->length - done);
        int error = errno;
        if (count > 0) done += (size_t)count;
        else if (count < 0 && error == EAGAIN) {
            if (wait_for(stream->fd, POLLOUT, PATIENCE_MS) != 0) return -1;
        } else if (count < 0 && (error == EPIPE || error == ECONNRESET)) return -1;
        else if (count == 0 || error != EINTR) break;
    }
    return (ssize_t)done;
}

/* Send an item that covers whole granules as it is; the client checks it. 0; -1: the stream is over. */
static int send_whole(struct stream *stream, const struct lane_item *item, const struct lane_found *found,
                      struct lane_part *verdict) {
    size_t done = 0;
    *verdict = (struct lane_part){(int32_t)item->length, found->sum_after};
    if (item->length >= SENDFILE_BYTES_MIN) {
        ssize_t sent = send_from_file(stream, item, found);
        if (sent < 0) return -1;
        done = (size_t)sent;
    }
    while (done < item->length) {
        if (stream->out_bytes == LANE_STEP_BYTES && flush(stream) != 0) return -1;
        size_t room = LANE_STEP_BYTES - stream->out_bytes, step = item->length - done < room ? item->length - done : room;
        read_step(found, stream->out + stream->out_bytes, step, item->offset + done, verdict);
        stream->out_bytes += step;
        done += step;
    }
    return 0;
}

/* Check the granules of an item and send the part that is wanted. 0; -1: the stream is over. */
static int send_part(struct stream *stream, const struct lane_item *item, const struct lane_found *found,
                     struct lane_part *verdict) {
    uint64_t granule = 1ull << found->granule_log2;
    uint64_t begin = item->offset & ~(granule - 1), end = item->offset + (uint64_t)item->length;
    uint64_t stop = (end + granule - 1) & ~(granule - 1);
    if (stop > found->length) stop = found->length;
    uint32_t crc = found->sum_before, own = 0;
    *verdict = (struct lane_part){(int32_t)item->length, 0};
    for (uint64_t at = begin; at < stop;) {
        size_t step = stop - at < LANE_SCRATCH_BYTES ? stop - at : LANE_SCRATCH_BYTES;
        read_step(found, stream->scratch, step, at, verdict);
        crc = lane_crc32c(crc, stream->scratch, step);
        uint64_t from = at < item->offset ? item->offset : at, to = at + step < end ? at + step : end;
        if (from < to) {
            own = lane_crc32c(own, stream->scratch + (from - at), to - from);
            if (put(stream, stream->scratch + (from - at), to - from) != 0) return -1;
        }
        at += step;
    }
    verdict->crc = own;
    if (crc != found->sum_after) verdict->count = LANE_DECLINED;
    return 0;
}

static int is_whole(const struct lane_item *item, const struct lane_found *found) {
    uint32_t mask = (1u << found->granule_log2) - 1, end = item->offset + item->length;
    return !(item->offset & mask) && (!(end & mask) || end == found->length);
}

/* Send what was promised, and find out what came of it. 0; -1: the stream is over. */
static int send_items(struct stream *stream, const struct lane_head *head, const struct lane_item *items) {
    struct lane_head answer = {LANE_MAGIC, LANE_COUNTS, head->count, head->call};
    if (put(stream, &answer, sizeof answer) != 0 ||
        put(stream, stream->promises, head->count * sizeof(struct lane_part)) != 0)
        return -1;
    for (int at = 0; at < head->count; at++) {
        const struct lane_found *found = &stream->found[at];
        if (stream->promises[at].count == 0) continue;
        int failed = is_whole(&items[at], found) ? send_whole(stream, &items[at], found, &stream->verdicts[at])
                                                 : send_part(stream, &items[at], found, &stream->verdicts[at]);
        if (failed) return -1;
    }
    return 0;
}

static int serve_request(struct stream *stream, const struct lane_head *head, const struct lane_item *items) {
    uint64_t total = 0;
    for (int at = 0; at < head->count; at++) total += items[at].length;
    if (total > LANE_BYTES_MAX) return -1;
    lane_table_find(stream->table, items, head->count, stream->found);
    for (int at = 0; at < head->count; at++) {
        const struct lane_found *found = &stream->found[at];
        int is_promised = found->file != NULL && is_warm(&items[at], found);
        uint32_t crc = is_promised && is_whole(&items[at], found) ? found->sum_before : 0;
        stream->promises[at] = (struct lane_part){is_promised ? (int32_t)items[at].length : 0, crc};
        stream->verdicts[at] = (struct lane_part){LANE_DECLINED, 0};
    }
    int failed = send_items(stream, head, items);
    lane_table_finish(stream->table, items, head->count, stream->found, stream->verdicts);
    if (failed) return -1;
    if (put(stream, stream->verdicts, head->count * sizeof(struct lane_part)) != 0) return -1;
    return flush(stream);
}

void lane_stream_serve(struct lane_table *table, int fd, struct lane_stats *stats) {
    struct stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL) return;
    stream->table = table;
    stream->fd = fd;
    stream->packet = aligned_alloc(64, (LANE_PACKET_BYTES_MAX + 63) / 64 * 64);
    stream->out = aligned_alloc(4096, LANE_STEP_BYTES);
    stream->scratch = aligned_alloc(4096, LANE_SCRATCH_BYTES);
    while (stream->packet != NULL && stream->out != NULL && stream->scratch != NULL) {
        struct lane_head *head = (struct lane_head *)stream->packet;
        struct lane_item *items = (struct lane_item *)(head + 1);
        if (receive_all(fd, head, sizeof *head) != 0 || head->magic != LANE_MAGIC || head->kind != LANE_READ ||
            head->count > LANE_ITEMS_MAX || receive_all(fd, items, head->count * sizeof *items) != 0)
            break;
        if (serve_request(stream, head, items) != 0) break;
        lane_count(stats, stream->verdicts, head->count);
    }
    free(stream->packet);
    free(stream->out);
    free(stream->scratch);
    free(stream);
}

/* ---- the client */

/* Also of as long a chunk: a file that grew may be open as it was before, and as it is. */
static int goes_on(const struct lane_item *span, const struct lane_item *item) {
    return span->place == item->place && span->inode == item->inode && span->index == item->index && span->chain == item->chain &&
           span->chain_version == item->chain_version && span->grant == item->grant &&
           span->offset + span->length == item->offset && span->length + item->length <= SPAN_BYTES_MAX;
}

/* Whole granules around what is wanted, as far as the chunk goes, if it is much: the server sends those as they are. */
static void widen(struct lane_item *item, struct lane_span *span) {
    uint64_t limit = item->place, end = ((uint64_t)item->offset + item->length + GRANULE_BYTES - 1) & ~(uint64_t)(GRANULE_BYTES - 1);
    item->place = 0;
    if (item->length < SENDFILE_BYTES_MIN) return;
    if (end > limit) end = limit;
    span->before = item->offset & (GRANULE_BYTES - 1);
    item->offset -= span->before;
    item->length = (uint32_t)(end - item->offset);
}

struct lane_spans *lane_stream_spans(const struct lane_head *request) {
    const struct lane_item *items = (const struct lane_item *)(request + 1);
    struct lane_spans *spans = malloc(sizeof *spans + request->count * (sizeof(struct lane_item) + sizeof(struct lane_span)));
    if (spans == NULL) return NULL;
    struct lane_span *parts = (struct lane_span *)(spans->items + request->count);
    size_t count = 0, total = 0;
    for (int at = 0; at < request->count; at++) {
        total += items[at].length;
        if (count && goes_on(&spans->items[count - 1], &items[at])) {
            spans->items[count - 1].length += items[at].length;
            parts[count - 1].items++;
        } else {
            spans->items[count] = items[at];
            parts[count++] = (struct lane_span){.items = 1};
        }
    }
    int has_room = total + count * 2 * GRANULE_BYTES <= LANE_BYTES_MAX;
    for (size_t at = 0; at < count; at++) {
        if (has_room) widen(&spans->items[at], &parts[at]);
        else spans->items[at].place = 0;
    }
    spans->parts = parts;
    spans->head = (struct lane_head){LANE_MAGIC, LANE_READ, (uint16_t)count, request->call};
    return spans;
}

struct incoming {
    int fd;
    int64_t until_ns;
    size_t begin, end; /* of what was received and not yet used */
    uint8_t bytes[LANE_STEP_BYTES];
};

static ssize_t receive_some(struct incoming *incoming, void *into, size_t size) {
    int64_t began_ns = 0, spin_ns = 0;
    int has_slept = 0;
    for (;;) {
        ssize_t count = recv(incoming->fd, into, size, MSG_DONTWAIT);
        if (count > 0) {
            if (spin_ns) lane_looked(!has_slept);
            return count;
        }
        if (count == 0 || (errno != EAGAIN && errno != EINTR)) return -1;
        int64_t now_ns = lane_now_ns(), left_ns = incoming->until_ns - now_ns;
        if (left_ns <= 0) return -1;
        if (left_ns > LANE_LOOK_NS) left_ns = LANE_LOOK_NS;
        if (!began_ns) {
            began_ns = now_ns;
            spin_ns = lane_spin_ns(SPIN_NS);
        }
        if (now_ns - began_ns < spin_ns) {
            sched_yield();
            continue;
        }
        has_slept = 1;
        struct pollfd wait = {.fd = incoming->fd, .events = POLLIN};
        struct timespec rest = {left_ns / 1000000000, left_ns % 1000000000};
        int ready = ppoll(&wait, 1, &rest, NULL);
        if ((ready < 0 && errno != EINTR) || (ready <= 0 && lane_is_interrupted())) return -1;
    }
}

/* Fill `into`, and continue `crc` over what comes, while it is in the cache. */
static int take(struct incoming *incoming, uint8_t *into, size_t size, uint32_t *crc) {
    while (size) {
        ssize_t count;
        if (incoming->begin == incoming->end && size >= DIRECT_BYTES_MIN) {
            count = receive_some(incoming, into, size < LANE_STEP_BYTES ? size : LANE_STEP_BYTES);
            if (count < 0) return -1;
        } else {
            if (incoming->begin == incoming->end) {
                count = receive_some(incoming, incoming->bytes, sizeof incoming->bytes);
                if (count < 0) return -1;
                incoming->begin = 0;
                incoming->end = (size_t)count;
            }
            size_t there = incoming->end - incoming->begin;
            count = (ssize_t)(size < there ? size : there);
            memcpy(into, incoming->bytes + incoming->begin, (size_t)count);
            incoming->begin += (size_t)count;
        }
        if (crc != NULL) *crc = lane_crc32c(*crc, into, (size_t)count);
        into += count;
        size -= (size_t)count;
    }
    return 0;
}

/* Bytes that nobody wants, but that the checksum covers. */
static int pass(struct incoming *incoming, size_t size, uint32_t *crc) {
    uint8_t bytes[GRANULE_BYTES];
    assert(size <= sizeof bytes);
    return take(incoming, bytes, size, crc);
}

/* The items of a span, and what is around them; `parts` get the CRC of each if somebody `wants_sums`. */
static int take_span(struct incoming *incoming, const struct lane_item *span, const struct lane_span *part,
                     const struct lane_item *items, uint8_t *const *into, int wants_sums, struct lane_part *parts,
                     uint32_t *crc) {
    size_t left = span->length - part->before;
    for (uint32_t at = 0; at < part->items; at++) {
        if (items[at].length > left) return -1;
        left -= items[at].length;
    }
    if (left > GRANULE_BYTES || pass(incoming, part->before, crc) != 0) return -1;
    for (uint32_t at = 0; at < part->items; at++) {
        uint32_t crc_before = *crc;
        if (take(incoming, into[at], items[at].length, crc) != 0) return -1;
        if (wants_sums) parts[at].crc = lane_crc32c_own(crc_before, *crc, into[at], items[at].length);
    }
    return pass(incoming, left, crc);
}

static int take_answer(struct incoming *incoming, const struct lane_spans *spans, const struct lane_item *items,
                       uint8_t *const *into, int wants_sums, struct lane_part *parts, struct lane_part *promises,
                       struct lane_part *verdicts) {
    size_t parts_bytes = spans->head.count * sizeof *promises;
    struct lane_head head;
    if (take(incoming, (uint8_t *)&head, sizeof head, NULL) != 0 || head.magic != LANE_MAGIC ||
        head.kind != LANE_COUNTS || head.count != spans->head.count || head.call != spans->head.call ||
        take(incoming, (uint8_t *)promises, parts_bytes, NULL) != 0)
        return -1;
    for (uint32_t at = 0, item = 0; at < head.count; item += spans->parts[at++].items) {
        if (promises[at].count != 0 && promises[at].count != (int32_t)spans->items[at].length) return -1;
        if (promises[at].count && take_span(incoming, &spans->items[at], &spans->parts[at], &items[item], &into[item],
                                            wants_sums, &parts[item], &promises[at].crc) != 0)
            return -1;
    }
    if (take(incoming, (uint8_t *)verdicts, parts_bytes, NULL) != 0) return -1;
    for (uint32_t at = 0, item = 0; at < head.count; at++) {
        int is_right = promises[at].count && verdicts[at].count == promises[at].count && verdicts[at].crc == promises[at].crc;
        for (uint32_t end = item + spans->parts[at].items; item < end; item++)
            parts[item].count = is_right ? (int32_t)items[item].length : LANE_DECLINED;
    }
    return incoming->begin == incoming->end ? 0 : -1;
}

int lane_stream_take(int fd, const struct lane_spans *spans, const struct lane_head *request, uint8_t *const *into,
                     struct lane_part *parts, int64_t until_ns) {
    struct incoming *incoming = malloc(sizeof *incoming);
    struct lane_part *told = malloc(2 * spans->head.count * sizeof *told);
    const struct lane_item *items = (const struct lane_item *)(request + 1);
    int outcome = -1;
    if (incoming != NULL && told != NULL) {
        incoming->fd = fd;
        incoming->until_ns = until_ns;
        incoming->begin = incoming->end = 0;
        outcome = take_answer(incoming, spans, items, into, request->kind == LANE_READ_SUMS, parts, told,
                              told + spans->head.count);
    }
    free(incoming);
    free(told);
    return outcome;
}
