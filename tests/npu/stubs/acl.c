// libascendcl.so: the calls of CANN's runtime that torch_npu needs to import, count devices, hold memory and copy it.
// Compiled against the headers in the wheel, so a wrong signature is a compile error. Streams are in streams.c.
//
// EMULATED_SOC       Ascend310P3 (two devices, the chips of one 300I DUO) or Ascend910B3 (eight, an 800I A2)
// EMULATED_DEVICES   another number of devices: 4 is two 300I DUO cards
// EMULATED_FAULT     as 1:FILE: operators of device 1 fail once there is such a file; synchronising its stream says so
// ASCEND_RT_VISIBLE_DEVICES is honoured as CANN does: ranks see the devices it names, counted from 0.
#define _GNU_SOURCE
#include <acl/acl_rt.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulated.h"

enum { OK = 0, NO_DEVICE = 107001, NO_MEMORY = 207001, PAGE = 512, MAX_PIECES = 65536, MAX_PINNED = 4096 };
typedef struct { char *start; size_t bytes; int used; } Piece;
typedef struct { void *to; const void *from; size_t bytes; } Copy;
typedef struct { void *to; int value; size_t bytes; } Fill;

static _Thread_local int current_device;
static char message[512] = "";
static char *device_base, *host_base;  // the same pages: where programs believe them to be, and where they can be read
static Piece pieces[MAX_PIECES];        // of device memory, in the order of their addresses
static int num_pieces;
static Piece pinned[MAX_PINNED];        // host memory that stays where it is
static size_t used_bytes;
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t memory_made = PTHREAD_ONCE_INIT;

const char *emulated_soc(void) {
  const char *soc = getenv("EMULATED_SOC");
  return soc && *soc ? soc : "Ascend310P3";
}

int emulated_device(void) { return current_device; }

void emulated_error(const char *format, ...) {
  va_list words;
  va_start(words, format);
  vsnprintf(message, sizeof message, format, words);
  va_end(words);
}

static int is_310p(void) { return strncmp(emulated_soc(), "Ascend310P", 10) == 0; }

static size_t total_bytes(void) { return (size_t)(is_310p() ? 43693 : 65536) << 20; }  // as npu-smi shows them

static unsigned installed_devices(void) {
  const char *asked = getenv("EMULATED_DEVICES");
  return asked && *asked ? (unsigned)atoi(asked) : is_310p() ? 2 : 8;
}

static unsigned visible_devices(void) {
  const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) return installed_devices();
  unsigned count = 0;  // CANN stops at the first id that is not there
  while (*visible) {
    char *end;
    long id = strtol(visible, &end, 10);
    if (end == visible || id < 0 || id >= (long)installed_devices()) break;
    count++;
    visible = *end == ',' ? end + 1 : end;
  }
  return count;
}

// ---- devices

aclError aclInit(const char *config) { return OK; }
aclError aclFinalize(void) { return OK; }
const char *aclGetRecentErrMsg(void) { return message; }
const char *aclrtGetSocName(void) { return emulated_soc(); }
aclError aclrtGetDeviceCount(uint32_t *count) { return *count = visible_devices(), OK; }
aclError aclrtGetDevice(int32_t *device) { return *device = current_device, OK; }
aclError aclrtResetDevice(int32_t device) { return OK; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { return OK; }
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { return *flags = 0, *active = 1, OK; }
aclError aclrtGetCurrentContext(aclrtContext *context) { return *context = &installed_devices, OK; }
aclError aclrtSetCurrentContext(aclrtContext context) { return OK; }
aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logic) { return *logic = user, OK; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { return OK; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { return OK; }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { return OK; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { return OK; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return OK; }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { return OK; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { return *value = 0, OK; }
aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) { return *value = 8, OK; }
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) { return *value = 8, OK; }
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t *value) { return *value = 8, OK; }

aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= (int32_t)visible_devices()) {
    emulated_error("EE1001: aclrtSetDevice: device %d, %u visible", device, visible_devices());
    return NO_DEVICE;
  }
  current_device = device;
  return OK;
}

// ---- memory

