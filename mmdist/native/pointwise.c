/* What stands between the matrix products of a layer. Numbers as mmdist.kernels.plain has them in bfloat16. */
#include "pages.h"
#include "pool.h"
#include "vec.h"

#include <math.h>

/* Numbers that one thread is through with before others have woken up, and those worth an item of the pool. */
enum { SMALL = 32768, PORTION = 8192 };

typedef struct {
    void (*work)(void *, long);
    void *arg;
    long items, portion;
} Spread;

static void run_portion(void *arg, long number)
{
    const Spread *job = arg;
    long last = (number + 1) * job->portion;
    for (long i = number * job->portion; i < last && i < job->items; i++)
        job->work(job->arg, i);
}

static void spread(void (*work)(void *, long), void *arg, long items, long numbers)
{
    Spread job = {work, arg, items, numbers > SMALL ? 1 + PORTION * items / numbers : items};
    if (numbers <= SMALL) {
        run_portion(&job, 0);
        return;
    }
    pool_take();
    pool_run(run_portion, &job, (items + job.portion - 1) / job.portion);
    pool_give();
}

INLINE vf load_some(const bf16 *p, long n)
{
    return n < VL ? load_bf16_part(p, n) : load_bf16(p);
}

INLINE void store_some(bf16 *p, vf x, long n)
{
    if (n < VL)
        store_bf16_part(p, x, n);
    else
        store_bf16(p, x);
}

typedef struct {
    const bf16 *x, *y, *weight;
    bf16 *sum, *out;
    long hidden;
    float eps;
} Norm;

static void scale_row(const bf16 *x, const bf16 *weight, bf16 *out, long hidden, float squares, float eps)
{
    float inverse = 1.0f / sqrtf(squares / hidden + eps);
    for (long i = 0; i < hidden; i += VL) {
        long n = hidden - i;
        store_some(out + i, rounded(load_some(x + i, n) * inverse) * load_some(weight + i, n), n);
    }
}

static void norm_row(void *arg, long row)
{
    const Norm *job = arg;
    const bf16 *x = job->x + row * job->hidden;
    vf squares = {};
    for (long i = 0; i < job->hidden; i += VL) {
        vf some = load_some(x + i, job->hidden - i);
        squares += some * some;
    }
    scale_row(x, job->weight, job->out + row * job->hidden, job->hidden, sum(squares), job->eps);
}

static void add_norm_row(void *arg, long row)
{
    const Norm *job = arg;
    const bf16 *x = job->x + row * job->hidden, *y = job->y + row * job->hidden;
    bf16 *total = job->sum + row * job->hidden;
    vf squares = {};
    for (long i = 0; i < job->hidden; i += VL) {
        long n = job->hidden - i;
        vf some = rounded(load_some(x + i, n) + load_some(y + i, n));
        store_some(total + i, some, n);
        squares += some * some;
    }
    scale_row(total, job->weight, job->out + row * job->hidden, job->hidden, sum(squares), job->eps);
}

/* x, out (rows, hidden), weight (hidden). */
MMDIST_API void mmdist_rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, long rows, long hidden,
                                float eps)
{
    Norm job = {.x = x, .weight = weight, .out = out, .hidden = hidden, .eps = eps};
    spread(norm_row, &job, rows, rows * hidden);
}

/* sum = x + y, out = rms_norm(sum); all (rows, hidden). */
MMDIST_API void mmdist_add_rms_norm(const bf16 *x, const bf16 *y, const bf16 *weight, bf16 *sum,
                                    bf16 *out, long rows, long hidden, float eps)
{
    Norm job = {x, y, weight, sum, out, hidden, eps};
    spread(add_norm_row, &job, rows, rows * hidden);
}

enum { GATED_BLOCK = 1024 };

typedef struct {
    const bf16 *gate_up;
    bf16 *out;
    long width, blocks;
} Gated;

static void gated_block(void *arg, long item)
{
    const Gated *job = arg;
    long row = item / job->blocks, first = item % job->blocks * GATED_BLOCK;
    long last = first + GATED_BLOCK < job->width ? first + GATED_BLOCK : job->width;
    const bf16 *gate = job->gate_up + row * 2 * job->width, *up = gate + job->width;
    for (long i = first; i < last; i += VL) {
        vf x = load_some(gate + i, last - i);
        vf silu = rounded(x / (1.0f + vexp(-x)));
        store_some(job->out + row * job->width + i, silu * load_some(up + i, last - i), last - i);
    }
}

