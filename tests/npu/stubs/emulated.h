// What the emulated libraries share. Device memory is never readable at the address a program is given (as on a real
// machine, touching it from the host is a segmentation fault); emulated_host() gives the place where its bytes are.
#pragma once
#include <stddef.h>

enum { EMULATED_NOT_SUPPORTED = 200001 };  // ACL_ERROR_API_NOT_SUPPORT

void *emulated_host(const void *address);               // host addresses are returned as they are
void emulated_error(const char *format, ...);           // what aclGetRecentErrMsg() will say
const char *emulated_soc(void);                         // e.g. "Ascend310P3"
int emulated_device(void);                              // of this thread, as the process counts them

// Streams (streams.c). A stream that works does what it is given at once; a captured one keeps it as a task of its graph;
// one that updates puts it in the place of such a task.
enum { STREAM_WORKS, STREAM_CAPTURED, STREAM_UPDATES };
typedef int Work(void *arguments);
typedef int EmulatedHook(int number);
int emulated_stream_state(void *stream);
int emulated_add_task(void *stream, Work *work, const void *arguments, size_t bytes);  // with its own copy of them
int emulated_add_operator(void *stream, int number);                  // one that the hook `run` will do
void emulated_set_hooks(EmulatedHook *run, EmulatedHook *ended);      // ended: after each capture
int emulated_unsafe(const char *what);  // an error while a capture forbids what waits for the device or the host
