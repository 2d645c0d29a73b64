/* The client's end of lanes: a request to each server, in steps, and the wait for the answers.

   It looks for an answer for a while before it sleeps: to be woken costs a virtual machine more than the whole read.
   Between looks whoever else wants the core has it, and a thread that lately looked in vain does not look at all: where
   many wait for few cores it would only keep them from those who have something to do. */

#include "lane.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define LANES_MAX 64
#define EAGER_MAX 8
#define TRIES_EVERY 1024 /* waits of a thread that does not look any more: then it tries again. A look in vain is slow. */

static __thread int eager = EAGER_MAX; /* how often, lately, an answer came while this thread looked for it */
static __thread unsigned waits;

int64_t lane_spin_ns(int64_t spin_ns) { return eager > 0 || ++waits % TRIES_EVERY == 0 ? spin_ns : 0; }

void lane_looked(int has_come) {
    if (has_come) eager += eager < EAGER_MAX;
    else eager = eager > 2 ? eager - 2 : 0;
}

struct answer {
    struct lane_head head;
    struct lane_part parts[LANE_ITEMS_MAX];
};

/* 1: the answer to a request for `count` items is there; 0: not yet; -1: the lane is lost. */
static int take(int fd, uint64_t call, uint32_t count, struct lane_part *parts, struct answer *answer) {
    ssize_t size = recv(fd, answer, sizeof *answer, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if ((size_t)size != sizeof answer->head + count * sizeof *parts || answer->head.magic != LANE_MAGIC ||
        answer->head.kind != LANE_COUNTS || answer->head.count != count || answer->head.call != call)
        return -1;
    memcpy(parts, answer->parts, count * sizeof *parts);
    return 1;
}

static int not_interrupted(void) { return 0; }

int (*lane_is_interrupted)(void) = not_interrupted;

/* A lane takes no more: wait until it does. 0, or -1: too late, or a signal came. */
static int wait_for_room(int fd, int64_t until_ns) {
    struct pollfd wait = {.fd = fd, .events = POLLOUT};
    if (lane_now_ns() >= until_ns) return -1;
    return poll(&wait, 1, LANE_LOOK_NS / 1000000) <= 0 && lane_is_interrupted() ? -1 : 0;
}

static int send_to_stream(struct lane_request *request, int64_t until_ns) {
    request->spans = lane_stream_spans(request->head);
    if (request->spans == NULL) return -1;
    const char *whole = (const char *)&request->spans->head;
    size_t size = sizeof(struct lane_head) + request->spans->head.count * sizeof(struct lane_item);
    for (size_t done = 0; done < size;) {
        ssize_t count = send(request->fd, whole + done, size - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count > 0) request->pending = 1;
        if (count >= 0) done += (size_t)count;
        else if (errno == EAGAIN ? wait_for_room(request->fd, until_ns) != 0 : errno != EINTR) return -1;
    }
    return 0;
}

/* How many items a step has, and of each server. Streams are asked for all at once. */
static uint32_t count_items(const struct lane_request *requests, const struct lane_steps *steps, size_t step, uint32_t *counts) {
    uint32_t all = 0;
    memset(counts, 0, LANES_MAX * sizeof *counts);
    for (size_t at = step ? steps->ends[step - 1] : 0; at < steps->ends[step]; at++) {
        int server = steps->pieces[at].server;
        if (requests[server].is_stream) continue;
        counts[server]++;
        all++;
    }
    return all;
}

static uint64_t call_of(const struct lane_request *request, size_t step) { return request->head->call + step; }

static int send_to_local(struct lane_request *request, size_t step, uint32_t count, int64_t until_ns) {
    struct lane_head head = {LANE_MAGIC, request->head->kind, (uint16_t)count, call_of(request, step)};
    struct lane_item *items = (struct lane_item *)(request->head + 1) + request->asked;
    struct iovec parts[] = {{&head, sizeof head},
                            {items, count * sizeof *items},
                            {(void *)(uintptr_t)request->grant, request->asked ? 0 : request->grant_size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
    while (sendmsg(request->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        if (errno == EAGAIN ? wait_for_room(request->fd, until_ns) != 0 : errno != EINTR) return -1;
    request->asked += count;
    request->pending++;
    return 0;
}

static int send_step(struct lane_request *requests, int count, const struct lane_steps *steps, size_t step, int64_t until_ns) {
    uint32_t counts[LANES_MAX];
    count_items(requests, steps, step, counts);
    for (int at = 0; at < count; at++)
        if (counts[at] && send_to_local(&requests[at], step, counts[at], until_ns) != 0) return -1;
    return 0;
}

/* Wait for the answers of local lanes. 0; 1: it has slept; -1: as `lane_exchange`. */
static int take_step(struct lane_request *requests, int count, const struct lane_steps *steps, size_t step, int64_t spin_ns,
                     int64_t until_ns) {
    static __thread struct answer answer;
    uint32_t counts[LANES_MAX];
    int has_slept = 0;
    int64_t spin_until_ns = lane_now_ns() + spin_ns;
    if (!count_items(requests, steps, step, counts)) return 0;
    for (;;) {
        struct pollfd waits[LANES_MAX];
        int waiting = 0;
        for (int at = 0; at < count; at++) {
            struct lane_request *request = &requests[at];
            if (!counts[at]) continue;
            int came = take(request->fd, call_of(request, step), counts[at], request->parts + request->answered, &answer);
            if (came < 0) return -1;
            if (!came) waits[waiting++] = (struct pollfd){.fd = request->fd, .events = POLLIN};
            else {
                request->answered += counts[at];
                request->pending--;
                counts[at] = 0;
            }
        }
        if (!waiting) return has_slept;
        int64_t now_ns = lane_now_ns();
        if (now_ns >= until_ns) return -1;
        if (now_ns < spin_until_ns) {
            sched_yield();
            continue;
        }
        has_slept = 1;
        struct timespec rest = {0, until_ns - now_ns < LANE_LOOK_NS ? until_ns - now_ns : LANE_LOOK_NS};
        int ready = ppoll(waits, (nfds_t)waiting, &rest, NULL);
        /* A signal may have come to another thread: asked for in any case. */
        if ((ready < 0 && errno != EINTR) || (ready <= 0 && lane_is_interrupted())) return -1;
    }
}

static int take_streams(struct lane_request *requests, int count, int64_t until_ns) {
    for (int at = 0; at < count; at++) {
        struct lane_request *request = &requests[at];
        if (!request->is_stream || !request->pending) continue;
        if (lane_stream_take(request->fd, request->spans, request->head, request->into, request->parts, until_ns) != 0)
            return -1;
        request->pending = 0;
    }
    return 0;
}

int lane_exchange(struct lane_request *requests, int count, const struct lane_steps *steps, int64_t spin_ns, int64_t until_ns) {
    size_t sent = 0;
    for (int at = 0; at < count; at++) requests[at].pending = 0;
    for (int at = 0; at < count; at++)
        if (requests[at].is_stream && requests[at].head != NULL && send_to_stream(&requests[at], until_ns) != 0) return -1;
    for (; sent < steps->count && sent < steps->ahead; sent++)
        if (send_step(requests, count, steps, sent, until_ns) != 0) return -1;
    if (take_streams(requests, count, until_ns) != 0) return -1;
    size_t local = 0, slept = 0;
    for (int at = 0; at < count; at++) local += requests[at].pending != 0;
    spin_ns = lane_spin_ns(spin_ns);
    for (size_t step = 0; step < steps->count; step++) {
        int outcome = take_step(requests, count, steps, step, spin_ns / (int64_t)steps->count, until_ns);
        if (outcome < 0) return -1;
        slept += (size_t)outcome;
        steps->finish(steps->context, step ? steps->ends[step - 1] : 0, steps->ends[step]);
        if (sent < steps->count && send_step(requests, count, steps, sent++, until_ns) != 0) return -1;
    }
    if (spin_ns && local) lane_looked(2 * slept < steps->count);
    return 0;
}
