/* Collectives between the ranks of one machine through a segment that all of them have mapped.

   Each rank has a control line, on which it counts its phases, and two slots for data. In a phase a rank writes to a
   slot of its own, says so by counting on, and reads the others' slots once they have counted as far. An operation
   takes the slots that the one before it did not: who has come into operation n has left n - 1, so a slot may be written
   again in n as soon as all have come into n - 1. Sums are taken in the order of the ranks, so all get the same bits.

   Who waits spins, then sleeps in a futex, and from time to time looks whether all others are alive. With fewer cores
   than ranks (spin_ns = 0) it yields once; never else, for a busy stranger would make a whole time slice of it, while a
   sleeper is let in when it is woken. */
#include "pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434 /* on all machines */
#endif

enum { PAGE = 4096, SLOT = 1 << 18, FEW_BYTES = 1 << 15, BLOCK = 1024, ALIGNED = 32 };
enum { SPINS = 30, SHORT_NS = 1000, IN_VAIN = 4, PROBE = 64, SLICE_NS = 100000000, SECOND_NS = 1000000000 };

typedef enum { SUM_F32, SUM_BF16, MAX_F32 } Kind; /* as mmdist/collectives/shm.py numbers them */

typedef struct {
    _Alignas(128) _Atomic uint32_t phase; /* a futex */
    _Atomic uint32_t sleepers;
} Control;

/* One rank's side; errors are 1 + the rank that has died, or minus that of one that has not come in time. */
typedef struct {
    char *segment;
    int rank, size, error;
    unsigned turn;         /* counts operations */
    uint32_t phase, began; /* this rank's; its first one in the last operation */
    unsigned in_vain, waits;
    int64_t spin_ns, timeout_ns;
    struct pollfd peers[]; /* pidfds; -1: not watched */
} Comm;

static size_t control_bytes(int size)
{
    return (size * sizeof(Control) + PAGE - 1) / PAGE * PAGE;
}

/* A file in memory for a segment, or -errno. By number, for not every Python or C library knows these two calls. */
MMDIST_API int mmdist_shm_create(int size)
{
    int fd = (int)syscall(SYS_memfd_create, "mmdist", 1u /* MFD_CLOEXEC */);
    return fd < 0 || ftruncate(fd, (off_t)(control_bytes(size) + 2 * (size_t)size * SLOT)) < 0 ? -errno : fd;
}

/* A file that becomes readable when the process ends, or -errno. */
MMDIST_API int mmdist_shm_watch(int pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : fd;
}

MMDIST_API int64_t mmdist_shm_comm_bytes(int size)
{
    return (int64_t)(sizeof(Comm) + size * sizeof(struct pollfd));
}

/* Fill in a zeroed Comm; the segment is zeroed too before the first rank attaches. */
MMDIST_API void mmdist_shm_attach(Comm *comm, void *segment, int rank, int size, const int *pidfds, int64_t spin_ns,
                                  int64_t timeout_ms)
{
    *comm = (Comm){.segment = segment, .rank = rank, .size = size, .spin_ns = spin_ns, .timeout_ns = timeout_ms * 1000000};
    for (int i = 0; i < size; i++)
        comm->peers[i] = (struct pollfd){.fd = pidfds[i], .events = POLLIN};
}

static Control *control(const Comm *comm, int rank)
{
    return (Control *)comm->segment + rank;
}

static char *slot(const Comm *comm, int rank)
{
    return comm->segment + control_bytes(comm->size) + (2 * (size_t)rank + comm->turn % 2) * SLOT;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * SECOND_NS + time.tv_nsec;
}

/* 1 + a rank that has died, else 0. */
static int find_dead(Comm *comm)
{
    if (poll(comm->peers, (nfds_t)comm->size, 0) > 0)
        for (int i = 0; i < comm->size; i++)
            if (comm->peers[i].revents)
                return 1 + i;
    return 0;
}

static int reached(const Comm *comm, int rank, uint32_t phase)
{
    return (int32_t)(atomic_load_explicit(&control(comm, rank)->phase, memory_order_acquire) - phase) >= 0;
}

