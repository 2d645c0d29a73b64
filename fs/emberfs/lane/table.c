/* Where the committed bytes of chunks lie. The service puts an entry after it has read a chunk, and drops it before it
   changes anything about it.

   What is found is used without a lock; `lane_table_finish` says afterwards whether it was still there. Until an entry is
   dropped nobody reuses its block, so bytes that were read before an end that succeeds are those of the entry.

   Invariants: one entry per chunk at most. A slot's generation grows with each entry that leaves it. Over `bytes_max`
   the entry that was put first goes first. A file is open, by a descriptor of our own, as long as an entry or a
   read refers to it; so nobody ever waits for a read, however long its disk takes. */

#include "lane.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NONE UINT32_MAX
#define CHAINS_MAX 4096

struct entry {
    uint64_t inode, index, generation;
    int64_t block;
    uint32_t *sums;
    uint32_t chain, sums_count, length, granule_log2;
    struct lane_file *file; /* NULL: the slot is free */
    uint32_t next;          /* of the same bucket, or of the free slots */
    uint32_t older, newer;  /* in the order they were put */
};

struct lane_file {
    uint32_t chain;
    int theirs, ours; /* the descriptor of who put it, and our own of the same file */
    size_t uses;      /* entries and reads that refer to it */
    int is_listed;    /* entries that come may refer to it, too */
    struct lane_file *previous, *next;
};

struct chain {
    uint32_t id;
    uint64_t version;
};

struct lane_table {
    pthread_mutex_t lock;
    struct lane_file *files;
    struct entry *entries;
    uint32_t *buckets;
    uint32_t capacity, buckets_mask, count, free, oldest, newest;
    size_t bytes, bytes_max;
    struct chain chains[CHAINS_MAX];
    uint32_t chains_count;
    int64_t lease_until_ns;
};

int64_t lane_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static uint32_t bucket_of(const struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index) {
    uint64_t mixed = (inode * 0x9e3779b97f4a7c15ull ^ index) * 0xbf58476d1ce4e5b9ull + chain;
    return (uint32_t)((mixed ^ mixed >> 29) * 0x94d049bb133111ebull >> 32) & table->buckets_mask;
}

struct lane_table *lane_table_new(size_t bytes_max) {
    struct lane_table *table = calloc(1, sizeof *table);
    if (table == NULL) return NULL;
    pthread_mutex_init(&table->lock, NULL);
    table->bytes_max = bytes_max;
    table->free = table->oldest = table->newest = NONE;
    table->lease_until_ns = INT64_MIN;
    return table;
}

void lane_table_free(struct lane_table *table) {
    for (uint32_t slot = 0; slot < table->capacity; slot++)
        if (table->entries[slot].file != NULL) free(table->entries[slot].sums);
    for (struct lane_file *file = table->files, *next; file != NULL; file = next) {
        next = file->next;
        close(file->ours);
        free(file);
    }
    free(table->entries);
    free(table->buckets);
    free(table);
}

/* A use of a listed file; NULL if there is no memory or no descriptor. */
static struct lane_file *use_file(struct lane_table *table, uint32_t chain, int theirs) {
    struct lane_file *file = table->files;
    while (file != NULL && !(file->is_listed && file->chain == chain && file->theirs == theirs)) file = file->next;
    if (file == NULL) {
        file = calloc(1, sizeof *file);
        int ours = file != NULL ? fcntl(theirs, F_DUPFD_CLOEXEC, 3) : -1;
        if (ours < 0) {
            free(file);
            return NULL;
        }
        *file = (struct lane_file){.chain = chain, .theirs = theirs, .ours = ours, .is_listed = 1, .next = table->files};
        if (file->next != NULL) file->next->previous = file;
        table->files = file;
    }
    file->uses++;
    return file;
}

static void let_go(struct lane_table *table, struct lane_file *file) {
    if (--file->uses) return;
    if (file->previous != NULL) file->previous->next = file->next;
    else table->files = file->next;
    if (file->next != NULL) file->next->previous = file->previous;
    close(file->ours);
    free(file);
}

static struct chain *chain_of(struct lane_table *table, uint32_t id) {
    for (uint32_t at = 0; at < table->chains_count; at++)
        if (table->chains[at].id == id) return &table->chains[at];
    return NULL;
}

