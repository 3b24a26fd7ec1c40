// libascendcl.so: streams, events, and the capture of streams into graphs (acl_rt.h; the CANN documents of aclmdlRI*).
// Outside a capture all is done when a call returns. While a stream is captured, what is given to it is kept as tasks
// and not done; a graph does its tasks, in the order they came, each time it is executed. Another stream joins the
// capture by waiting for an event of a captured one, and has to be waited for in turn before the capture ends.
#define _GNU_SOURCE
#include <acl/acl_rt.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "emulated.h"

enum { OK = 0, NO_MEMORY = 207001, BAD_ORDER = 107003, AICORE_EXCEPTION = 507015, EQUAL = 1 };
enum { UNJOINED = 107025, CAPTURED = 107027, EVENT_CAPTURED = 107028, NOT_CAPTURED = 107029, UNSAFE = 107030 };
typedef struct { Work *work; void *arguments; } Task;
typedef struct Stream Stream;
typedef struct {
  Stream *origin;
  aclmdlRICaptureMode mode;
  Task *tasks;
  int num_tasks, room;
} Graph;
typedef struct { Graph *graph; int first, count; } Group;  // tasks that may be replaced
struct Stream {
  Graph *graph;        // that it is captured into
  int given, awaited;  // tasks it has got in this capture, and how many of them another stream waits for
  Group *updated;      // whose tasks are replaced by what the stream is given
  int next;            // of them
  Stream *next_stream;
};
typedef struct { struct timespec recorded; Stream *on; int given; Graph *graph; } Event;  // on, given: in a capture

static Stream *streams;  // all there are
static Graph *active;    // the one that is being captured
static _Thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static EmulatedHook *run_operator, *capture_ended;

static aclError refuse(aclError code, const char *what) { return emulated_error("%s", what), code; }

// ---- tasks

void emulated_set_hooks(EmulatedHook *run, EmulatedHook *ended) { run_operator = run, capture_ended = ended; }

int emulated_stream_state(void *stream) {
  Stream *s = stream;
  return s && s->updated ? STREAM_UPDATES : s && s->graph ? STREAM_CAPTURED : STREAM_WORKS;
}

int emulated_add_task(void *stream, Work *work, const void *arguments, size_t bytes) {
  Stream *s = stream;
  Task task = {work, memcpy(malloc(bytes + 1), arguments, bytes)};
  if (s->updated) {
    if (s->next == s->updated->count) return refuse(BAD_ORDER, "an update of more tasks than the group has");
    s->updated->graph->tasks[s->updated->first + s->next++] = task;
    return OK;
  }
  pthread_mutex_lock(&lock);
  Graph *graph = s->graph;
  if (graph->num_tasks == graph->room) {
    graph->room = graph->room ? 2 * graph->room : 256;
    graph->tasks = realloc(graph->tasks, (size_t)graph->room * sizeof *graph->tasks);
  }
  graph->tasks[graph->num_tasks++] = task;
  s->given++;
  pthread_mutex_unlock(&lock);
  return OK;
}

static int do_operator(void *number) { return run_operator(*(int *)number); }
int emulated_add_operator(void *stream, int number) {
  return emulated_add_task(stream, do_operator, &number, sizeof number);
}

// The operator whose place an updating stream's next task will take; -1 where that is none.
int emulated_replaced(void *stream) {
  Stream *s = stream;
  if (s->next == s->updated->count) return -1;
  Task *task = &s->updated->graph->tasks[s->updated->first + s->next];
  return task->work == do_operator ? *(int *)task->arguments : -1;
}

// What the documents call unsafe: it would wait for the device, or read host memory that may have changed by then.
int emulated_unsafe(const char *what) {
  Graph *graph = active;
  if (!graph || graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return OK;
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return OK;
  return emulated_error("%s while a stream is captured: the capture mode does not support it", what), UNSAFE;
}

// ---- capture

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
  Stream *s = stream;
  if (strncmp(emulated_soc(), "Ascend310P", 10) == 0)  // not among the products the documents list
    return refuse(EMULATED_NOT_SUPPORTED, "aclmdlRICaptureBegin: this chip captures no streams");
  if (!s || s->graph || active) return refuse(CAPTURED, "aclmdlRICaptureBegin: a capture is under way, or no stream");
  active = s->graph = calloc(1, sizeof *active);
  active->origin = s;
  active->mode = mode;
  s->given = s->awaited = 0;
  return OK;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *graph) {
  Stream *s = stream;
  *status = s && s->graph ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  *graph = s ? s->graph : NULL;
  return OK;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *graph) {
  Stream *s = stream;
  if (!s || !s->graph || s->graph->origin != s) return refuse(NOT_CAPTURED, "aclmdlRICaptureEnd: not captured here");
  int unjoined = 0;
  for (Stream *other = streams; other; other = other->next_stream)
    if (other->graph == active) {
      unjoined |= other != s && other->given > other->awaited;
      other->graph = NULL;
    }
  *graph = active;
  active = NULL;
  if (capture_ended) capture_ended(0);
  return unjoined ? refuse(UNJOINED, "aclmdlRICaptureEnd: no one waits for a stream of the capture") : OK;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  Graph *graph = model;
  if (emulated_stream_state(stream) != STREAM_WORKS) return refuse(CAPTURED, "a graph within a captured stream");
  for (int i = 0; i < graph->num_tasks; i++) {
    int status = graph->tasks[i].work(graph->tasks[i].arguments);
    if (status) return status;
  }
  return OK;
}