static int sleep_until(Comm *comm, int rank, uint32_t phase)
{
    static const struct timespec slice = {.tv_nsec = SLICE_NS};
    Control *peer = control(comm, rank);
    int64_t end = now() + comm->timeout_ns;
    atomic_fetch_add(&peer->sleepers, 1);
    for (;;) {
        int dead = find_dead(comm); /* asked first: what a rank did before its end still counts */
        uint32_t seen = atomic_load(&peer->phase);
        if ((int32_t)(seen - phase) >= 0)
            break;
        comm->error = dead ? dead : now() > end ? -1 - rank : 0;
        if (comm->error)
            break;
        syscall(SYS_futex, &peer->phase, FUTEX_WAIT, seen, &slice, NULL, 0);
    }
    atomic_fetch_sub(&peer->sleepers, 1);
    return comm->error;
}

/* How long to spin. Waits that are in vain again and again mean that the peer has no core of its own now, and then
   each of them would keep it from running; so only one in PROBE is long until one is not in vain. */
static int64_t patience(Comm *comm)
{
    return comm->in_vain < IN_VAIN || comm->waits++ % PROBE == 0 ? comm->spin_ns : SHORT_NS;
}

static int await(Comm *comm, int rank, uint32_t phase)
{
    for (int i = 0; i < SPINS; i++) {
        if (reached(comm, rank, phase))
            return 0;
        cpu_pause();
    }
    int64_t start = now(), budget = patience(comm);
    while (now() - start < budget)
        for (int i = 0; i < SPINS; i++) {
            if (reached(comm, rank, phase)) {
                comm->in_vain = budget == comm->spin_ns ? 0 : comm->in_vain;
                return 0;
            }
            cpu_pause();
        }
    comm->in_vain += budget == comm->spin_ns;
    if (comm->spin_ns == 0 && (sched_yield(), reached(comm, rank, phase)))
        return 0;
    return sleep_until(comm, rank, phase);
}

static int await_all(Comm *comm, uint32_t phase)
{
    for (int i = 0; i < comm->size; i++)
        if (i != comm->rank && await(comm, i, phase))
            return comm->error;
    return 0;
}

/* Take the next pair of slots. */
static void begin(Comm *comm)
{
    comm->turn++;
    comm->began = comm->phase + 1;
}

/* Wait until the others have left this operation's slots; before writing. `before`: comm->began of the last one. */
static int begin_writing(Comm *comm)
{
    uint32_t before = comm->began;
    begin(comm);
    return await_all(comm, before);
}

