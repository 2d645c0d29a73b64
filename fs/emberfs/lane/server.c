/* The server's end of lanes: a few threads that answer reads of local lanes without the interpreter, and one thread
   for each stream (stream.c).

   A read of a local lane is served if its chunk is in the table and its bytes are in the page cache (RWF_NOWAIT); every other item is
   declined, and its client asks the service. Bytes are read into the client's memory and checked there against the
   cumulative checksums; a mismatch is declined too: the service finds out what is the matter.

   A client cannot harm us: its memory may not become smaller (F_SEAL_SHRINK) nor be of huge pages (which can be taken
   away), every place is checked against it, how much of it is mapped is bounded, and a packet that breaks the rules
   ends its lane. Does not know: which chunks there are, or who may read. */

#include "lane.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define THREADS_MAX 16
#define LANES_MAX 4096
#define STREAMS_MAX 512
#define STREAM_STACK_BYTES (256u << 10)
#define EAGER_MAX 8
#define DESCRIPTORS_MAX 4 /* in one packet, that there is room for: the kernel keeps the rest, and says so */
#define TMPFS 0x01021994
#define LANE_MAPPED_MAX (1ull << 40)   /* address space of one lane's client */
#define SERVER_MAPPED_MAX (1ull << 44) /* of all: an eighth of what a process has */
#define STOP_WAIT_S 5

struct region {
    uint64_t number;
    uint8_t *address;
    uint64_t size;
};

struct lane {
    int fd;
    struct region *regions;
    uint32_t regions_count, last;
    uint64_t mapped;
    char *tenant; /* NULL: it may read everything */
    struct lane_grant *grants[LANE_GRANTS_MAX];
    uint32_t keys_version; /* that they were checked with */
    struct lane *previous, *next; /* of the same thread */
};

struct worker {
    struct lane_server *server;
    pthread_t thread;
    int epoll;
    struct lane *lanes; /* guarded by the server's lock */
    uint8_t *packet, *scratch;
    struct lane_found *found;
    uint8_t *into[LANE_ITEMS_MAX]; /* where the items of a read go */
    struct {
        struct lane_head head;
        struct lane_part parts[LANE_ITEMS_MAX];
    } reply;
};

struct stream_thread {
    struct lane_server *server;
    int fd;
    struct stream_thread *previous, *next;
};

struct lane_server {
    struct lane_table *table;
    int64_t spin_ns;
    int threads, stop; /* `stop`: an eventfd */
    unsigned next;
    uint64_t mapped; /* by atomic additions */
    pthread_mutex_t lock;
    pthread_cond_t ended;          /* a stream has */
    struct stream_thread *streams; /* guarded by the lock, as is their number */
    int streams_count, is_stopping;
    struct lane_keys keys; /* guarded by the lock */
    uint32_t keys_version; /* grows with each change of them, by atomic additions */
    struct lane_stats stats; /* but `lanes`, by atomic additions */
    struct worker workers[THREADS_MAX];
};

/* ---- memory of clients */

static struct region *region_of(struct lane *lane, uint64_t number) {
    if (lane->last < lane->regions_count && lane->regions[lane->last].number == number)
        return &lane->regions[lane->last];
    for (uint32_t at = 0; at < lane->regions_count; at++)
        if (lane->regions[at].number == number) {
            lane->last = at;
            return &lane->regions[at];
        }
    return NULL;
}

