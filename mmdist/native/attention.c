/* Decode attention over the paged cache: one query a sequence, all query heads of a KV head together.

   A context is cut into chunks of CHUNK tokens. The chunks are spread over the threads, each leaving for every query
   head its largest score, the sum of the exponentials and the mix of the values, and are then merged in order, so that
   the result depends neither on the threads nor on the other sequences of the batch. Within a chunk the KV heads pass
   SOME tokens at a time, in the order in which a block of the cache holds them: one stream of memory is three times as
   fast as a jump for each token. */
#include "pages.h"
#include "pool.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

enum {
    CHUNK = 128,
    SOME = 16,
    TILE = 4,                /* query heads at once */
    WIDE = VL == 16 ? 4 : 2, /* vectors of a value at once */
    SMALL = 1 << 18,         /* multiplications that one thread does before others have woken up */
    ITEMS = 16,              /* enough for many threads */
};

typedef struct {
    Pages pages;
    long layer, heads, window;
    const bf16 *q;
    bf16 *out;
    const int32_t *block_tables, *context_lens;
    long q_stride, table_width;
    float scale;
    long kv_heads_per_item;
    const long *first_chunk; /* of each sequence among all chunks of the batch; one more than sequences */
    float *partial;          /* (chunks, heads, head_dim + 2) */
} Decode;

/* The keys (or values) of one KV head: where each token's are, in vectors of head_dim numbers. */
typedef struct {
    const void *values;
    const int64_t *places;
    long head_dim;
} Vectors;

INLINE vf load_vector(const Vectors *x, int int8, long token, long i)
{
    int64_t at = x->places[token] * x->head_dim + i;
    return int8 ? load_int8((const int8_t *)x->values + at) : load_bf16((const bf16 *)x->values + at);
}