static void publish(Comm *comm)
{
    Control *own = control(comm, comm->rank);
    atomic_store(&own->phase, ++comm->phase);
    if (atomic_load(&own->sleepers))
        syscall(SYS_futex, &own->phase, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int publish_and_await_all(Comm *comm)
{
    publish(comm);
    return await_all(comm, comm->phase);
}

static size_t item_bytes(Kind kind)
{
    return kind == SUM_BF16 ? sizeof(bf16) : sizeof(float);
}

static void take(Kind kind, float *restrict total, const void *from, int is_first, long count)
{
    const float *wide = from;
    const bf16 *narrow = from;
    if (kind == SUM_BF16)
        for (long i = 0; i < count; i++)
            total[i] = is_first ? to_float(narrow[i]) : total[i] + to_float(narrow[i]);
    else if (is_first)
        memcpy(total, wide, (size_t)count * sizeof(float));
    else if (kind == SUM_F32)
        for (long i = 0; i < count; i++)
            total[i] += wide[i];
    else
        for (long i = 0; i < count; i++) /* a NaN stays */
            total[i] = total[i] > wide[i] || total[i] != total[i] ? total[i] : wide[i];
}

/* to = items first .. last - 1 of all ranks' `from` taken together. */
static void reduce(Kind kind, char *to, char *const *from, int size, long first, long last)
{
    float total[BLOCK];
    size_t bytes = item_bytes(kind);
    for (long i = first; i < last; i += BLOCK) {
        long count = last - i < BLOCK ? last - i : BLOCK;
        for (int rank = 0; rank < size; rank++)
            take(kind, total, from[rank] + (size_t)i * bytes, rank == 0, count);
        bf16 *narrow = (bf16 *)to + i;
        if (kind == SUM_BF16)
            for (long j = 0; j < count; j++)
                narrow[j] = to_bf16(total[j]);
        else
            memcpy((float *)to + i, total, (size_t)count * sizeof(float));
    }
}

/* Each rank reads all of the others' numbers. */
static int all_reduce_few(Comm *comm, Kind kind, char *x, long count)
{
    char *from[comm->size];
    if (begin_writing(comm))
        return comm->error;
    for (int i = 0; i < comm->size; i++)
        from[i] = slot(comm, i);
    memcpy(from[comm->rank], x, (size_t)count * item_bytes(kind));
    if (publish_and_await_all(comm))
        return comm->error;
    reduce(kind, x, from, comm->size, 0, count);
    return 0;
}

/* Each rank reduces its own share and reads the others' results. */
static int all_reduce_many(Comm *comm, Kind kind, char *x, long count)
{
    char *from[comm->size];
    long share = (count + comm->size - 1) / comm->size;
    share = (share + ALIGNED - 1) / ALIGNED * ALIGNED;
    long first = share * comm->rank < count ? share * comm->rank : count;
    long last = first + share < count ? first + share : count;
    size_t bytes = item_bytes(kind), own = first * bytes, rest = last * bytes;
    if (begin_writing(comm))
        return comm->error;
    for (int i = 0; i < comm->size; i++)
        from[i] = slot(comm, i);
    char *mine = from[comm->rank];
    memcpy(mine, x, own);
    memcpy(mine + rest, x + rest, (size_t)count * bytes - rest);
    from[comm->rank] = x;
    if (publish_and_await_all(comm))
        return comm->error;
    reduce(kind, x, from, comm->size, first, last);
    memcpy(mine + own, x + own, rest - own);
    publish(comm);
    for (int i = 0; i < comm->size; i++) {
        long start = share * i < count ? share * i : count, end = start + share < count ? start + share : count;
        if (i == comm->rank)
            continue;
        if (await(comm, i, comm->phase))
            return comm->error;
        memcpy(x + start * bytes, from[i] + start * bytes, (size_t)(end - start) * bytes);
    }
    return 0;
}

/* In place; equal bits on all ranks. */
MMDIST_API int mmdist_shm_all_reduce(Comm *comm, void *x, int64_t count, Kind kind)
{
    long most = (long)(SLOT / item_bytes(kind)), few = (long)(FEW_BYTES / item_bytes(kind)) * 2 / comm->size;
    for (long done = 0; done < count && !comm->error; done += most) {
        long items = count - done < most ? count - done : most;
        char *part = (char *)x + (size_t)done * item_bytes(kind);
        (items <= few ? all_reduce_few : all_reduce_many)(comm, kind, part, items);
    }
    return comm->error;
}

/* Bytes first .. first + count - 1 of a rank's rows to their places in rows of all ranks' parts. */
static void place(char *to, const char *from, int rank, int size, int64_t row_bytes, int64_t first, int64_t count)
{
    while (count > 0) {
        int64_t row = first / row_bytes, column = first % row_bytes;
        int64_t bytes = row_bytes - column < count ? row_bytes - column : count;
        memcpy(to + (row * size + rank) * row_bytes + column, from, (size_t)bytes);
        from += bytes;
        first += bytes;
        count -= bytes;
    }
}

/* x: rows of row_bytes on each rank; to: rows of size * row_bytes, the ranks' parts after each other. */
MMDIST_API int mmdist_shm_all_gather(Comm *comm, const void *x, void *to, int64_t rows, int64_t row_bytes)
{
    for (int64_t done = 0; done < rows * row_bytes && !comm->error; done += SLOT) {
        int64_t bytes = rows * row_bytes - done < SLOT ? rows * row_bytes - done : SLOT;
        if (begin_writing(comm))
            break;
        memcpy(slot(comm, comm->rank), (const char *)x + done, (size_t)bytes);
        if (publish_and_await_all(comm))
            break;
        for (int i = 0; i < comm->size; i++)
            place(to, slot(comm, i), i, comm->size, row_bytes, done, bytes);
    }
    return comm->error;
}

/* Rank 0's bytes to all. */
MMDIST_API int mmdist_shm_broadcast(Comm *comm, void *x, int64_t count)
{
    for (int64_t done = 0; done < count && !comm->error; done += SLOT) {
        size_t bytes = (size_t)(count - done < SLOT ? count - done : SLOT);
        if (comm->rank == 0) {
            if (begin_writing(comm))
                break;
            memcpy(slot(comm, 0), (char *)x + done, bytes);
            publish(comm);
        } else {
            begin(comm);
            publish(comm); /* it has left the operation before */
            if (await(comm, 0, comm->phase))
                break;
            memcpy((char *)x + done, slot(comm, 0), bytes);
        }
    }
    return comm->error;
}

MMDIST_API int mmdist_shm_barrier(Comm *comm)
{
    begin(comm);
    return comm->error ? comm->error : publish_and_await_all(comm);
}