void lane_table_allow(struct lane_table *table, uint32_t id, uint64_t version) {
    pthread_mutex_lock(&table->lock);
    struct chain *chain = chain_of(table, id);
    if (chain == NULL && version && table->chains_count < CHAINS_MAX) {
        chain = &table->chains[table->chains_count++];
        chain->id = id;
    }
    if (chain != NULL) chain->version = version;
    pthread_mutex_unlock(&table->lock);
}

void lane_table_lease(struct lane_table *table, int64_t until_ns) {
    pthread_mutex_lock(&table->lock);
    table->lease_until_ns = until_ns;
    pthread_mutex_unlock(&table->lock);
}

static struct entry *find(struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index) {
    if (table->capacity == 0) return NULL;
    uint32_t slot = table->buckets[bucket_of(table, chain, inode, index)];
    while (slot != NONE) {
        struct entry *entry = &table->entries[slot];
        if (entry->index == index && entry->inode == inode && entry->chain == chain) return entry;
        slot = entry->next;
    }
    return NULL;
}

static size_t weight_of(uint32_t sums_count) { return sizeof(struct entry) + 2 * sizeof(uint32_t) + 4 * (size_t)sums_count; }

static void remove_entry(struct lane_table *table, struct entry *entry) {
    uint32_t slot = (uint32_t)(entry - table->entries);
    uint32_t *link = &table->buckets[bucket_of(table, entry->chain, entry->inode, entry->index)];
    while (*link != slot) link = &table->entries[*link].next;
    *link = entry->next;
    if (entry->older != NONE) table->entries[entry->older].newer = entry->newer;
    else table->oldest = entry->newer;
    if (entry->newer != NONE) table->entries[entry->newer].older = entry->older;
    else table->newest = entry->older;
    table->bytes -= weight_of(entry->sums_count);
    table->count--;
    free(entry->sums);
    entry->sums = NULL;
    let_go(table, entry->file);
    entry->file = NULL;
    entry->generation++;
    entry->next = table->free;
    table->free = slot;
}

static int grow(struct lane_table *table) {
    uint32_t capacity = table->capacity ? 2 * table->capacity : 1024;
    struct entry *entries = realloc(table->entries, capacity * sizeof *entries);
    if (entries == NULL) return -1;
    table->entries = entries;
    uint32_t *buckets = malloc(2 * capacity * sizeof *buckets);
    if (buckets == NULL) return -1;
    memset(buckets, 0xff, 2 * capacity * sizeof *buckets);
    free(table->buckets);
    table->buckets = buckets;
    table->buckets_mask = 2 * capacity - 1;
    for (uint32_t slot = 0; slot < table->capacity; slot++) {
        struct entry *entry = &entries[slot];
        uint32_t *bucket = &buckets[bucket_of(table, entry->chain, entry->inode, entry->index)];
        entry->next = *bucket; /* It is called when no slot is free. */
        *bucket = slot;
    }
    for (uint32_t slot = capacity; slot-- > table->capacity;) {
        memset(&entries[slot], 0, sizeof entries[slot]);
        entries[slot].next = table->free;
        table->free = slot;
    }
    table->capacity = capacity;
    return 0;
}

void lane_table_put(struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index, int fd, int64_t block,
                   uint32_t length, uint32_t granule_log2, const uint32_t *sums, uint32_t sums_count) {
    uint32_t *copy = malloc(4 * (size_t)sums_count + 4);
    if (copy == NULL) return;
    memcpy(copy, sums, 4 * (size_t)sums_count);
    pthread_mutex_lock(&table->lock);
    struct lane_file *file = use_file(table, chain, fd);
    struct entry *entry = find(table, chain, inode, index);
    if (entry != NULL) remove_entry(table, entry);
    while (table->oldest != NONE && table->bytes + weight_of(sums_count) > table->bytes_max)
        remove_entry(table, &table->entries[table->oldest]);
    if (file == NULL || (table->free == NONE && grow(table) != 0)) {
        if (file != NULL) let_go(table, file);
        pthread_mutex_unlock(&table->lock);
        free(copy);
        return;
    }
    uint32_t slot = table->free;
    entry = &table->entries[slot];
    table->free = entry->next;
    *entry = (struct entry){.inode = inode, .index = index, .generation = entry->generation, .block = block,
                            .sums = copy, .chain = chain, .sums_count = sums_count, .length = length,
                            .granule_log2 = granule_log2, .file = file, .older = table->newest, .newer = NONE};
    uint32_t *bucket = &table->buckets[bucket_of(table, chain, inode, index)];
    entry->next = *bucket;
    *bucket = slot;
    if (table->newest != NONE) table->entries[table->newest].newer = slot;
    else table->oldest = slot;
    table->newest = slot;
    table->bytes += weight_of(sums_count);
    table->count++;
    pthread_mutex_unlock(&table->lock);
}