/* Map the memory behind `fd`, and close it. 0, or -1: it may not be used. */
static int add_region(struct lane_server *server, struct lane *lane, uint64_t number, int fd) {
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat status;
    struct statfs where;
    void *address = MAP_FAILED;
    struct region *grown = NULL;
    uint64_t size = 0;
    if (seals >= 0 && seals & F_SEAL_SHRINK && lane->regions_count < LANE_REGIONS_MAX &&
        region_of(lane, number) == NULL && fstat(fd, &status) == 0 && status.st_size > 0 &&
        fstatfs(fd, &where) == 0 && where.f_type == TMPFS) {
        size = (uint64_t)status.st_size;
        if (size <= LANE_MAPPED_MAX - lane->mapped &&
            __atomic_load_n(&server->mapped, __ATOMIC_RELAXED) + size <= SERVER_MAPPED_MAX)
            grown = realloc(lane->regions, (lane->regions_count + 1) * sizeof *grown);
    }
    if (grown != NULL) {
        lane->regions = grown;
        address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (address == MAP_FAILED) return -1;
    lane->mapped += size;
    __atomic_add_fetch(&server->mapped, size, __ATOMIC_RELAXED);
    lane->regions[lane->regions_count++] = (struct region){.number = number, .address = address, .size = size};
    return 0;
}

static void forget_region(struct lane_server *server, struct lane *lane, uint64_t number) {
    struct region *region = region_of(lane, number);
    if (region == NULL) return;
    munmap(region->address, region->size);
    lane->mapped -= region->size;
    __atomic_sub_fetch(&server->mapped, region->size, __ATOMIC_RELAXED);
    *region = lane->regions[--lane->regions_count];
}

/* ---- reads */

/* Of a reader: one of the grants that it has shown is for this. */
static int is_granted(const struct lane *lane, const struct lane_item *item, int64_t now_s) {
    if (lane->tenant == NULL) return 1;
    const struct lane_grant *grant = item->grant - 1 < LANE_GRANTS_MAX ? lane->grants[item->grant - 1] : NULL;
    return grant != NULL && lane_grant_covers(grant, item, now_s);
}

/* Of items from `at` on, those that lie side by side: how many were read, or declined. */
static int read_run(struct worker *worker, struct lane *lane, const struct lane_head *head, int at, int64_t now_s) {
    const struct lane_item *items = (const struct lane_item *)(head + 1);
    int count = head->count;
    int run = 1, is_damaged = 0;
    worker->reply.parts[at] = (struct lane_part){LANE_DECLINED, 0};
    if (!is_granted(lane, &items[at], now_s)) return run;
    while (at + run < count && lane_goes_on(&worker->found[at + run - 1], &items[at + run - 1]) &&
           is_granted(lane, &items[at + run], now_s))
        run++;
    for (int each = at; each < at + run; each++)
        worker->into[each] = region_of(lane, items[each].region)->address + items[each].place;
    lane_read_items(&worker->found[at], &items[at], &worker->into[at], run, worker->scratch, LANE_SCRATCH_BYTES, RWF_NOWAIT,
                    head->kind == LANE_READ_SUMS, &worker->reply.parts[at], &is_damaged);
    if (is_damaged) __atomic_add_fetch(&worker->server->stats.damaged, 1, __ATOMIC_RELAXED);
    return run;
}

void lane_count(struct lane_stats *stats, const struct lane_part *parts, size_t count) {
    uint64_t declined = 0, bytes = 0;
    for (size_t at = 0; at < count; at++) {
        if (parts[at].count == LANE_DECLINED) declined++;
        else bytes += (uint64_t)parts[at].count;
    }
    __atomic_add_fetch(&stats->requests, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&stats->items, count, __ATOMIC_RELAXED);
    __atomic_add_fetch(&stats->declined, declined, __ATOMIC_RELAXED);
    __atomic_add_fetch(&stats->bytes, bytes, __ATOMIC_RELAXED);
}

/* With other keys nothing that was checked before counts: the client asks the service, which checks it again. */
static void look_at_keys(struct worker *worker, struct lane *lane) {
    uint32_t version = __atomic_load_n(&worker->server->keys_version, __ATOMIC_ACQUIRE);
    if (lane->tenant == NULL || lane->keys_version == version) return;
    for (int at = 0; at < LANE_GRANTS_MAX; at++) {
        free(lane->grants[at]);
        lane->grants[at] = NULL;
    }
    lane->keys_version = version;
}

/* What is no good takes the place all the same: reads that name it are declined, and the service says why. 0, or -1: the
   client breaks the rules. */
static int take_grant(struct worker *worker, struct lane *lane, uint32_t place, const uint8_t *data, size_t size) {
    if (place - 1 >= LANE_GRANTS_MAX) return -1;
    if (lane->tenant == NULL) return 0;
    struct lane_keys keys;
    pthread_mutex_lock(&worker->server->lock);
    keys = worker->server->keys;
    pthread_mutex_unlock(&worker->server->lock);
    free(lane->grants[place - 1]);
    lane->grants[place - 1] = lane_grant_new(&keys, data, size, lane->tenant, strlen(lane->tenant));
    return 0;
}

/* 0, or -1: the client breaks the rules. */
static int serve_read(struct worker *worker, struct lane *lane, const struct lane_head *head, size_t size) {
    const struct lane_item *items = (const struct lane_item *)(head + 1);
    struct lane_table *table = worker->server->table;
    uint64_t total = 0;
    size_t plain = sizeof *head + head->count * sizeof *items;
    if (head->count > LANE_ITEMS_MAX || size < plain || (size > plain && head->count == 0)) return -1;
    for (int at = 0; at < head->count; at++) {
        const struct region *region = region_of(lane, items[at].region);
        if (region == NULL || items[at].place > region->size || items[at].length > region->size - items[at].place)
            return -1;
        total += items[at].length;
    }
    if (total > LANE_BYTES_MAX) return -1;
    struct lane_part *parts = worker->reply.parts;
    lane_table_find(table, items, head->count, worker->found);
    look_at_keys(worker, lane);
    if (size > plain &&
        take_grant(worker, lane, items[0].grant, (const uint8_t *)head + plain, size - plain) != 0)
        return -1;
    int64_t now_s = lane->tenant != NULL ? time(NULL) : 0;
    for (int at = 0; at < head->count;) at += read_run(worker, lane, head, at, now_s);
    lane_table_finish(table, items, head->count, worker->found, parts);
    lane_count(&worker->server->stats, parts, head->count);
    worker->reply.head = (struct lane_head){LANE_MAGIC, LANE_COUNTS, head->count, head->call};
    size_t answer = sizeof worker->reply.head + head->count * sizeof *parts;
    /* A few calls are in the air on a lane, so there is room; a client that does not take its answers loses its lane. */
    return send(lane->fd, &worker->reply, answer, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)answer ? 0 : -1;
}

/* ---- packets */

/* The first descriptor that came, or -1; all others are closed. */
static int take_descriptors(struct msghdr *message, int *count) {
    int first = -1;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each != NULL; each = CMSG_NXTHDR(message, each)) {
        if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS) continue;
        size_t came = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t at = 0; at < came; at++) {
            int fd;
            memcpy(&fd, CMSG_DATA(each) + at * sizeof fd, sizeof fd);
            if (first < 0) first = fd;
            else close(fd);
            ++*count;
        }
    }
    return first;
}