static void make_memory(void) {
  size_t bytes = total_bytes();
  int file = memfd_create("emulated-npu", 0);
  if (file < 0 || ftruncate(file, (off_t)bytes)) abort();
  device_base = mmap(NULL, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
  host_base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (device_base == MAP_FAILED || host_base == MAP_FAILED) abort();
  close(file);
  pieces[num_pieces++] = (Piece){device_base, bytes, 0};
}

static int on_device(const void *address) {
  return device_base && (const char *)address >= device_base && (const char *)address < device_base + total_bytes();
}

void *emulated_host(const void *address) {
  return on_device(address) ? host_base + ((const char *)address - device_base) : (void *)address;
}

aclError aclrtMalloc(void **address, size_t bytes, aclrtMemMallocPolicy policy) {
  pthread_once(&memory_made, make_memory);
  bytes = (bytes + 32 + PAGE - 1) / PAGE * PAGE;  // CANN adds 32 bytes for its own reads ahead
  pthread_mutex_lock(&memory_lock);
  int i = 0;
  while (i < num_pieces && (pieces[i].used || pieces[i].bytes < bytes)) i++;
  if (i == num_pieces || num_pieces == MAX_PIECES) {
    pthread_mutex_unlock(&memory_lock);
    emulated_error("EL0004: aclrtMalloc: %zu bytes asked, %zu of %zu used", bytes, used_bytes, total_bytes());
    return NO_MEMORY;
  }
  if (pieces[i].bytes > bytes) {
    memmove(&pieces[i + 2], &pieces[i + 1], (size_t)(num_pieces++ - i - 1) * sizeof *pieces);
    pieces[i + 1] = (Piece){pieces[i].start + bytes, pieces[i].bytes - bytes, 0};
    pieces[i].bytes = bytes;
  }
  pieces[i].used = 1;
  used_bytes += bytes;
  *address = pieces[i].start;
  memset(emulated_host(*address), 0xff, bytes < PAGE * 8 ? bytes : PAGE * 8);  // NaN: memory never written is not 0
  pthread_mutex_unlock(&memory_lock);
  return OK;
}

aclError aclrtMallocAlign32(void **address, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(address, bytes, policy);
}

static void join_next(int i) {
  if (i < 0 || i + 1 >= num_pieces || pieces[i].used || pieces[i + 1].used) return;
  pieces[i].bytes += pieces[i + 1].bytes;
  memmove(&pieces[i + 1], &pieces[i + 2], (size_t)(num_pieces-- - i - 2) * sizeof *pieces);
}

aclError aclrtFree(void *address) {
  pthread_mutex_lock(&memory_lock);
  int i = 0;
  while (i < num_pieces && pieces[i].start != address) i++;
  int found = i < num_pieces && pieces[i].used;
  if (found) {
    pieces[i].used = 0;
    used_bytes -= pieces[i].bytes;
    join_next(i);
    join_next(i - 1);
  }
  pthread_mutex_unlock(&memory_lock);
  return found ? OK : NO_MEMORY;
}

aclError aclrtMallocHost(void **address, size_t bytes) {
  char *head;
  if (posix_memalign((void **)&head, PAGE, bytes + PAGE)) return NO_MEMORY;
  pthread_mutex_lock(&memory_lock);
  int i = 0;
  while (i < MAX_PINNED && pinned[i].start) i++;
  if (i < MAX_PINNED) pinned[i] = (Piece){head, bytes + PAGE, 1};
  pthread_mutex_unlock(&memory_lock);
  return i < MAX_PINNED ? (*address = head, OK) : NO_MEMORY;
}

aclError aclrtMallocHostWithCfg(void **address, uint64_t bytes, aclrtMallocConfig *config) { return aclrtMallocHost(address, bytes); }

static Piece *find_pinned(const char *address) {
  for (int i = 0; i < MAX_PINNED; i++)
    if (address >= pinned[i].start && address < pinned[i].start + pinned[i].bytes) return &pinned[i];
  return NULL;
}

aclError aclrtFreeHost(void *address) {
  pthread_mutex_lock(&memory_lock);
  Piece *piece = find_pinned(address);
  if (piece) *piece = (Piece){0};
  pthread_mutex_unlock(&memory_lock);
  return free(address), OK;
}

static int can_copy(const void *address) { return on_device(address) || find_pinned(address); }

aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *free_bytes, size_t *total) {
  *total = total_bytes();
  *free_bytes = *total - used_bytes;
  return OK;
}

aclError aclrtPointerGetAttributes(const void *address, aclrtPtrAttributes *attributes) {
  memset(attributes, 0, sizeof *attributes);
  attributes->location.type = on_device(address) ? ACL_MEM_LOCATION_TYPE_DEVICE : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return OK;
}

static int do_copy(void *copy) {
  Copy *c = copy;
  return memmove(emulated_host(c->to), emulated_host(c->from), c->bytes), OK;
}

static int do_fill(void *fill) {
  Fill *f = fill;
  return memset(emulated_host(f->to), f->value, f->bytes), OK;
}

static aclError copy(void *to, size_t room, const void *from, size_t bytes) {
  if (bytes > room) return emulated_error("aclrtMemcpy: %zu bytes into %zu", bytes, room), NO_MEMORY;
  return do_copy(&(Copy){to, from, bytes});
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind) {
  aclError unsafe = emulated_unsafe("aclrtMemcpy");
  return unsafe ? unsafe : copy(to, room, from, bytes);
}

// Of pages that the host may swap out it is no asynchronous copy.
aclError aclrtMemcpyAsync(
    void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream stream) {
  aclError unsafe = can_copy(to) && can_copy(from) ? OK : emulated_unsafe("aclrtMemcpyAsync of memory that is not pinned");
  if (unsafe || emulated_stream_state(stream) == STREAM_WORKS) return unsafe ? unsafe : copy(to, room, from, bytes);
  return emulated_add_task(stream, do_copy, &(Copy){to, from, bytes}, sizeof(Copy));
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return emulated_error("aclrtMemset: %zu bytes into %zu", bytes, room), NO_MEMORY;
  aclError unsafe = emulated_unsafe("aclrtMemset");
  return unsafe ? unsafe : do_fill(&(Fill){to, value, bytes});
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  if (emulated_stream_state(stream) == STREAM_WORKS) return aclrtMemset(to, room, value, bytes);
  return emulated_add_task(stream, do_fill, &(Fill){to, value, bytes}, sizeof(Fill));
}
