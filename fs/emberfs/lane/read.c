/* Reads of files that are open in this process: of chunks, from the table and checked, and of any file as it is. */

#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define STEPS_MAX 256

/* Read items that lie side by side in one chunk, and the rest of their granules, in steps; `parts` get what came of each.
   0; -1: not all of it is to be had, or right. */
static int read_run(const struct lane_found *found, const struct lane_item *items, uint8_t *const *into, size_t count,
                    uint8_t *scratch, uint64_t scratch_bytes, int flags, int wants_sums, struct lane_part *parts,
                    int *is_damaged) {
    const struct lane_item *last = &items[count - 1];
    uint64_t granule = 1ull << found->granule_log2;
    uint64_t begin = items->offset & ~(granule - 1), end = last->offset + (uint64_t)last->length;
    uint64_t stop = (end + granule - 1) & ~(granule - 1);
    if (stop > found->length) stop = found->length;
    uint64_t before = items->offset - begin, after = stop - end, done = 0;
    if (before > scratch_bytes || after > scratch_bytes) return -1;
    uint32_t crc = found->sum_before, crc_before = crc; /* when the item began */
    off_t offset = (off_t)(found->block + (int64_t)begin);
    for (size_t item = 0; item < count;) {
        struct iovec steps[STEPS_MAX];
        size_t ended[STEPS_MAX]; /* which item ends with a step; `count`: none */
        int used = 0;
        uint64_t size = 0, room = LANE_STEP_BYTES;
        if (item == 0 && done == 0 && before) {
            ended[used] = count;
            steps[used++] = (struct iovec){scratch, before};
        }
        while (item < count && room && used < STEPS_MAX - 1) {
            uint64_t left = items[item].length - done, step = left < room ? left : room;
            ended[used] = step == left ? item : count;
            steps[used++] = (struct iovec){into[item] + done, step};
            room -= step;
            done = step < left ? done + step : 0;
            if (!done) item++;
        }
        if (item == count && after) {
            ended[used] = count;
            steps[used++] = (struct iovec){scratch + scratch_bytes, after};
        }
        for (int at = 0; at < used; at++) size += steps[at].iov_len;
        if (preadv2(found->fd, steps, used, offset, flags) != (ssize_t)size) return -1;
        for (int at = 0; at < used; at++) {
            crc = lane_crc32c(crc, steps[at].iov_base, steps[at].iov_len);
            if (steps[at].iov_base == scratch) crc_before = crc;
            if (ended[at] == count) continue;
            size_t length = items[ended[at]].length;
            uint32_t own = wants_sums ? lane_crc32c_own(crc_before, crc, into[ended[at]], length) : 0;
            parts[ended[at]] = (struct lane_part){(int32_t)length, own};
            crc_before = crc;
        }
        offset += (off_t)size;
    }
    if (crc == found[count - 1].sum_after) return 0;
    *is_damaged = 1;
    return -1;
}

int lane_goes_on(const struct lane_found *found, const struct lane_item *item) {
    return found[0].file != NULL && found[1].file == found[0].file && found[1].slot == found[0].slot &&
           found[1].generation == found[0].generation && found[1].block == found[0].block &&
           item[1].offset == item[0].offset + (uint64_t)item[0].length;
}

void lane_read_items(const struct lane_found *found, const struct lane_item *items, uint8_t *const *into, size_t count,
                     uint8_t *scratch, uint64_t scratch_bytes, int flags, int wants_sums, struct lane_part *parts,
                     int *is_damaged) {
    if (found->file != NULL && count > 1) {
        int is_some_damaged = 0; /* Which one is, is found out below. */
        if (read_run(found, items, into, count, scratch, scratch_bytes, flags, wants_sums, parts, &is_some_damaged) == 0)
            return;
    }
    for (size_t at = 0; at < count; at++) {
        int has_come = found[at].file != NULL && read_run(&found[at], &items[at], &into[at], 1, scratch, scratch_bytes, flags,
                                                          wants_sums, &parts[at], is_damaged) == 0;
        if (!has_come) parts[at] = (struct lane_part){LANE_DECLINED, 0};
    }
}

int lane_read_here(struct lane_table *table, const struct lane_item *items, size_t count, uint8_t *const *into,
                   int wants_sums, struct lane_part *parts) {
    struct lane_found *found = malloc(count * sizeof *found + 1);
    uint8_t *scratch = NULL;
    uint64_t scratch_bytes = 1;
    int is_damaged = 0; /* Whoever reads it again finds out, too. */
    if (found == NULL) return -1;
    lane_table_find(table, items, count, found);
    for (size_t at = 0; at < count; at++)
        if (found[at].file != NULL && 1ull << found[at].granule_log2 > scratch_bytes)
            scratch_bytes = 1ull << found[at].granule_log2;
    if (scratch_bytes <= LANE_SCRATCH_BYTES) scratch = malloc(2 * scratch_bytes);
    for (size_t at = 0, run; at < count; at += run) {
        parts[at] = (struct lane_part){LANE_DECLINED, 0};
        for (run = 1; scratch != NULL && at + run < count && lane_goes_on(&found[at + run - 1], &items[at + run - 1]);) run++;
        if (scratch != NULL)
            lane_read_items(&found[at], &items[at], &into[at], run, scratch, scratch_bytes, 0, wants_sums, &parts[at],
                            &is_damaged);
    }
    lane_table_finish(table, items, count, found, parts);
    free(scratch);
    free(found);
    return 0;
}

size_t lane_read_files(const int32_t *fds, const int64_t *offsets, const int64_t *lengths, size_t count, uint8_t *into,
                       int *error) {
    *error = 0;
    for (size_t at = 0; at < count; at++) {
        for (int64_t done = 0; done < lengths[at];) {
            ssize_t came = pread(fds[at], into + done, (size_t)(lengths[at] - done), (off_t)(offsets[at] + done));
            int why = errno; /* Handlers of signals may change it. */
            if (came < 0 && why == EINTR && !lane_is_interrupted()) continue;
            if (came < 0) *error = why;
            if (came <= 0) return at;
            done += came;
        }
        into += lengths[at];
    }
    return count;
}