/* 1: served; 0: nothing there; -1: the lane is over. */
static int serve_packet(struct worker *worker, struct lane *lane) {
    char control[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))] __attribute__((aligned(8)));
    struct iovec whole = {worker->packet, LANE_PACKET_BYTES_MAX};
    struct msghdr message = {.msg_iov = &whole, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t size = recvmsg(lane->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (size < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    int descriptors = 0, fd = take_descriptors(&message, &descriptors);
    const struct lane_head *head = (const struct lane_head *)worker->packet;
    int is_whole = (size_t)size >= sizeof *head && head->magic == LANE_MAGIC &&
                   !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && descriptors == (head->kind == LANE_REGION);
    if (is_whole && head->kind == LANE_REGION) return add_region(worker->server, lane, head->call, fd) == 0 ? 1 : -1;
    if (fd >= 0) close(fd);
    if (is_whole && (head->kind == LANE_READ || head->kind == LANE_READ_SUMS))
        return serve_read(worker, lane, head, (size_t)size) == 0 ? 1 : -1;
    if (is_whole && head->kind == LANE_FORGET) {
        forget_region(worker->server, lane, head->call);
        return 1;
    }
    return -1;
}

static void free_lane(struct lane *lane) {
    for (int at = 0; at < LANE_GRANTS_MAX; at++) free(lane->grants[at]);
    free(lane->tenant);
    free(lane->regions);
    free(lane);
}

static void end_lane(struct worker *worker, struct lane *lane) {
    struct lane_server *server = worker->server;
    pthread_mutex_lock(&server->lock);
    if (lane->previous != NULL) lane->previous->next = lane->next;
    else worker->lanes = lane->next;
    if (lane->next != NULL) lane->next->previous = lane->previous;
    server->stats.lanes--;
    pthread_mutex_unlock(&server->lock);
    while (lane->regions_count) forget_region(server, lane, lane->regions[0].number);
    close(lane->fd); /* At last: who sees it knows that nothing is written to its memory any more. */
    free_lane(lane);
}

static void *work(void *argument) {
    struct worker *worker = argument;
    struct epoll_event events[64];
    int eager = 0; /* how often, lately, the next packet came while we looked for it */
    for (;;) {
        int count = 0;
        int64_t idle_since_ns = lane_now_ns();
        int64_t spin_ns = eager > 0 ? worker->server->spin_ns : 0;
        while (spin_ns && (count = epoll_wait(worker->epoll, events, 64, 0)) == 0) {
            if (lane_now_ns() - idle_since_ns >= spin_ns) break;
            sched_yield(); /* Whoever else has something to do on this core, our client perhaps, comes first. */
        }
        if (count == 0) count = epoll_wait(worker->epoll, events, 64, -1);
        if (lane_now_ns() - idle_since_ns < worker->server->spin_ns) eager += eager < EAGER_MAX;
        else eager = eager > 2 ? eager - 2 : 0;
        for (int at = 0; at < count; at++) {
            struct lane *lane = events[at].data.ptr;
            if (lane == NULL) return NULL; /* `stop` */
            /* One packet each, so that no client waits for all that another one has sent. */
            if (serve_packet(worker, lane) < 0) end_lane(worker, lane);
        }
    }
}

/* ---- life */

/* Signals are for the threads of the program. 0, or an error that is in `errno` too. */
static int start_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) errno = error;
    return error;
}