void lane_table_drop(struct lane_table *table, uint32_t chain, uint64_t inode, uint64_t index) {
    pthread_mutex_lock(&table->lock);
    struct entry *entry = find(table, chain, inode, index);
    if (entry != NULL) remove_entry(table, entry);
    pthread_mutex_unlock(&table->lock);
}

void lane_table_clear(struct lane_table *table, uint32_t chain) {
    pthread_mutex_lock(&table->lock);
    for (uint32_t slot = 0; slot < table->capacity; slot++)
        if (table->entries[slot].file != NULL && table->entries[slot].chain == chain)
            remove_entry(table, &table->entries[slot]);
    for (struct lane_file *file = table->files; file != NULL; file = file->next)
        if (file->chain == chain) file->is_listed = 0; /* Another file may have their number tomorrow. */
    pthread_mutex_unlock(&table->lock);
}

size_t lane_table_count(struct lane_table *table) {
    pthread_mutex_lock(&table->lock);
    size_t count = table->count;
    pthread_mutex_unlock(&table->lock);
    return count;
}

static int may_serve(struct lane_table *table, const struct lane_item *item, struct chain **last) {
    if (*last == NULL || (*last)->id != item->chain) *last = chain_of(table, item->chain);
    return *last != NULL && (*last)->version == item->chain_version && item->chain_version != 0;
}

void lane_table_find(struct lane_table *table, const struct lane_item *items, size_t count, struct lane_found *found) {
    struct chain *last = NULL;
    int64_t now_ns = lane_now_ns();
    pthread_mutex_lock(&table->lock);
    int is_leased = now_ns < table->lease_until_ns;
    for (size_t at = 0; at < count; at++) {
        const struct lane_item *item = &items[at];
        found[at].file = NULL;
        if (!is_leased || !may_serve(table, item, &last)) continue;
        struct entry *entry = find(table, item->chain, item->inode, item->index);
        if (entry == NULL || item->length == 0 || item->length > entry->length ||
            item->offset > entry->length - item->length)
            continue;
        uint32_t first = item->offset >> entry->granule_log2;
        uint32_t final = (item->offset + item->length - 1) >> entry->granule_log2;
        if (final >= entry->sums_count) continue;
        entry->file->uses++;
        found[at] = (struct lane_found){.file = entry->file, .fd = entry->file->ours, .block = entry->block, .length = entry->length,
                                        .granule_log2 = entry->granule_log2,
                                        .sum_before = first ? entry->sums[first - 1] : 0,
                                        .sum_after = entry->sums[final],
                                        .slot = (uint32_t)(entry - table->entries), .generation = entry->generation};
    }
    pthread_mutex_unlock(&table->lock);
}

void lane_table_finish(struct lane_table *table, const struct lane_item *items, size_t count,
                       const struct lane_found *found, struct lane_part *parts) {
    struct chain *last = NULL;
    pthread_mutex_lock(&table->lock);
    int is_leased = lane_now_ns() < table->lease_until_ns;
    for (size_t at = 0; at < count; at++) {
        if (found[at].file == NULL) continue;
        const struct entry *entry = &table->entries[found[at].slot];
        if (!is_leased || !may_serve(table, &items[at], &last) || entry->generation != found[at].generation)
            parts[at] = (struct lane_part){LANE_DECLINED, 0};
        let_go(table, found[at].file);
    }
    pthread_mutex_unlock(&table->lock);
}
