/* Reads of files that are open in this process: of chunks, from the table and checked, and of any file as it is. */

#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

int32_t lane_read_item(const struct lane_found *found, const struct lane_item *item, uint8_t *into, uint8_t *scratch,
                       uint64_t scratch_bytes, int flags, int *is_damaged) {
    if (found->file == NULL) return LANE_DECLINED;
    uint64_t granule = 1ull << found->granule_log2;
    uint64_t begin = item->offset & ~(granule - 1), end = item->offset + (uint64_t)item->length;
    uint64_t stop = (end + granule - 1) & ~(granule - 1);
    if (stop > found->length) stop = found->length;
    uint64_t before = item->offset - begin, after = stop - end;
    if (before > scratch_bytes || after > scratch_bytes) return LANE_DECLINED;
    uint32_t crc = found->sum_before;
    /* The granules in steps; what lies before and after the item's own bytes goes to scratch memory. */
    for (uint64_t at = 0; at < item->length;) {
        uint64_t step = item->length - at < LANE_STEP_BYTES ? item->length - at : LANE_STEP_BYTES;
        uint64_t lead = at == 0 ? before : 0, trail = at + step == item->length ? after : 0;
        struct iovec parts[3];
        int count = 0;
        if (lead) parts[count++] = (struct iovec){scratch, lead};
        parts[count++] = (struct iovec){into + at, step};
        if (trail) parts[count++] = (struct iovec){scratch + scratch_bytes, trail};
        off_t offset = (off_t)(found->block + (int64_t)(begin + (at ? before + at : 0)));
        if (preadv2(found->fd, parts, count, offset, flags) != (ssize_t)(lead + step + trail)) return LANE_DECLINED;
        for (int part = 0; part < count; part++) crc = lane_crc32c(crc, parts[part].iov_base, parts[part].iov_len);
        at += step;
    }
    if (crc == found->sum_after) return (int32_t)item->length;
    *is_damaged = 1;
    return LANE_DECLINED;
}

int lane_read_here(struct lane_table *table, const struct lane_item *items, size_t count, uint8_t *const *into,
                   int32_t *counts) {
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
    for (size_t at = 0; at < count; at++)
        counts[at] = scratch == NULL ? LANE_DECLINED
                                     : lane_read_item(&found[at], &items[at], into[at], scratch, scratch_bytes, 0, &is_damaged);
    lane_table_finish(table, items, count, found, counts);
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
