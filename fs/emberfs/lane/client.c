/* The client's end of lanes: one request to each server, and the wait for the answers.

   It looks for an answer for a while before it sleeps: to be woken costs a virtual machine more than the whole read.
   Between looks whoever else wants the core has it, and a thread that lately looked in vain does not look at all: where
   many wait for few cores it would only keep them from those who have something to do. */

#include "lane.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

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

/* 1: the answer of lane `at` is there; 0: not yet; -1: the lane is lost. */
static int take(int fd, const struct lane_head *request, struct lane_part *parts, struct answer *answer) {
    ssize_t size = recv(fd, answer, sizeof *answer, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if ((size_t)size != sizeof answer->head + request->count * sizeof *parts || answer->head.magic != LANE_MAGIC ||
        answer->head.kind != LANE_COUNTS || answer->head.count != request->count || answer->head.call != request->call)
        return -1;
    memcpy(parts, answer->parts, request->count * sizeof *parts);
    return 1;
}

static int not_interrupted(void) { return 0; }

int (*lane_is_interrupted)(void) = not_interrupted;

static int send_request(struct lane_request *request, int64_t until_ns) {
    const char *whole = (const char *)request->head;
    size_t size = request->size;
    if (size && request->is_stream) {
        request->spans = lane_stream_spans(request->head);
        if (request->spans == NULL) return -1;
        whole = (const char *)&request->spans->head;
        size = sizeof(struct lane_head) + request->spans->head.count * sizeof(struct lane_item);
    }
    for (size_t done = 0; done < size;) {
        ssize_t count = send(request->fd, whole + done, size - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count > 0) request->is_pending = 1;
        if (count >= 0) done += (size_t)count;
        else if (errno == EAGAIN && request->is_stream && lane_now_ns() < until_ns) {
            struct pollfd wait = {.fd = request->fd, .events = POLLOUT};
            if (poll(&wait, 1, LANE_LOOK_NS / 1000000) <= 0 && lane_is_interrupted()) return -1;
        } else if (errno != EINTR) return -1;
    }
    return 0;
}

/* Wait for the answers of local lanes. */
static int take_local(struct lane_request *requests, int count, int64_t spin_ns, int64_t until_ns) {
    static __thread struct answer answer;
    int has_slept = 0;
    spin_ns = lane_spin_ns(spin_ns);
    int64_t spin_until_ns = lane_now_ns() + spin_ns;
    for (;;) {
        struct pollfd waits[LANES_MAX];
        int waiting = 0;
        for (int at = 0; at < count; at++) {
            if (!requests[at].is_pending) continue;
            int came = take(requests[at].fd, requests[at].head, requests[at].parts, &answer);
            if (came < 0) return -1;
            requests[at].is_pending = !came;
            if (!came) waits[waiting++] = (struct pollfd){.fd = requests[at].fd, .events = POLLIN};
        }
        if (!waiting) {
            if (spin_ns) lane_looked(!has_slept);
            return 0;
        }
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

int lane_exchange(struct lane_request *requests, int count, int64_t spin_ns, int64_t until_ns) {
    int local = 0;
    for (int at = 0; at < count; at++) requests[at].is_pending = 0;
    for (int at = 0; at < count; at++)
        if (send_request(&requests[at], until_ns) != 0) return -1;
    for (int at = 0; at < count; at++) {
        struct lane_request *request = &requests[at];
        if (request->is_pending && request->is_stream) {
            if (lane_stream_take(request->fd, request->spans, request->head, request->into, request->parts, until_ns) != 0)
                return -1;
            request->is_pending = 0;
        }
        local += request->is_pending;
    }
    return local ? take_local(requests, count, spin_ns, until_ns) : 0;
}
