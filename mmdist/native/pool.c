/* A pool of threads that does not stall when one of them loses its core.

   Each thread has its own run of neighbouring items (one stream of memory) and takes from its front; who has finished
   takes from the back of the others', so a thread that the system has put aside holds up no more than its one item. */
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPINS = 8000, WAIT_SPINS = 4000 };

/* Items first .. last - 1 that are left, in one word so that both ends move at once. */
typedef struct {
    _Alignas(64) _Atomic uint64_t left;
} Run;

static struct {
    int threads;
    pthread_t handles[MAX_THREADS];
    Run runs[MAX_THREADS];
    void (*work)(void *, long);
    void *arg;
    _Alignas(64) _Atomic uint32_t job;       /* counts jobs; a futex */
    _Alignas(64) _Atomic uint32_t unfinished; /* items; a futex */
    _Atomic int sleepers, caller_sleeps, stopping;
} pool = {.threads = 1};

static pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;

void pool_take(void)
{
    pthread_mutex_lock(&taken);
}

void pool_give(void)
{
    pthread_mutex_unlock(&taken);
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static long take(Run *run, int from_back)
{
    uint64_t left = atomic_load_explicit(&run->left, memory_order_acquire);
    for (;;) {
        uint32_t first = (uint32_t)(left >> 32), last = (uint32_t)left;
        if (first >= last)
            return -1;
        uint64_t rest = from_back ? left - 1 : left + (1ull << 32);
        if (atomic_compare_exchange_weak_explicit(&run->left, &left, rest, memory_order_acq_rel, memory_order_acquire))
            return from_back ? last - 1 : first;
    }
}

static void do_items(Run *run, int from_back)
{
    for (long item; (item = take(run, from_back)) >= 0;) {
        pool.work(pool.arg, item); /* read after taking: the job cannot change while an item is out */
        if (atomic_fetch_sub(&pool.unfinished, 1) == 1 && atomic_load(&pool.caller_sleeps))
            futex_wake(&pool.unfinished);
    }
}

static void do_share(int thread)
{
    for (int i = 0; i < pool.threads; i++)
        do_items(&pool.runs[(thread + i) % pool.threads], i > 0);
}

static void await_job(uint32_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool.job, memory_order_acquire) != seen)
            return;
        cpu_pause();
    }
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.job) == seen)
        futex_wait(&pool.job, seen);
    atomic_fetch_sub(&pool.sleepers, 1);
}

static void *worker(void *arg)
{
    uint32_t seen = 0;
    while (!atomic_load(&pool.stopping)) {
        await_job(seen);
        seen = atomic_load_explicit(&pool.job, memory_order_acquire);
        do_share((int)(intptr_t)arg);
    }
    return NULL;
}

static void announce(void)
{
    atomic_fetch_add(&pool.job, 1);
    if (atomic_load(&pool.sleepers))
        futex_wake(&pool.job);
}

static void await_all(void)
{
    for (int i = 0; i < WAIT_SPINS; i++) {
        if (atomic_load_explicit(&pool.unfinished, memory_order_acquire) == 0)
            return;
        cpu_pause();
    }
    atomic_store(&pool.caller_sleeps, 1);
    for (uint32_t left; (left = atomic_load(&pool.unfinished)) != 0;)
        futex_wait(&pool.unfinished, left);
    atomic_store(&pool.caller_sleeps, 0);
}

void pool_run(void (*work)(void *, long), void *arg, long items)
{
    if (pool.threads == 1 || items <= 1) {
        for (long item = 0; item < items; item++)
            work(arg, item);
        return;
    }
    pool.work = work;
    pool.arg = arg;
    atomic_store(&pool.unfinished, (uint32_t)items);
    for (int i = 0; i < pool.threads; i++) {
        uint64_t first = (uint64_t)(items * i / pool.threads), last = (uint64_t)(items * (i + 1) / pool.threads);
        atomic_store_explicit(&pool.runs[i].left, first << 32 | last, memory_order_release);
    }
    announce();
    do_share(0);
    await_all();
}

static void stop_workers(void)
{
    atomic_store(&pool.stopping, 1);
    announce();
    for (int i = 1; i < pool.threads; i++)
        pthread_join(pool.handles[i], NULL);
    atomic_store(&pool.stopping, 0);
    pool.threads = 1;
}

MMDIST_API void mmdist_pool_init(int threads)
{
    pool_take();
    stop_workers();
    atomic_store(&pool.job, 0);
    for (int i = 0; i < MAX_THREADS; i++)
        atomic_store(&pool.runs[i].left, 0);
    pool.threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    for (int i = 1; i < pool.threads; i++)
        if (pthread_create(&pool.handles[i], NULL, worker, (void *)(intptr_t)i) != 0) {
            pool.threads = i;
            break;
        }
    pool_give();
}
