/* What all native kernels share: exported names, numbers in bfloat16, and one pool of threads for the process. */
#ifndef MMDIST_POOL_H
#define MMDIST_POOL_H

#include <stdint.h>
#include <string.h>

#define MMDIST_API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

INLINE float to_float(bf16 value)
{
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE bf16 to_bf16(float wide)
{
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (bf16)(bits >> 16 | 0x40);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__x86_64__) || defined(__i386__)
#define cpu_pause() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define cpu_pause() __asm__ volatile("yield")
#else
#define cpu_pause() ((void)0)
#endif

/* The number of threads that work on a job, the caller among them. */
MMDIST_API void mmdist_pool_init(int threads);

/* An exported function holds the pool (and the memory it keeps for itself) from its first line to its last. */
void pool_take(void);
void pool_give(void);

/* work(arg, item) for each item of 0 .. items - 1, in any order and on any thread; returns when all are done. */
void pool_run(void (*work)(void *arg, long item), void *arg, long items);

#endif