struct lane_server *lane_server_new(struct lane_table *table, int threads, int spin_us) {
    struct lane_server *server = calloc(1, sizeof *server);
    if (server == NULL) return NULL;
    server->table = table;
    server->spin_ns = (int64_t)spin_us * 1000;
    server->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->ended, NULL);
    threads = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
    int is_whole = server->stop >= 0;
    for (int at = 0; at < threads && is_whole; at++) {
        struct worker *worker = &server->workers[at];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
        worker->server = server;
        worker->epoll = epoll_create1(EPOLL_CLOEXEC);
        worker->packet = aligned_alloc(64, (LANE_PACKET_BYTES_MAX + 63) / 64 * 64);
        worker->scratch = aligned_alloc(4096, 2 * LANE_SCRATCH_BYTES);
        worker->found = malloc(LANE_ITEMS_MAX * sizeof *worker->found);
        is_whole = worker->epoll >= 0 && worker->packet != NULL && worker->scratch != NULL && worker->found != NULL &&
                   epoll_ctl(worker->epoll, EPOLL_CTL_ADD, server->stop, &event) == 0 &&
                   start_thread(&worker->thread, NULL, work, worker) == 0;
        server->threads += is_whole;
    }
    if (is_whole) return server;
    int error = errno;
    lane_server_stop(server);
    errno = error;
    return NULL;
}

static int adopt_local(struct lane_server *server, int fd, const char *tenant) {
    struct lane *lane = calloc(1, sizeof *lane);
    if (lane == NULL) return -1;
    lane->fd = fd;
    if (tenant != NULL && (lane->tenant = strdup(tenant)) == NULL) {
        free_lane(lane);
        return -1;
    }
    pthread_mutex_lock(&server->lock);
    struct worker *worker = &server->workers[server->next++ % server->threads];
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = lane};
    int is_in = server->stats.lanes < LANES_MAX && epoll_ctl(worker->epoll, EPOLL_CTL_ADD, fd, &event) == 0;
    if (is_in) {
        lane->next = worker->lanes;
        if (lane->next != NULL) lane->next->previous = lane;
        worker->lanes = lane;
        server->stats.lanes++;
    }
    pthread_mutex_unlock(&server->lock);
    if (is_in) return 0;
    free_lane(lane);
    return -1;
}

