// libhccl.so: collectives between processes of one machine over shared memory, within the documented limits of each chip
// (the HCCL API reference, chapters HcclAllReduce, HcclAllGather, HcclBroadcast and HcclReduceScatter). As there, a rank
// holds HCCL_IF_BASE_PORT + its device while it communicates, connecting ends after HCCL_CONNECT_TIMEOUT seconds (EI0006)
// and a collective after HCCL_EXEC_TIMEOUT (EI0002), whatever became of the rank that is missed. Unlike there, ranks that
// ask for different things are told so.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "emulated.h"

enum { SUCCESS = 0, E_PARA = 1, E_NOT_SUPPORT = 5, E_SYSCALL = 8, E_TIMEOUT = 9, E_NETWORK = 19 };
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BFP16, NUM_TYPES };
enum { SUM, PROD, MAX, MIN, NUM_OPS };
enum { ROOT_INFO_BYTES = 4108, NAME_BYTES = 128, MAX_RANKS_310P = 32, SLOT = 4 << 20 };
static const char *TYPE_NAMES[] = {
    "int8", "int16", "int32", "fp16", "fp32", "int64", "uint64", "uint8", "uint16", "uint32", "fp64", "bfp16"};
static const char *OP_NAMES[] = {"sum", "prod", "max", "min"};
static const size_t TYPE_BYTES[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};

typedef struct { char name[32]; uint64_t count; uint32_t type, op, root; } Call;
typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  uint32_t arrived, generation, ready;
} Meeting;
typedef struct {
  uint32_t size, rank;
  char name[NAME_BYTES];
  Meeting *meeting;
  Call *calls;  // one a rank
  char *slots;  // SLOT bytes a rank
} Comm;

static int seconds(const char *name, int fallback) {
  const char *value = getenv(name);
  return value && *value ? atoi(value) : fallback;
}

static int meet(Comm *comm, int timeout_s, const char *code, const char *what) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += timeout_s;
  Meeting *meeting = comm->meeting;
  pthread_mutex_lock(&meeting->lock);
  uint32_t generation = meeting->generation;
  int late = 0;
  if (++meeting->arrived == comm->size) {
    meeting->arrived = 0;
    meeting->generation++;
    pthread_cond_broadcast(&meeting->changed);
  }
  while (meeting->generation == generation && late != ETIMEDOUT)
    late = pthread_cond_timedwait(&meeting->changed, &meeting->lock, &until);
  int missing = (int)comm->size - (int)meeting->arrived, met = meeting->generation != generation;
  pthread_mutex_unlock(&meeting->lock);
  if (met) return SUCCESS;
  emulated_error("%s: rank %u: %s timed out after %d s, %d ranks missing", code, comm->rank, what, timeout_s, missing);
  return E_TIMEOUT;
}

// ---- communicators

int HcclGetRootInfo(char *root) {
  static int count;
  memset(root, 0, ROOT_INFO_BYTES);
  snprintf(root, NAME_BYTES, "/emulated-hccl-%d-%d-%ld", getpid(), count++, (long)time(NULL));
  return SUCCESS;
}

static int hold_port(void) {  // by the whole process, until it ends
  static int held = -1;
  if (held >= 0) return SUCCESS;
  int port = seconds("HCCL_IF_BASE_PORT", 60000) + emulated_device(), on = 1;
  struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(fd, (struct sockaddr *)&place, sizeof place) || listen(fd, 16)) {
    close(fd);
    emulated_error("EJ0003: failed to bind port %d, it is in use; see HCCL_IF_BASE_PORT", port);
    return E_NETWORK;
  }
  held = fd;
  return SUCCESS;
}