/* The last head_dim - i < VL numbers, zeros behind them. */
INLINE vf load_rest(const Vectors *x, int int8, long token, long i)
{
    int64_t at = x->places[token] * x->head_dim + i;
    return int8 ? load_int8_part((const int8_t *)x->values + at, x->head_dim - i)
                : load_bf16_part((const bf16 *)x->values + at, x->head_dim - i);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Sums of neighbours: of a in the lower half, of b in the upper. */
INLINE vf add_pairs(vf a, vf b)
{
#if VL == 16
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif VL == 8
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

/* sums: VL vectors in the order query, token; their lanes added are the scores of `tile` queries. */
INLINE void put_scores(vf *sums, int tile, float *scores)
{
    UNROLL for (int i = 0; i < VL / 2; i++)
        sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
    UNROLL for (int i = 0; i < VL / 4; i++)
        sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
    UNROLL for (int i = 0; i < VL / 8; i++)
        sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
    UNROLL for (int i = 0; i < VL / 16; i++)
        sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
    float found[VL];
    store(found, sums[0]);
    for (int j = 0; j < tile; j++)
        memcpy(scores + j * CHUNK, found + j * (VL / tile), VL / tile * sizeof(float));
}

/* SOME tokens from `token` on; q: `tile` queries of `padded` numbers, zeros behind head_dim. */
INLINE void score(const Vectors *k, int int8, const float *q, long padded, int tile, long token, float *scores)
{
    const int block = VL / tile;
    const long whole = k->head_dim / VL * VL;
    for (long first = token; first < token + SOME; first += block) {
        vf sums[VL] = {};
        for (long i = 0; i < whole; i += VL)
            UNROLL for (int t = 0; t < block; t++) {
                vf key = load_vector(k, int8, first + t, i);
                UNROLL for (int j = 0; j < tile; j++)
                    sums[j * block + t] += key * load(q + j * padded + i);
            }
        if (whole < k->head_dim)
            UNROLL for (int t = 0; t < block; t++) {
                vf key = load_rest(k, int8, first + t, whole);
                UNROLL for (int j = 0; j < tile; j++)
                    sums[j * block + t] += key * load(q + j * padded + whole);
            }
        put_scores(sums, tile, scores + first);
    }
}

#ifdef __AVX512BF16__
/* The same with q in bfloat16, by products of pairs. */
INLINE void score_pairs(const Vectors *k, const bf16 *q, long padded, int tile, long token, float *scores)
{
    const int block = VL / tile;
    for (long first = token; first < token + SOME; first += block) {
        vf sums[VL] = {};
        for (long i = 0; i < k->head_dim; i += 2 * VL) {
            const long left = k->head_dim - i;
            const __mmask32 mask = left < 2 * VL ? (1u << left) - 1 : 0xffffffff;
            UNROLL for (int t = 0; t < block; t++) {
                const bf16 *p = (const bf16 *)k->values + k->places[first + t] * k->head_dim + i;
                __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
                UNROLL for (int j = 0; j < tile; j++) {
                    __m512bh query = (__m512bh)_mm512_loadu_si512(q + j * padded + i);
                    sums[j * block + t] = (vf)_mm512_dpbf16_ps((__m512)sums[j * block + t], key, query);
                }
            }
        }
        put_scores(sums, tile, scores + first);
    }
}
#endif

/* Numbers [i, i + wide * VL) of what `tile` query heads, `stride` apart, have mixed of the values, += tokens [first,
   last). part: the last head_dim - i < VL numbers. */
INLINE void mix_part(const Vectors *v, int int8, const float *weights, int tile, int wide, int part, long i,
                     long first, long last, float *to, long stride)
{
    const size_t size = part ? sizeof(float) * (v->head_dim - i) : sizeof(vf);
    vf mixed[TILE][WIDE] = {};
    UNROLL for (int j = 0; j < tile; j++)
        UNROLL for (int w = 0; w < wide; w++)
            memcpy(&mixed[j][w], to + j * stride + i + w * VL, size);
    for (long t = first; t < last; t++)
        UNROLL for (int w = 0; w < wide; w++) {
            vf value = part ? load_rest(v, int8, t, i) : load_vector(v, int8, t, i + w * VL);
            UNROLL for (int j = 0; j < tile; j++)
                mixed[j][w] += value * weights[j * CHUNK + t];
        }
    UNROLL for (int j = 0; j < tile; j++)
        UNROLL for (int w = 0; w < wide; w++)
            memcpy(to + j * stride + i + w * VL, &mixed[j][w], size);
}

INLINE void mix(const Vectors *v, int int8, const float *weights, int tile, long first, long last, float *to,
                long stride)
{
    const long dim = v->head_dim;
    long i = 0;
    for (; i + WIDE * VL <= dim; i += WIDE * VL)
        mix_part(v, int8, weights, tile, WIDE, 0, i, first, last, to, stride);
    for (; i + VL <= dim; i += VL)
        mix_part(v, int8, weights, tile, 1, 0, i, first, last, to, stride);
    if (i < dim)
        mix_part(v, int8, weights, tile, 1, 1, i, first, last, to, stride);
}

typedef struct {
    void (*score)(const Vectors *k, const void *q, long padded, long token, float *scores);
    void (*mix)(const Vectors *v, const float *weights, long first, long last, float *to, long stride);
} Tile;

#ifdef __AVX512BF16__
#define SCORE_BF16(tile) score_pairs(k, q, padded, tile, token, scores)
enum { PAIRS = 1 };
#else
#define SCORE_BF16(tile) score(k, 0, q, padded, tile, token, scores)
enum { PAIRS = 0 };
#endif
#define SCORE_INT8(tile) score(k, 1, q, padded, tile, token, scores)

#define TILE_OF(kind, int8, tile)                                                                                       \
    static void score_##kind##_##tile(const Vectors *k, const void *q, long padded, long token, float *scores)         \
    {                                                                                                                  \
        SCORE_##kind(tile);                                                                                            \
    }                                                                                                                  \
    static void mix_##kind##_##tile(const Vectors *v, const float *weights, long first, long last, float *to,          \
                                    long stride)                                                                       \
    {                                                                                                                  \
        mix(v, int8, weights, tile, first, last, to, stride);                                                          \
    }
TILE_OF(BF16, 0, 1) TILE_OF(BF16, 0, 2) TILE_OF(BF16, 0, 4) TILE_OF(INT8, 1, 1) TILE_OF(INT8, 1, 2) TILE_OF(INT8, 1, 4)

/* By int8 and tile. */
static const Tile TILES[2][TILE + 1] = {
    {[1] = {score_BF16_1, mix_BF16_1}, [2] = {score_BF16_2, mix_BF16_2}, [4] = {score_BF16_4, mix_BF16_4}},
    {[1] = {score_INT8_1, mix_INT8_1}, [2] = {score_INT8_2, mix_INT8_2}, [4] = {score_INT8_4, mix_INT8_4}},
};

static long seen_from(const Decode *job, long sequence)
{
    long length = job->context_lens[sequence];
    return job->window && length > job->window ? length - job->window : 0;
}

/* Part of the KV heads over one chunk of a sequence. */
typedef struct {
    const Decode *job;
    long sequence, number, tokens, first_head, last_head; /* query heads */
    int64_t places[CHUNK];                                /* of the tokens; the last one's behind them */
} Chunk;

static void find_places(Chunk *chunk, long first_token)
{
    const Decode *job = chunk->job;
    const Pages *p = &job->pages;
    const int32_t *block = job->block_tables + chunk->sequence * job->table_width + first_token / p->block_size;
    const int64_t layer = job->layer * layer_vectors(p), step = p->kv_heads * p->block_size;
    int64_t place = first_token % p->block_size;
    for (long i = 0; i < chunk->tokens; i++, place++) {
        if (place == p->block_size) {
            block++;
            place = 0;
        }
        chunk->places[i] = layer + *block * step + place;
    }
    for (long i = chunk->tokens; i < CHUNK; i++)
        chunk->places[i] = chunk->places[chunk->tokens - 1];
}

static Vectors vectors_of(const Chunk *chunk, const void *values, long head)
{
    const Pages *p = &chunk->job->pages;
    const long kv_head = head / (chunk->job->heads / p->kv_heads), bytes = p->k_scales ? 1 : 2;
    return (Vectors){(const char *)values + kv_head * p->block_size * p->head_dim * bytes, chunk->places, p->head_dim};
}

/* The largest number of query heads from `head` on that share a KV head and have a tile. */
static long tile_at(const Chunk *chunk, long head)
{
    const long group = chunk->job->heads / chunk->job->pages.kv_heads, left = group - head % group;
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static void find_scores(const Chunk *chunk, float *scores)
{
    const Decode *job = chunk->job;
    const long dim = job->pages.head_dim, padded = (dim + 31) / 32 * 32, heads = chunk->last_head - chunk->first_head;
    const int int8 = job->pages.k_scales != NULL, pairs = PAIRS && !int8;
    const bf16 *from = job->q + chunk->sequence * job->q_stride + chunk->first_head * dim;
    float q[heads * padded];
    memset(q, 0, sizeof q);
    for (long head = 0; head < heads; head++)
        for (long i = 0; i < dim; i++)
            if (pairs)
                ((bf16 *)q)[head * padded + i] = from[head * dim + i];
            else
                q[head * padded + i] = to_float(from[head * dim + i]);
    for (long token = 0; token < chunk->tokens; token += SOME)
        for (long head = 0, tile; head < heads; head += tile) {
            tile = tile_at(chunk, chunk->first_head + head);
            Vectors k = vectors_of(chunk, job->pages.k, chunk->first_head + head);
            const char *own = (const char *)q + head * padded * (pairs ? sizeof(bf16) : sizeof(float));
            TILES[int8][tile].score(&k, own, padded, token, scores + head * CHUNK);
        }
}

/* x[t] *= the scale of the vector of token t */
static void apply_scales(const Chunk *chunk, const float *scales, long head, float *x)
{
    const Pages *p = &chunk->job->pages;
    const float *own = scales + head / (chunk->job->heads / p->kv_heads) * p->block_size;
    for (long t = 0; t < chunk->tokens; t++)
        x[t] *= own[chunk->places[t]];
}

/* Scores -> exponentials of their distance to the largest, in place; the largest and the sum into `to`. */
static void exponentials(float *scores, float scale, long tokens, float *to)
{
    vf most = splat(-INFINITY), total = {};
    for (long t = tokens; t % VL; t++)
        scores[t] = -INFINITY;
    for (long t = 0; t < tokens; t += VL) {
        store(scores + t, load(scores + t) * scale);
        most = vmax(load(scores + t), most);
    }
    float largest = largest_lane(most);
    for (long t = 0; t < tokens; t += VL) {
        vf weight = vexp(load(scores + t) - largest);
        store(scores + t, weight);
        total += weight;
    }
    to[0] = largest;
    to[1] = sum(total);
}

static void attend(const Chunk *chunk)
{
    const Decode *job = chunk->job;
    const Pages *p = &job->pages;
    const long stride = p->head_dim + 2, heads = chunk->last_head - chunk->first_head;
    const int int8 = p->k_scales != NULL;
    float scores[heads * CHUNK], *to = job->partial + (chunk->number * job->heads + chunk->first_head) * stride;
    find_scores(chunk, scores);
    memset(to, 0, sizeof(float) * heads * stride);
    for (long head = 0; head < heads; head++) {
        float *own = scores + head * CHUNK;
        if (int8)
            apply_scales(chunk, p->k_scales, chunk->first_head + head, own);
        exponentials(own, job->scale, chunk->tokens, to + head * stride);
        if (int8)
            apply_scales(chunk, p->v_scales, chunk->first_head + head, own);
    }
    for (long token = 0; token < chunk->tokens; token += SOME)
        for (long head = 0, tile; head < heads; head += tile) {
            long last = token + SOME < chunk->tokens ? token + SOME : chunk->tokens;
            tile = tile_at(chunk, chunk->first_head + head);
            Vectors v = vectors_of(chunk, p->v, chunk->first_head + head);
            TILES[int8][tile].mix(&v, scores + head * CHUNK, token, last, to + head * stride + 2, stride);
        }
}

static void attend_item(void *arg, long item)
{
    const Decode *job = arg;
    const long parts = job->pages.kv_heads / job->kv_heads_per_item;
    const long heads = job->heads / parts;
    Chunk chunk = {.job = job, .number = item / parts};
    chunk.first_head = item % parts * heads;
    chunk.last_head = chunk.first_head + heads;
    while (job->first_chunk[chunk.sequence + 1] <= chunk.number)
        chunk.sequence++;
    long first = seen_from(job, chunk.sequence) + (chunk.number - job->first_chunk[chunk.sequence]) * CHUNK;
    long left = job->context_lens[chunk.sequence] - first;
    chunk.tokens = left < CHUNK ? left : CHUNK;
    find_places(&chunk, first);
    attend(&chunk);
}

static void merge_head(void *arg, long item)
{
    const Decode *job = arg;
    const long sequence = item / job->heads, dim = job->pages.head_dim, stride = job->heads * (dim + 2);
    const long first = job->first_chunk[sequence], last = job->first_chunk[sequence + 1];
    const float *parts = job->partial + item % job->heads * (dim + 2);
    float most = -INFINITY, total = 0, mixed[dim];
    memset(mixed, 0, sizeof mixed);
    for (long c = first; c < last; c++)
        most = parts[c * stride] > most ? parts[c * stride] : most;
    for (long c = first; c < last; c++) {
        const float *part = parts + c * stride;
        float weight = last - first == 1 ? 1 : expf(part[0] - most);
        total += weight * part[1];
        for (long i = 0; i < dim; i++)
            mixed[i] += weight * part[2 + i];
    }
    for (long i = 0; i < dim; i++)
        job->out[item * dim + i] = to_bf16(mixed[i] / total);
}

static void run(void (*work)(void *, long), Decode *job, long items, long multiplications)
{
    if (multiplications > SMALL) {
        pool_take();
        pool_run(work, job, items);
        pool_give();
        return;
    }
    for (long i = 0; i < items; i++)
        work(job, i);
}

/* q: (sequences, heads, head_dim), its rows q_stride numbers apart, each over the last `window` (0: all) of the
   context_lens (sequences) tokens that block_tables (sequences, table_width) leads to -> out (sequences, heads,
   head_dim). Returns 0, or 1 without memory. */
MMDIST_API int mmdist_decode_attention(const Pages *pages, long layer, const bf16 *q, long q_stride, bf16 *out,
                                       long sequences, long heads, const int32_t *block_tables, long table_width,
                                       const int32_t *context_lens, long window, float scale)
{
    long first_chunk[sequences + 1], tokens = 0;
    Decode job = {.pages = *pages, .layer = layer, .heads = heads, .window = window, .q = q, .out = out};
    job.block_tables = block_tables;
    job.context_lens = context_lens;
    job.q_stride = q_stride;
    job.table_width = table_width;
    job.scale = scale;
    first_chunk[0] = 0;
    for (long i = 0; i < sequences; i++) {
        long seen = context_lens[i] - seen_from(&job, i);
        first_chunk[i + 1] = first_chunk[i] + (seen + CHUNK - 1) / CHUNK;
        tokens += seen;
    }
    long chunks = first_chunk[sequences], kv_heads = pages->kv_heads, each = kv_heads;
    while (each % 2 == 0 && chunks * kv_heads / each < ITEMS)
        each /= 2;
    job.kv_heads_per_item = each;
    job.first_chunk = first_chunk;
    job.partial = malloc(sizeof(float) * chunks * heads * (pages->head_dim + 2));
    if (job.partial == NULL)
        return 1;
    run(attend_item, &job, chunks * kv_heads / each, tokens * heads * pages->head_dim);
    run(merge_head, &job, sequences * heads, chunks * heads * pages->head_dim);
    free(job.partial);
    return 0;
}
