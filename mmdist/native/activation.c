/* Activations between the linear layers of a vision tower, in bfloat16. */
#include "vec.h"

enum { PART = 1 << 14 };

typedef struct {
    const bf16 *x;
    bf16 *y;
    long count;
} Activation;

INLINE vf quick_gelu(vf x)
{
    return x / (1.0f + vexp(x * -1.702f));
}

static void quick_gelu_part(void *arg, long item)
{
    const Activation *job = arg;
    long i = item * PART, end = i + PART < job->count ? i + PART : job->count;
    for (; i + VL <= end; i += VL)
        store_bf16(job->y + i, quick_gelu(load_bf16(job->x + i)));
    if (i < end)
        store_bf16_part(job->y + i, quick_gelu(load_bf16_part(job->x + i, end - i)), end - i);
}

/* y = x * sigmoid(1.702 x) */
MMDIST_API void mmdist_quick_gelu(const bf16 *x, bf16 *y, long count)
{
    pool_take();
    pool_run(quick_gelu_part, &(Activation){x, y, count}, (count + PART - 1) / PART);
    pool_give();
}