static void init_meeting(Meeting *meeting) {
  pthread_mutexattr_t lock;
  pthread_condattr_t changed;
  pthread_mutexattr_init(&lock);
  pthread_mutexattr_setpshared(&lock, PTHREAD_PROCESS_SHARED);
  pthread_condattr_init(&changed);
  pthread_condattr_setpshared(&changed, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(&meeting->lock, &lock);
  pthread_cond_init(&meeting->changed, &changed);
  __atomic_store_n(&meeting->ready, 1, __ATOMIC_RELEASE);
}

static Comm *comms[64];
static int num_comms;

int HcclCommInitRootInfo(uint32_t size, const char *root, uint32_t rank, void **out) {
  if (strstr(emulated_soc(), "310P") && size > MAX_RANKS_310P)
    return emulated_error("HCCL on %s: %u ranks, at most %d", emulated_soc(), size, MAX_RANKS_310P), E_PARA;
  if (hold_port()) return E_NETWORK;
  Comm *comm = calloc(1, sizeof *comm);
  comm->size = size;
  comm->rank = rank;
  strncpy(comm->name, root, NAME_BYTES - 1);
  size_t head = 4096 + (size * sizeof(Call) + 4095) / 4096 * 4096, bytes = head + (size_t)size * SLOT;
  int fd = shm_open(comm->name, O_CREAT | O_RDWR, 0600);
  if (fd < 0 || ftruncate(fd, (off_t)bytes)) return emulated_error("HCCL: no shared memory for %s", root), E_SYSCALL;
  char *segment = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (segment == MAP_FAILED) return emulated_error("HCCL: no shared memory for %s", root), E_SYSCALL;
  comm->meeting = (Meeting *)segment;
  comm->calls = (Call *)(segment + 4096);
  comm->slots = segment + head;
  int timeout_s = seconds("HCCL_CONNECT_TIMEOUT", 120);
  if (rank == 0) init_meeting(comm->meeting);
  for (int waited = 0; !__atomic_load_n(&comm->meeting->ready, __ATOMIC_ACQUIRE) && waited < timeout_s * 1000; waited++)
    usleep(1000);
  int met = comm->meeting->ready ? meet(comm, timeout_s, "EI0006", "connecting") : E_TIMEOUT;
  if (rank == 0) shm_unlink(comm->name);
  if (!met && num_comms < 64) comms[num_comms++] = comm;
  *out = comm;
  return met;
}

int HcclCommInitRootInfoConfig(uint32_t size, const char *root, uint32_t rank, const void *config, void **out) {
  return HcclCommInitRootInfo(size, root, rank, out);
}

int HcclGetCommName(Comm *comm, char *name) { return strncpy(name, comm->name, NAME_BYTES - 1), SUCCESS; }
int HcclGetCommAsyncError(Comm *comm, int *error) { return *error = SUCCESS, SUCCESS; }
int HcclCommDestroy(Comm *comm) { return SUCCESS; }  // the process ends soon
const char *HcclGetErrorString(int error) { return "see the last error message"; }

// ---- limits

static const uint32_t ANY_310P = 1u << INT8 | 1u << INT16 | 1u << INT32 | 1u << FP16 | 1u << FP32 | 1u << INT64 |
                                 1u << UINT64 | 1u << UINT8 | 1u << UINT16 | 1u << UINT32 | 1u << FP64;
static const uint32_t REDUCED_310P = 1u << INT8 | 1u << INT16 | 1u << INT32 | 1u << FP16 | 1u << FP32;
static const uint32_t ANY_910B = ANY_310P | 1u << BFP16;
static const uint32_t REDUCED_910B = REDUCED_310P | 1u << INT64 | 1u << BFP16;

static int check(const Call *call, int reduces, const void *from, const void *to) {
  int small = strstr(emulated_soc(), "310P") != NULL;
  uint32_t legal = reduces ? (small ? REDUCED_310P : REDUCED_910B) : (small ? ANY_310P : ANY_910B);
  if (call->type >= NUM_TYPES || !(legal >> call->type & 1)) {
    const char *type = call->type < NUM_TYPES ? TYPE_NAMES[call->type] : "this type";
    return emulated_error("%s on %s: %s is not supported", call->name, emulated_soc(), type), E_NOT_SUPPORT;
  }
  if (reduces && call->op >= NUM_OPS) return emulated_error("%s: unknown reduction %u", call->name, call->op), E_PARA;
  int no_op = small ? call->type == INT16 && call->op != SUM
                    : (call->type == INT16 || call->type == BFP16) && call->op == PROD;
  if (reduces && no_op) {
    emulated_error("%s on %s: %s of %s is not supported", call->name, emulated_soc(), OP_NAMES[call->op],
                   TYPE_NAMES[call->type]);
    return E_NOT_SUPPORT;
  }
  if (((uintptr_t)from | (uintptr_t)to) % TYPE_BYTES[call->type])
    return emulated_error("%s: buffers of %s are not aligned", call->name, TYPE_NAMES[call->type]), E_PARA;
  return SUCCESS;
}

// All ranks are here and have put their data down; they must have called the same.
static int agree(Comm *comm, const Call *mine) {
  comm->calls[comm->rank] = *mine;
  int met = meet(comm, seconds("HCCL_EXEC_TIMEOUT", 1836), "EI0002", mine->name);
  if (met) return met;
  for (uint32_t i = 0; i < comm->size; i++) {
    Call *other = &comm->calls[i];
    if (!strcmp(other->name, mine->name) && other->count == mine->count && other->type == mine->type &&
        other->op == mine->op && other->root == mine->root)
      continue;
    emulated_error("ranks differ: rank %u calls %s of %lu x type %u, op %u, root %u; rank %u %s of %lu x type %u, op %u, "
                   "root %u", comm->rank, mine->name, mine->count, mine->type, mine->op, mine->root, i, other->name,
                   other->count, other->type, other->op, other->root);
    return E_PARA;
  }
  return SUCCESS;
}

static int part(Comm *comm) { return meet(comm, seconds("HCCL_EXEC_TIMEOUT", 1836), "EI0002", "a collective"); }

// ---- arithmetic: rounded after every rank, as a reduction in memory of the type is

static float from_bfloat(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float wide;
  return memcpy(&wide, &bits, 4), wide;
}

static uint16_t to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define ONE(a, b, op) ((op) == SUM ? (a) + (b) : (op) == PROD ? (a) * (b) : (op) == MAX ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))
#define REDUCE(T)                                                                                \
  for (size_t i = 0; i < count; i++) ((T *)total)[i] = (T)ONE(((T *)total)[i], ((T *)add)[i], op)