static void *serve_stream(void *argument) {
    struct stream_thread *stream = argument;
    struct lane_server *server = stream->server;
    lane_stream_serve(server->table, stream->fd, &server->stats);
    pthread_mutex_lock(&server->lock);
    if (stream->previous != NULL) stream->previous->next = stream->next;
    else server->streams = stream->next;
    if (stream->next != NULL) stream->next->previous = stream->previous;
    close(stream->fd); /* Under the lock: `stop` shuts down what is in the list. */
    server->streams_count--;
    server->stats.lanes--;
    pthread_cond_signal(&server->ended);
    pthread_mutex_unlock(&server->lock);
    free(stream);
    return NULL;
}

static int adopt_stream(struct lane_server *server, int fd) {
    struct stream_thread *stream = calloc(1, sizeof *stream);
    pthread_attr_t attributes;
    pthread_t thread;
    if (stream == NULL) return -1;
    stream->server = server;
    stream->fd = fd;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STREAM_STACK_BYTES);
    pthread_mutex_lock(&server->lock);
    int is_in = !server->is_stopping && server->streams_count < STREAMS_MAX &&
                start_thread(&thread, &attributes, serve_stream, stream) == 0;
    if (is_in) {
        stream->next = server->streams;
        if (stream->next != NULL) stream->next->previous = stream;
        server->streams = stream;
        server->streams_count++;
        server->stats.lanes++;
    }
    pthread_mutex_unlock(&server->lock);
    pthread_attr_destroy(&attributes);
    if (is_in) return 0;
    free(stream);
    return -1;
}

void lane_server_set_keys(struct lane_server *server, const struct lane_keys *keys) {
    pthread_mutex_lock(&server->lock);
    server->keys = *keys;
    __atomic_add_fetch(&server->keys_version, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&server->lock);
}

int lane_server_adopt(struct lane_server *server, int fd, int is_stream, const char *tenant) {
    /* Streams do not look at grants: a reader has none. */
    int failed = is_stream ? tenant != NULL || adopt_stream(server, fd) : adopt_local(server, fd, tenant);
    if (!failed) return 0;
    close(fd);
    errno = EMFILE;
    return -1;
}

void lane_server_stats(struct lane_server *server, struct lane_stats *stats) {
    pthread_mutex_lock(&server->lock);
    stats->lanes = server->stats.lanes;
    pthread_mutex_unlock(&server->lock);
    stats->requests = __atomic_load_n(&server->stats.requests, __ATOMIC_RELAXED);
    stats->items = __atomic_load_n(&server->stats.items, __ATOMIC_RELAXED);
    stats->declined = __atomic_load_n(&server->stats.declined, __ATOMIC_RELAXED);
    stats->damaged = __atomic_load_n(&server->stats.damaged, __ATOMIC_RELAXED);
    stats->bytes = __atomic_load_n(&server->stats.bytes, __ATOMIC_RELAXED);
}

int lane_server_stop(struct lane_server *server) {
    uint64_t one = 1;
    if (server->stop >= 0 && write(server->stop, &one, sizeof one) < 0) abort(); /* An eventfd takes a 1. */
    pthread_mutex_lock(&server->lock);
    server->is_stopping = 1;
    for (struct stream_thread *each = server->streams; each != NULL; each = each->next) shutdown(each->fd, SHUT_RDWR);
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += STOP_WAIT_S;
    while (server->streams_count && pthread_cond_timedwait(&server->ended, &server->lock, &until) == 0) continue;
    int is_stuck = server->streams_count > 0;
    pthread_mutex_unlock(&server->lock);
    for (int at = 0; at < server->threads; at++) pthread_join(server->workers[at].thread, NULL);
    for (int at = 0; at < THREADS_MAX; at++) {
        struct worker *worker = &server->workers[at];
        if (worker->server == NULL) break;
        while (worker->lanes != NULL) end_lane(worker, worker->lanes);
        if (worker->epoll >= 0) close(worker->epoll);
        free(worker->packet);
        free(worker->scratch);
        free(worker->found);
    }
    if (server->stop >= 0) close(server->stop);
    if (is_stuck) return -1;
    free(server);
    return 0;
}
