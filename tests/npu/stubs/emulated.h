// What the emulated libraries share. Device memory is never readable at the address a program is given (as on a real
// machine, touching it from the host is a segmentation fault); emulated_host() gives the place where its bytes are.
#pragma once
#include <stddef.h>

void *emulated_host(const void *address);               // host addresses are returned as they are
void emulated_error(const char *format, ...);           // what aclGetRecentErrMsg() will say
const char *emulated_soc(void);                         // e.g. "Ascend310P3"
int emulated_device(void);                              // of this thread, as the process counts them