static void reduce(void *total, void *add, size_t count, uint32_t type, uint32_t op) {
  if (type == INT8) REDUCE(int8_t);
  if (type == INT16) REDUCE(int16_t);
  if (type == INT32) REDUCE(int32_t);
  if (type == INT64) REDUCE(int64_t);
  if (type == FP16) REDUCE(_Float16);
  if (type == FP32) REDUCE(float);
  if (type != BFP16) return;
  for (size_t i = 0; i < count; i++) {
    float a = from_bfloat(((uint16_t *)total)[i]), b = from_bfloat(((uint16_t *)add)[i]);
    ((uint16_t *)total)[i] = to_bfloat(ONE(a, b, op));
  }
}

// ---- collectives, a slot's worth at a time

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static char *slot(Comm *comm, uint32_t rank) { return comm->slots + (size_t)rank * SLOT; }

static void put_total(Comm *comm, char *to, size_t first, size_t count, uint32_t type, uint32_t op) {
  memcpy(to, slot(comm, 0) + first, count * TYPE_BYTES[type]);
  for (uint32_t i = 1; i < comm->size; i++) reduce(to, slot(comm, i) + first, count, type, op);
}

typedef struct { Call call; char *from, *to; Comm *comm; } Asked;

// Now, or where the stream is captured as a task of its graph: then no rank waits for another until it is replayed.
static int give(void *stream, Work *work, Asked asked, int reduces) {
  int status = check(&asked.call, reduces, asked.from, asked.to);
  if (status) return status;
  asked.from = emulated_host(asked.from);
  asked.to = emulated_host(asked.to);
  return stream && emulated_stream_state(stream) ? emulated_add_task(stream, work, &asked, sizeof asked) : work(&asked);
}

