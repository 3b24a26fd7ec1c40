/* The likeliest tokens of a rank's slice of the vocabulary, by falling logit, equal ones by rising id. */
#include "pool.h"

#include <stdlib.h>

/* bfloat16 -> an integer of the same order; -0 equals 0, and NaN is the largest, as torch.argmax has it. */
INLINE uint16_t order(bf16 bits)
{
    uint16_t key = bits & 0x8000 ? (uint16_t)~bits : bits | 0x8000;
    key = bits == 0x8000 ? 0x8000 : key;
    return (bits & 0x7fff) > 0x7f80 ? 0xffff : key;
}

/* The k-th largest of `columns` keys; how many are larger goes to `larger`. */
static uint16_t kth_largest(const bf16 *logits, long columns, long k, long *larger)
{
    long above = 0, counts[256] = {0};
    int high = 255, low = 255;
    for (long i = 0; i < columns; i++)
        counts[order(logits[i]) >> 8]++;
    while (above + counts[high] < k)
        above += counts[high--];
    memset(counts, 0, sizeof counts);
    for (long i = 0; i < columns; i++)
        counts[order(logits[i]) & 255] += order(logits[i]) >> 8 == high;
    while (above + counts[low] < k)
        above += counts[low--];
    *larger = above;
    return (uint16_t)(high << 8 | low);
}

/* A key and, below it, how far its id is from the last: larger for whom comes first. */
enum { ID_BITS = 40 };
static const int64_t LAST_ID = (1ll << ID_BITS) - 1;

static int larger_first(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

static void find_top(const bf16 *logits, long columns, long k, int64_t *ids)
{
    long larger, count = 0;
    uint16_t kth = kth_largest(logits, columns, k, &larger);
    long equal = k - larger;
    for (long i = 0; count < k; i++) {
        uint16_t key = order(logits[i]);
        if (key > kth || (key == kth && equal-- > 0))
            ids[count++] = (int64_t)key << ID_BITS | (LAST_ID - i);
    }
    qsort(ids, k, sizeof *ids, larger_first);
    for (long i = 0; i < k; i++)
        ids[i] = LAST_ID - (ids[i] & LAST_ID);
}

static long argmax(const bf16 *logits, long columns)
{
    uint16_t largest = 0;
    long i = 0;
    for (long j = 0; j < columns; j++) {
        uint16_t key = order(logits[j]);
        largest = key > largest ? key : largest;
    }
    while (order(logits[i]) != largest)
        i++;
    return i;
}

typedef struct {
    const bf16 *logits;
    long stride, columns, k;
    float *values;
    int64_t *ids;
} Top;

static void top_row(void *arg, long row)
{
    const Top *job = arg;
    const bf16 *logits = job->logits + row * job->stride;
    int64_t *ids = job->ids + row * job->k;
    if (job->k == 1)
        ids[0] = argmax(logits, job->columns);
    else
        find_top(logits, job->columns, job->k, ids);
    for (long i = 0; i < job->k; i++)
        job->values[row * job->k + i] = to_float(logits[ids[i]]);
}

/* logits (rows, columns), rows `stride` apart -> values and ids (rows, k), k <= columns. */
MMDIST_API void mmdist_top_k(const bf16 *logits, long rows, long columns, long stride, long k, float *values,
                             int64_t *ids)
{
    Top job = {logits, stride, columns, k, values, ids};
    pool_take();
    pool_run(top_row, &job, rows);
    pool_give();
}