aclError aclmdlRIDestroy(aclmdlRI model) { return OK; }  // the process ends soon
aclError aclmdlRIGetId(aclmdlRI model, uint32_t *id) { return *id = (uint32_t)((uintptr_t)model >> 4), OK; }

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
  aclmdlRICaptureMode before = thread_mode;
  thread_mode = *mode;
  return *mode = before, OK;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  Stream *s = stream;
  if (!s->graph || s->updated) return refuse(NOT_CAPTURED, "aclmdlRICaptureTaskGrpBegin: the stream is not captured");
  s->next = s->graph->num_tasks;
  return OK;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle) {
  Stream *s = stream;
  if (!s->graph) return refuse(NOT_CAPTURED, "aclmdlRICaptureTaskGrpEnd: the stream is not captured");
  Group *group = malloc(sizeof *group);
  *group = (Group){s->graph, s->next, s->graph->num_tasks - s->next};
  return *handle = group, OK;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
  Stream *s = stream;
  if (s->graph || s->updated) return refuse(CAPTURED, "aclmdlRICaptureTaskUpdateBegin: the stream is captured");
  s->updated = (Group *)handle;
  s->next = 0;
  return OK;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
  Stream *s = stream;
  int whole = s->updated && s->next == s->updated->count;
  s->updated = NULL;
  return whole ? OK : refuse(BAD_ORDER, "aclmdlRICaptureTaskUpdateEnd: not every task of the group was given anew");
}

// ---- streams

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
  Stream *s = calloc(1, sizeof *s);
  if (!s) return NO_MEMORY;
  pthread_mutex_lock(&lock);
  s->next_stream = streams;
  streams = s;
  pthread_mutex_unlock(&lock);
  return *stream = s, OK;
}

static aclError drained(aclrtStream stream) {
  if (emulated_stream_state(stream) != STREAM_WORKS)
    return refuse(CAPTURED, "synchronising a stream that is captured or updated");
  const char *fault = getenv("EMULATED_FAULT"), *path = fault ? strchr(fault, ':') : NULL;  // acl.c
  if (!path || atoi(fault) != emulated_device() || access(path + 1, F_OK)) return OK;
  emulated_error("EZ9999: the error from device(chipId:%d): the aicore execution is abnormal", emulated_device());
  return AICORE_EXCEPTION;
}

aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
aclError aclrtDestroyStream(aclrtStream stream) { return OK; }  // kept: others may still name it
aclError aclrtDestroyStreamForce(aclrtStream stream) { return OK; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return OK; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { return OK; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) { return *flag = 0, OK; }
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute, aclrtStreamAttrValue *value) { return OK; }
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) { return *id = 1, OK; }
aclError aclrtSynchronizeStream(aclrtStream stream) { return drained(stream); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { return drained(stream); }
aclError aclrtSynchronizeDevice(void) { return emulated_unsafe("synchronising the device"); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return aclrtSynchronizeDevice(); }
aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) { return OK; }
aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) { return OK; }

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return emulated_stream_state(stream) == STREAM_WORKS ? OK : drained(stream);
}

// ---- numbers in device memory that streams wait for: what torch_npu's ExternalEvent is made of

typedef struct { void *address; uint64_t value; } Number;

static int write_number(void *arguments) {
  Number *n = arguments;
  return *(uint64_t *)emulated_host(n->address) = n->value, OK;
}

static int wait_number(void *arguments) {
  Number *n = arguments;
  if (*(uint64_t *)emulated_host(n->address) == n->value) return OK;
  return refuse(BAD_ORDER, "a graph waits for an event that no one has recorded: on a chip it would for ever");
}

static aclError give(aclrtStream stream, Work *work, Number number) {
  if (emulated_stream_state(stream) == STREAM_WORKS) return work(&number);
  return emulated_add_task(stream, work, &number, sizeof number);
}

aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
  return give(stream, write_number, (Number){address, value});
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
  if (flag != EQUAL) return refuse(BAD_ORDER, "aclrtValueWait: only waiting for an equal number is emulated");
  return give(stream, wait_number, (Number){address, value});
}

// ---- events

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
  return (*event = calloc(1, sizeof(Event))) ? OK : NO_MEMORY;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) { return free(event), OK; }
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { return OK; }

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  Event *e = event;
  Stream *s = stream;
  clock_gettime(CLOCK_MONOTONIC, &e->recorded);
  e->graph = s ? s->graph : NULL;
  e->on = s;
  e->given = s ? s->given : 0;
  return OK;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  Event *e = event;
  Stream *s = stream;
  if (!e->graph || e->graph != active) return OK;
  if (!s->graph) {
    s->graph = e->graph;
    s->given = s->awaited = 0;
  }
  if (e->on != s) e->on->awaited = e->given;
  if (s != e->graph->origin) s->given++;  // now the other's end is this one's to pass on
  return OK;
}

static aclError finished(const Event *event) {
  if (!event->graph || event->graph != active) return OK;
  return refuse(EVENT_CAPTURED, "asking for an event of a captured stream");
}

aclError aclrtSynchronizeEvent(aclrtEvent event) { return finished(event); }

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
  return *status = ACL_EVENT_RECORDED_STATUS_COMPLETE, finished(event);
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
  return *status = ACL_EVENT_WAIT_STATUS_COMPLETE, finished(event);
}

aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
  struct timespec *from = &((Event *)start)->recorded, *to = &((Event *)end)->recorded;
  *ms = (float)((double)(to->tv_sec - from->tv_sec) * 1e3 + (double)(to->tv_nsec - from->tv_nsec) / 1e6);
  return OK;
}