static int all_reduce(void *arguments) {
  Asked *a = arguments;
  size_t bytes = TYPE_BYTES[a->call.type];
  for (size_t done = 0; done < a->call.count;) {
    size_t now = least(a->call.count - done, SLOT / bytes), at = done * bytes;
    memcpy(slot(a->comm, a->comm->rank), a->from + at, now * bytes);
    int status = agree(a->comm, &a->call);
    if (status) return status;
    put_total(a->comm, a->to + at, 0, now, a->call.type, a->call.op);
    if ((status = part(a->comm))) return status;
    done += now;
  }
  return SUCCESS;
}

static int reduce_scatter(void *arguments) {
  Asked *a = arguments;
  Comm *comm = a->comm;
  size_t bytes = TYPE_BYTES[a->call.type], count = a->call.count;
  for (size_t done = 0; done < count;) {
    size_t now = least(count - done, SLOT / bytes / comm->size);
    for (uint32_t i = 0; i < comm->size; i++)
      memcpy(slot(comm, comm->rank) + i * now * bytes, a->from + (i * count + done) * bytes, now * bytes);
    int status = agree(comm, &a->call);
    if (status) return status;
    put_total(comm, a->to + done * bytes, comm->rank * now * bytes, now, a->call.type, a->call.op);
    if ((status = part(comm))) return status;
    done += now;
  }
  return SUCCESS;
}

static int all_gather(void *arguments) {
  Asked *a = arguments;
  Comm *comm = a->comm;
  size_t bytes = TYPE_BYTES[a->call.type], count = a->call.count;
  for (size_t done = 0; done < count;) {
    size_t now = least(count - done, SLOT / bytes);
    memcpy(slot(comm, comm->rank), a->from + done * bytes, now * bytes);
    int status = agree(comm, &a->call);
    if (status) return status;
    for (uint32_t i = 0; i < comm->size; i++)
      memcpy(a->to + (i * count + done) * bytes, slot(comm, i), now * bytes);
    if ((status = part(comm))) return status;
    done += now;
  }
  return SUCCESS;
}

static int broadcast(void *arguments) {
  Asked *a = arguments;
  Comm *comm = a->comm;
  size_t bytes = TYPE_BYTES[a->call.type], count = a->call.count;
  uint32_t root = a->call.root;
  for (size_t done = 0; done < count;) {
    size_t now = least(count - done, SLOT / bytes);
    if (comm->rank == root) memcpy(slot(comm, root), a->from + done * bytes, now * bytes);
    int status = agree(comm, &a->call);
    if (status) return status;
    if (comm->rank != root) memcpy(a->to + done * bytes, slot(comm, root), now * bytes);
    if ((status = part(comm))) return status;
    done += now;
  }
  return SUCCESS;
}

int HcclAllReduce(void *from, void *to, uint64_t count, uint32_t type, uint32_t op, Comm *comm, void *stream) {
  return give(stream, all_reduce, (Asked){{"HcclAllReduce", count, type, op, 0}, from, to, comm}, 1);
}

int HcclReduceScatter(void *from, void *to, uint64_t count, uint32_t type, uint32_t op, Comm *comm, void *stream) {
  return give(stream, reduce_scatter, (Asked){{"HcclReduceScatter", count, type, op, 0}, from, to, comm}, 1);
}

int HcclAllGather(void *from, void *to, uint64_t count, uint32_t type, Comm *comm, void *stream) {
  return give(stream, all_gather, (Asked){{"HcclAllGather", count, type, 0, 0}, from, to, comm}, 0);
}

int HcclBroadcast(void *buffer, uint64_t count, uint32_t type, uint32_t root, Comm *comm, void *stream) {
  return give(stream, broadcast, (Asked){{"HcclBroadcast", count, type, 0, root}, buffer, buffer, comm}, 0);
}

// A fused product's sum, of numbers in host memory: by the communicator's name; how many ranks it has, or minus an error.
int emulated_all_reduce(const char *name, void *numbers, uint64_t count, uint32_t type) {
  for (int i = 0; i < num_comms; i++)
    if (!strcmp(comms[i]->name, name)) {
      int status = HcclAllReduce(numbers, numbers, count, type, SUM, comms[i], NULL);
      return status ? -status : (int)comms[i]->size;
    }
  return 0;
}