/* gate_up (rows, gate width | up width) -> out (rows, width) = silu(gate) * up. */
MMDIST_API void mmdist_gated_silu(const bf16 *gate_up, bf16 *out, long rows, long width)
{
    Gated job = {gate_up, out, width, (width + GATED_BLOCK - 1) / GATED_BLOCK};
    spread(gated_block, &job, rows * job.blocks, 4 * rows * width); /* an exponential costs four others */
}

typedef struct {
    Pages pages;
    long layer, heads;
    bf16 *qkv;
    const bf16 *cos, *sin;
    const int64_t *slots;
} Rotation;

/* In place; each product and the sum are rounded, as torch does. */
static void rotate(bf16 *x, const bf16 *cos, const bf16 *sin, long head_dim)
{
    long half = head_dim / 2;
    for (long i = 0; i < half; i += VL) {
        long n = half - i;
        vf first = load_some(x + i, n), second = load_some(x + half + i, n);
        vf left = rounded(first * load_some(cos + i, n)), right = rounded(second * load_some(sin + i, n));
        vf low = rounded(second * load_some(cos + half + i, n)), high = rounded(first * load_some(sin + half + i, n));
        store_some(x + i, left - right, n);
        store_some(x + half + i, low + high, n);
    }
}

/* Int8Pages.write: x becomes what will be read. */
static void store_int8(bf16 *x, int8_t *values, float *scale, long head_dim)
{
    vf largest = {};
    vi nan = {};
    for (long i = 0; i < head_dim; i += VL) {
        vf some = load_some(x + i, head_dim - i);
        largest = vmax(vabs(some), largest);
        nan |= some != some;
    }
    float step = any(nan) ? NAN : largest_lane(largest) / 127.0f;
    if (step < 1.17549435e-38f) step = 1.17549435e-38f; /* the smallest normal float; NaN stays */
    const float magic = 12582912.0f;
    for (long i = 0; i < head_dim; i += VL) {
        long n = head_dim - i;
        vf whole = (load_some(x + i, n) / step + magic) - magic;
        whole = choose(whole == whole, whole, splat(0));
        vb bytes = __builtin_convertvector(__builtin_convertvector(whole, vi), vb);
        memcpy(values + i, &bytes, n < VL ? n : VL);
        store_some(x + i, whole * step, n);
    }
    *scale = step;
}

static void keep(const Rotation *job, bf16 *x, void *pages, float *scales, long token, long head)
{
    const Pages *p = &job->pages;
    int64_t at = job->layer * layer_vectors(p) + first_vector(p, job->slots[token]) + head * p->block_size;
    if (scales)
        store_int8(x, (int8_t *)pages + at * p->head_dim, scales + at, p->head_dim);
    else
        memcpy((bf16 *)pages + at * p->head_dim, x, 2 * p->head_dim);
}

static void rotate_token(void *arg, long token)
{
    const Rotation *job = arg;
    long dim = job->pages.head_dim, kv_heads = job->pages.kv_heads;
    bf16 *q = job->qkv + token * (job->heads + 2 * kv_heads) * dim, *k = q + job->heads * dim,
             *v = k + kv_heads * dim;
    const bf16 *cos = job->cos + token * dim, *sin = job->sin + token * dim;
    for (long head = 0; head < job->heads + kv_heads; head++)
        rotate(q + head * dim, cos, sin, dim);
    for (long head = 0; head < kv_heads; head++) {
        keep(job, k + head * dim, job->pages.k, job->pages.k_scales, token, head);
        keep(job, v + head * dim, job->pages.v, job->pages.v_scales, token, head);
    }
}

/* Rotate q and k of qkv (tokens, heads + 2 kv_heads, head_dim) in place by cos, sin (tokens, head_dim) and store k and
   v in the layer's pages at slots (tokens); k and v become what will be read. */
MMDIST_API void mmdist_rotate_store(const Pages *pages, long layer, bf16 *qkv, long tokens, long heads,
                                    const bf16 *cos, const bf16 *sin, const int64_t *slots)
{
    Rotation job = {*pages, layer, heads, qkv, cos, sin, slots};
    spread(rotate_token, &job, tokens, tokens * (heads + 2 * pages->kv_heads) * pages->head_dim);
}
