// torch's own OpenMP threads, asked by their functions' addresses: a second set beside them would wait busily for work.

#include <stdio.h>

#include "few.h"

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number_fn)(void);

static parallel_fn parallel;
static number_fn thread_number, thread_count;

static const long WORTH_WAKING = 1 << 17;

PUBLIC void emberline_threads(void *gomp_parallel, void *omp_get_thread_num, void *omp_get_num_threads)
{
    parallel = (parallel_fn)gomp_parallel;
    thread_number = (number_fn)omp_get_thread_num;
    thread_count = (number_fn)omp_get_num_threads;
}

struct call {
    work_fn work;
    void *job;
};

static void one_thread(void *p)
{
    struct call *call = p;
    call->work(call->job, thread_number(), thread_count());
}

void in_parts(work_fn work, void *job, long cost, int threads)
{
    if (parallel == NULL || threads < 2 || cost < WORTH_WAKING) {
        work(job, 0, 1);
        return;
    }
    struct call call = {work, job};
    parallel(one_thread, &call, (unsigned)threads, 0);
}

float *scratch(size_t numbers)
{
    static __thread float *held;
    static __thread size_t held_numbers;
    if (numbers > held_numbers) {
        free(held);
        held = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
        if (held == NULL) {
            fprintf(stderr, "emberline: no memory for %zu numbers of a loop\n", numbers);
            abort(); // In the middle of a step, on one of several threads: nobody could go on.
        }
        held_numbers = numbers;
    }
    return held;
}
