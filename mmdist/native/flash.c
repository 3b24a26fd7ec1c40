/* Attention of many queries at once, for prompts and pictures, in bfloat16 with float32 softmax.

   LANES_OF_QUERIES queries of a head lie in the lanes of the vectors, keys and values are broadcast to them, so that
   largest scores and sums need no step across lanes. Keys are taken in tiles, with a running largest score
   (FlashAttention, arXiv:2205.14135); the products are dot_block's, once with the queries as the block and keys as the
   rows of x, once with the weights as the block and the columns of the values as the rows of x. */
#include <math.h>
#include <stdlib.h>

#include "block.h"
#include "vec.h"

#if defined(__AVX512F__)
enum { MANY = 8 }; /* keys, or columns of values, that meet a block at once */
#else
enum { MANY = 2 };
#endif
enum { QUERIES = ROWS, TILE = 128, TILE_PAIRS = TILE / 2, MAX_DIM = 256 };

typedef struct {
    const bf16 *q, *k, *v;
    bf16 *out;
    int64_t batch, queries, context, heads, kv_heads, head_dim; /* out: (batch, queries, heads, head_dim) */
    int64_t q_batch, q_stride, kv_batch, kv_stride;             /* numbers from one sequence, and token, to the next */
    int64_t causal, window;                                     /* window 0: none */
    float scale;
} Attention;

typedef struct {
    const Attention *a;
    uint32_t *k, *v; /* (batch, kv_heads) x panels of MANY keys: [pair of columns][MANY], of columns: [pair of keys][MANY] */
    long key_words, value_words, padded; /* words of one head; context in whole tiles */
} Packed;

static uint32_t two(bf16 low, bf16 high)
{
    return low | (uint32_t)high << 16;
}

static void pack_head(void *arg, long item)
{
    const Packed *p = arg;
    const Attention *a = p->a;
    const long dim = a->head_dim, at = item / a->kv_heads * a->kv_batch + item % a->kv_heads * dim;
    const bf16 *k = a->k + at, *v = a->v + at;
    uint32_t *to_k = p->k + item * p->key_words, *to_v = p->v + item * p->value_words;
    for (long token = 0; token < p->padded; token++)
        for (long pair = 0; pair < dim / 2; pair++) {
            uint32_t word = 0;
            if (token < a->context)
                memcpy(&word, k + token * a->kv_stride + 2 * pair, 4);
            to_k[(token / MANY * (dim / 2) + pair) * MANY + token % MANY] = word;
        }
    for (long pair = 0; pair < p->padded / 2; pair++) {
        const bf16 *first = v + 2 * pair * a->kv_stride, *second = first + a->kv_stride;
        for (long i = 0; i < dim; i++) {
            bf16 low = 2 * pair < a->context ? first[i] : 0, high = 2 * pair + 1 < a->context ? second[i] : 0;
            to_v[(i / MANY * (p->padded / 2) + pair) * MANY + i % MANY] = two(low, high);
        }
    }
}

static void dot_panel(const uint32_t *words, const uint32_t *x, long pairs, float *total)
{
    dot_block(BF16, MANY, words, x, pairs, total, 0, total);
}

/* A block of queries on its way through the context. */
typedef struct {
    _Alignas(64) uint32_t q[MAX_DIM / 2 * QUERIES];
    _Alignas(64) float scores[TILE * QUERIES], mixed[MAX_DIM * QUERIES], most[QUERIES], sums[QUERIES];
    _Alignas(64) uint32_t weights[TILE_PAIRS * QUERIES];
} Work;

static void load_queries(const Attention *a, const bf16 *q, long count, Work *work)
{
    for (long pair = 0; pair < a->head_dim / 2; pair++)
        for (long i = 0; i < QUERIES; i++) {
            uint32_t word = 0;
            if (i < count)
                memcpy(&word, q + i * a->q_stride + 2 * pair, 4);
            work->q[pair * QUERIES + i] = word;
        }
    memset(work->mixed, 0, (size_t)(a->head_dim * QUERIES) * sizeof(float));
    for (long i = 0; i < QUERIES; i++) {
        work->most[i] = -1e30f; /* below any score, and finite, so that a tile without one changes nothing */
        work->sums[i] = 0;
    }
}

/* A tile of keys first .. first + count - 1 for queries from `position` of the context on. */
typedef struct {
    long first, count, position;
    int masked; /* some query may not see some key */
} Tile;

static Tile find_tile(const Attention *a, long first, long position, long end)
{
    const long count = end - first < TILE ? (end - first + 7) / 8 * 8 : TILE; /* dot_block takes 4 pairs at a time */
    const long last = a->causal ? position : a->context - 1; /* the last key that the first query sees */
    const int sees_all = first + count - 1 <= last && (!a->window || first > position + QUERIES - 1 - a->window);
    return (Tile){first, count, position, !sees_all};
}

