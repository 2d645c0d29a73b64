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
#define LOOK_NS 100000000 /* so often the caller is asked about signals, which may have come to another thread */

static __thread int eager = EAGER_MAX; /* how often, lately, an answer came while this thread looked for it */
static __thread unsigned waits;

int64_t lane_spin_ns(int64_t spin_ns) { return eager > 0 || ++waits % TRIES_EVERY == 0 ? spin_ns : 0; }

void lane_looked(int has_come) {
    if (has_come) eager += eager < EAGER_MAX;
    else eager = eager > 2 ? eager - 2 : 0;
}

struct answer {
    struct lane_head head;
    int32_t counts[LANE_ITEMS_MAX];
};

/* 1: the answer of lane `at` is there; 0: not yet; -1: the lane is lost. */
static int take(int fd, const struct lane_head *request, int32_t *counts, struct answer *answer) {
    ssize_t size = recv(fd, answer, sizeof *answer, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if ((size_t)size != sizeof answer->head + request->count * sizeof *counts || answer->head.magic != LANE_MAGIC ||
        answer->head.kind != LANE_COUNTS || answer->head.count != request->count || answer->head.call != request->call)
        return -1;
    memcpy(counts, answer->counts, request->count * sizeof *counts);
    return 1;
}

static int send_request(const struct lane_request *request, int64_t until_ns) {
    for (size_t done = 0; done < request->size;) {
        const char *from = (const char *)request->head + done;
        ssize_t count = send(request->fd, from, request->size - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count >= 0) done += (size_t)count;
        else if (errno == EAGAIN && request->is_stream && lane_now_ns() < until_ns) {
            struct pollfd wait = {.fd = request->fd, .events = POLLOUT};
            poll(&wait, 1, LOOK_NS / 1000000);
        } else if (errno != EINTR) return -1;
    }
    return 0;
}

int lane_exchange(struct lane_request *requests, int count, int is_sent, int64_t spin_ns, int64_t until_ns) {
    static __thread struct answer answer;
    int left = 0, has_slept = 0;
    for (int at = 0; at < count && !is_sent; at++) {
        requests[at].is_done = requests[at].size == 0;
        if (send_request(&requests[at], until_ns) != 0) return -1;
    }
    for (int at = 0; at < count; at++) {
        struct lane_request *request = &requests[at];
        if (!request->is_done && request->is_stream) {
            if (lane_stream_take(request->fd, request->head, request->into, request->counts, until_ns) != 0) return -1;
            request->is_done = 1;
        }
        left += !request->is_done;
    }
    if (left) spin_ns = lane_spin_ns(spin_ns);
    int64_t spin_until_ns = lane_now_ns() + spin_ns;
    while (left) {
        for (int at = 0; at < count; at++) {
            if (requests[at].is_done) continue;
            int came = take(requests[at].fd, requests[at].head, requests[at].counts, &answer);
            if (came < 0) return -1;
            requests[at].is_done = came;
            left -= came;
        }
        if (!left) {
            if (spin_ns) lane_looked(!has_slept);
            return 0;
        }
        int64_t now_ns = lane_now_ns();
        if (now_ns >= until_ns) return -1;
        if (now_ns < spin_until_ns) {
            sched_yield();
            continue;
        }
        struct pollfd waits[LANES_MAX];
        int waiting = 0;
        for (int at = 0; at < count; at++)
            if (!requests[at].is_done) waits[waiting++] = (struct pollfd){.fd = requests[at].fd, .events = POLLIN};
        int64_t rest_ns = until_ns - now_ns < LOOK_NS ? until_ns - now_ns : LOOK_NS;
        struct timespec rest = {0, rest_ns};
        has_slept = 1;
        int ready = ppoll(waits, (nfds_t)waiting, &rest, NULL);
        if (ready < 0 && errno != EINTR) return -1;
        if (ready <= 0) return -2;
    }
    return 0;
}
