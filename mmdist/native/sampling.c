/* The likeliest tokens of a rank's slice of the vocabulary, by falling logit, equal ones by rising id. */
#include "pool.h"

#include <stdlib.h>

/* bfloat16 -> an integer of the same order; -0 equals 0, and NaN is the largest, as torch.argmax has it. */
INLINE int16_t order(bf16 bits)
{
    int16_t magnitude = bits & 0x7fff, key = (int16_t)bits < 0 ? -magnitude : magnitude;
    return magnitude > 0x7f80 ? 0x7fff : key;
}

enum { CHUNK = 64 };

/* The largest key of a chunk of the columns. */
static int16_t chunk_largest(const bf16 *logits, long columns, long chunk)
{
    const bf16 *own = logits + chunk * CHUNK;
    int16_t largest = -0x8000;
    if (columns - chunk * CHUNK >= CHUNK)
        for (int i = 0; i < CHUNK; i++)
            largest = order(own[i]) > largest ? order(own[i]) : largest;
    else
        for (int i = 0; i < columns - chunk * CHUNK; i++)
            largest = order(own[i]) > largest ? order(own[i]) : largest;
    return largest;
}

static long argmax(const bf16 *logits, long columns)
{
    long best = 0;
    int16_t largest = -0x8000;
    for (long chunk = 0; chunk * CHUNK < columns; chunk++) {
        int16_t found = chunk_largest(logits, columns, chunk);
        best = found > largest ? chunk : best;
        largest = found > largest ? found : largest;
    }
    long i = best * CHUNK;
    while (order(logits[i]) != largest)
        i++;
    return i;
}

static int larger_first(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* A key and, below it, how far its id is from the last: larger for whom comes first. */
static const int64_t IDS = 1ll << 40;

/* At least `least` in each of k chunks, so none of the k largest is less; only such chunks are looked into. */
static void find_top(const bf16 *logits, long columns, long k, int64_t *ids)
{
    const long chunks = (columns + CHUNK - 1) / CHUNK;
    int64_t *largest = malloc(sizeof *largest * (2 * chunks + columns)), *sorted = largest + chunks;
    if (largest == NULL)
        abort();
    int64_t *found = sorted + chunks;
    long count = 0;
    for (long chunk = 0; chunk < chunks; chunk++)
        sorted[chunk] = largest[chunk] = chunk_largest(logits, columns, chunk);
    qsort(sorted, chunks, sizeof *sorted, larger_first);
    const int64_t least = k <= chunks ? sorted[k - 1] : -0x8000;
    for (long i = 0; i < columns; i++) {
        if (i % CHUNK == 0 && largest[i / CHUNK] < least)
            i += CHUNK - 1;
        else if (order(logits[i]) >= least)
            found[count++] = order(logits[i]) * IDS + (IDS - 1 - i);
    }
    qsort(found, count, sizeof *found, larger_first);
    for (long i = 0; i < k; i++)
        ids[i] = IDS - 1 - (found[i] & (IDS - 1));
    free(largest);
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