/* Vector `v` of queries: minus infinity for those that may not see the key. */
INLINE vf hide(const Attention *a, const Tile *tile, vf score, long key, int v)
{
    static const vi lanes = {0, 1, 2, 3,
#if VL >= 8
                             4, 5, 6, 7,
#endif
#if VL == 16
                             8, 9, 10, 11, 12, 13, 14, 15
#endif
    };
    const int32_t at = (int32_t)(tile->position + v * VL), last = (int32_t)a->context - 1;
    vi position = a->causal ? lanes + at : lanes * 0 + last, seen = position >= (int32_t)key;
    if (a->window)
        seen &= lanes + (at - (int32_t)a->window) < (int32_t)key;
    return choose(seen, score, splat(-INFINITY));
}

/* So that cutting off the lower half rounds to bfloat16, for what is no infinity. */
INLINE vu round_up(vu bits)
{
    return bits + 0x7fff + (bits >> 16 & 1);
}

/* Scores of the tile -> exponentials of their distance to the largest so far, as pairs of bfloat16. */
INLINE void weigh(const Attention *a, const Tile *tile, Work *work, int v)
{
    const long at = v * VL;
    vf before = load(work->most + at), most = before, sum = {};
    for (long key = 0; key < tile->count; key++) {
        vf score = load(work->scores + key * QUERIES + at) * a->scale;
        if (tile->masked)
            score = hide(a, tile, score, tile->first + key, v);
        store(work->scores + key * QUERIES + at, score);
        most = vmax(score, most);
    }
    for (long pair = 0; pair < tile->count / 2; pair++) {
        vf low = vexp(load(work->scores + 2 * pair * QUERIES + at) - most);
        vf high = vexp(load(work->scores + (2 * pair + 1) * QUERIES + at) - most);
        sum += low + high;
        vu words = round_up((vu)low) >> 16 | (round_up((vu)high) & 0xffff0000u);
        memcpy(work->weights + pair * QUERIES + at, &words, sizeof words);
    }
    vf factor = vexp(before - most);
    store(work->most + at, most);
    store(work->sums + at, load(work->sums + at) * factor + sum);
    for (long i = 0; i < a->head_dim; i++)
        store(work->mixed + i * QUERIES + at, load(work->mixed + i * QUERIES + at) * factor);
}

static void attend_tile(const Packed *p, const uint32_t *k, const uint32_t *v, const Tile *tile, Work *work)
{
    const long pairs = p->a->head_dim / 2;
    memset(work->scores, 0, (size_t)(tile->count * QUERIES) * sizeof(float));
    for (long key = 0; key < tile->count; key += MANY)
        dot_panel(work->q, k + (tile->first + key) * pairs, pairs, work->scores + key * QUERIES);
    for (int part = 0; part < VECTORS; part++)
        weigh(p->a, tile, work, part);
    for (long i = 0; i < p->a->head_dim; i += MANY)
        dot_panel(work->weights, v + i * (p->padded / 2) + tile->first / 2 * MANY, tile->count / 2,
                  work->mixed + i * QUERIES);
}

static void attend_block(void *arg, long item)
{
    const Packed *p = arg;
    const Attention *a = p->a;
    const long blocks = (a->queries + QUERIES - 1) / QUERIES, batch = item / (a->heads * blocks);
    /* The last queries see most: they come first. */
    const long head = item / blocks % a->heads, first = (blocks - 1 - item % blocks) * QUERIES;
    const long count = a->queries - first < QUERIES ? a->queries - first : QUERIES;
    const long position = a->context - a->queries + first, kv = batch * a->kv_heads + head / (a->heads / a->kv_heads);
    const long end = a->causal ? position + count : a->context;
    const long begin = a->window && position - a->window > 0 ? position - a->window : 0;
    Work work;
    load_queries(a, a->q + batch * a->q_batch + first * a->q_stride + head * a->head_dim, count, &work);
    for (long at = begin / TILE * TILE; at < end; at += TILE) {
        Tile tile = find_tile(a, at, position, end);
        attend_tile(p, p->k + kv * p->key_words, p->v + kv * p->value_words, &tile, &work);
    }
    for (long i = 0; i < count; i++) {
        const float share = 1 / work.sums[i];
        bf16 *out = a->out + ((batch * a->queries + first + i) * a->heads + head) * a->head_dim;
        for (long j = 0; j < a->head_dim; j++)
            out[j] = to_bf16(work.mixed[j * QUERIES + i] * share);
    }
}

/* 0; 1 without memory. head_dim: a multiple of 8, at most MAX_DIM. Causal queries are the last of the context. */
MMDIST_API int mmdist_attention(const Attention *a)
{
    const long heads = a->batch * a->kv_heads, padded = (a->context + TILE - 1) / TILE * TILE;
    Packed packed = {a, NULL, NULL, padded * a->head_dim / 2, padded * a->head_dim / 2, padded};
    packed.k = aligned_alloc(64, (size_t)(2 * heads * packed.key_words) * 4);
    if (packed.k == NULL)
        return 1;
    packed.v = packed.k + heads * packed.key_words;
    pool_take();
    pool_run(pack_head, &packed, heads);
    pool_run(attend_block, &packed, a->batch * a->heads * ((a->queries + QUERIES - 1) / QUERIES));
    pool_give();
    free(packed.k);
    return 0;
}
