/* y = x W^T + b in bfloat16 over packed weights: bfloat16 (whole, or without loss in 12 bits), int8 or int4 ones,
   accumulated in float32.

   A packed weight is a row of blocks, each of ROWS rows of W (the last one filled up with zeros). In a block, columns go
   in words of 32 bits, one a row, ROWS words after each other; a word's halves hold the even and the odd columns:
     bfloat16: columns 0 | 1                       (the pairs that vdpbf16ps takes)
     int8:     bytes   0, 2 | 1, 3
     int4:     nibbles 0, 2, 4, 6 | 1, 3, 5, 7
     BF12:     three for 8 columns, see pack.c
   so that one contiguous stream is read once, whatever the number of rows of x. Columns come in multiples of COLUMNS.
   Integers become bfloat16 exactly, in registers; their scale (one for each row and group of columns) comes after. */
#include "pack.h"

#include <stdlib.h>

enum { PACK_PAIRS = 512, CHUNK = 1024, PANELS = 64 }; /* pairs of columns; panels */

typedef void (*Block)(const uint32_t *words, const uint32_t *x, long pairs, const float *scale, uint32_t top,
                      float *total);

#define BLOCK(kind, many)                                                                                               \
    static void block_##kind##_##many(const uint32_t *words, const uint32_t *x, long pairs, const float *scale,        \
                                      uint32_t top, float *total)                                                      \
    {                                                                                                                  \
        dot_block(kind, many, words, x, pairs, scale, top, total);                                                     \
    }
#define BLOCKS(many) BLOCK(BF16, many) BLOCK(INT8, many) BLOCK(INT4, many) BLOCK(BF12, many)
#define NAMES(many) {block_BF16_##many, block_INT8_##many, block_INT4_##many, block_BF12_##many}

/* Sizes of panels, the rows of x that go together; a panel is filled up with rows of zeros. */
BLOCKS(1) BLOCKS(2)
#if defined(__AVX512F__)
BLOCKS(3) BLOCKS(4) BLOCKS(6) BLOCKS(8) BLOCKS(10) BLOCKS(12)
static const int SIZES[] = {1, 2, 3, 4, 6, 8, 10, 12};
static const Block FUNCTIONS[][4] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4), NAMES(6), NAMES(8), NAMES(10), NAMES(12)};
#elif defined(__AVX2__)
BLOCKS(3)
static const int SIZES[] = {1, 2, 3};
static const Block FUNCTIONS[][4] = {NAMES(1), NAMES(2), NAMES(3)};
#else
static const int SIZES[] = {1, 2};
static const Block FUNCTIONS[][4] = {NAMES(1), NAMES(2)};
#endif

typedef struct {
    const Block *blocks;        /* by kind, for `many` rows of x */
    const uint32_t *weight, *x; /* x: panels of `many` rows, side by side */
    const float *scales;        /* of integers */
    Short rest;                 /* of BF12 */
    const bf16 *bias;
    bf16 *y;
    Kind kind;
    long num_rows, many, panels, out, pairs, groups, words; /* words of a block of the weight */
} Linear;

static void write_panel(const Linear *job, long block, long panel, const float *total)
{
    long first = block * ROWS, last = first + ROWS < job->out ? first + ROWS : job->out;
    for (long m = 0; m < job->many && panel * job->many + m < job->num_rows; m++) {
        bf16 *y = job->y + (panel * job->many + m) * job->out;
        for (long row = first; row < last; row++) {
            float bias = job->bias == NULL ? 0 : to_float(job->bias[row]);
            y[row] = to_bf16(total[m * ROWS + row - first] + bias);
        }
    }
}

/* Some columns of a block, in pairs, and how they lie at `words`. */
typedef struct {
    Kind kind;
    const uint32_t *words;
    long block, first, last;
} Columns;

static void dot_columns(const Linear *job, const Columns *columns, long panel, float *total)
{
    static const float ones[ROWS];
    const long group_pairs = job->pairs / job->groups, block = columns->block;
    const uint32_t top = columns->kind == BF12 ? job->rest.tops[block] : 0, *words = columns->words;
    for (long pair = columns->first, end; pair < columns->last; pair = end) {
        const long group = pair / group_pairs;
        end = (group + 1) * group_pairs < columns->last ? (group + 1) * group_pairs : columns->last;
        const float *scale = job->scales == NULL ? ones : job->scales + (block * job->groups + group) * ROWS;
        job->blocks[columns->kind](words, job->x + (panel * job->pairs + pair) * job->many, end - pair, scale, top, total);
        words += (end - pair) * WORDS_IN_TURN[columns->kind] / 4 * ROWS;
    }
}

/* One block of the weight with some panels of x. A chunk of its columns stays in the cache while the panels pass, and
   is made whole once for all of them. */
static void dot_panels(const Linear *job, long block, long first, long last)
{
    float totals[PANELS][MOST * ROWS];
    uint32_t whole[CHUNK * ROWS] __attribute__((aligned(64)));
    memset(totals, 0, (size_t)(last - first) * sizeof *totals);
    if (job->kind == BF12)
        fetch_others(&job->rest, block);
    for (long at = 0; at < job->pairs; at += CHUNK) {
        const long end = at + CHUNK < job->pairs ? at + CHUNK : job->pairs;
        const uint32_t *words = job->weight + block * job->words + at * WORDS_IN_TURN[job->kind] / 4 * ROWS;
        Columns columns = {job->kind, words, block, at, end};
        if (job->kind == BF12 && last - first > 1) {
            make_whole(words, end - at, job->rest.tops[block], whole);
            columns.kind = BF16, columns.words = whole;
        }
        for (long panel = first; panel < last; panel++)
            dot_columns(job, &columns, panel, totals[panel - first]);
    }
    for (long panel = first; panel < last; panel++) {
        if (job->kind == BF12)
            add_others(&job->rest, block, job->x + panel * job->pairs * job->many, job->many, totals[panel - first]);
        write_panel(job, block, panel, totals[panel - first]);
    }
}

static void linear_block(void *arg, long block)
{
    const Linear *job = arg;
    for (long first = 0; first < job->panels; first += PANELS)
        dot_panels(job, block, first, first + PANELS < job->panels ? first + PANELS : job->panels);
}

typedef struct {
    const bf16 *x;
    uint32_t *to;
    long num_rows, many, pairs, parts;
} Panels;

/* A part of a panel's columns, its rows side by side. */
static void pack_panel(void *arg, long item)
{
    const Panels *job = arg;
    long panel = item / job->parts, first = item % job->parts * PACK_PAIRS, last = first + PACK_PAIRS;
    last = last < job->pairs ? last : job->pairs;
    for (long m = 0; m < job->many; m++) {
        uint32_t *to = job->to + panel * job->pairs * job->many + m;
        long row = panel * job->many + m;
        const char *from = (const char *)(job->x + row * job->pairs * 2);
        for (long pair = first; pair < last; pair++) {
            uint32_t value = 0;
            if (row < job->num_rows)
                memcpy(&value, from + pair * 4, 4);
            to[pair * job->many] = value;
        }
    }
}

static uint32_t *scratch(size_t bytes)
{
    static uint32_t *kept;
    static size_t size;
    if (bytes > size) {
        free(kept);
        size = (bytes + 4095) / 4096 * 4096;
        kept = aligned_alloc(4096, size);
        if (kept == NULL)
            abort();
    }
    return kept;
}

/* y (num_rows, out) = x (num_rows, columns) W^T * scales + bias. side: of integers their scales [block][group][ROWS],
   of BF12 what mmdist_shorten leaves beside the words, else NULL; bias: NULL for none. columns: a multiple of COLUMNS,
   and of groups * COLUMNS. */
MMDIST_API void mmdist_linear(int kind, const uint32_t *weight, const void *side, long groups, const bf16 *bias,
                              const bf16 *x, bf16 *y, long num_rows, long out, long columns)
{
    pool_take();
    long panels = (num_rows + MOST - 1) / MOST, size = 0;
    while (SIZES[size] * panels < num_rows)
        size++;
    long many = SIZES[size], pairs = columns / 2, parts = (pairs + PACK_PAIRS - 1) / PACK_PAIRS;
    long blocks = (out + ROWS - 1) / ROWS;
    const uint32_t *panel_x = (const uint32_t *)x;
    if (many > 1) {
        uint32_t *to = scratch((size_t)(panels * many * pairs) * 4);
        pool_run(pack_panel, &(Panels){x, to, num_rows, many, pairs, parts}, panels * parts);
        panel_x = to;
    }
    Linear job = {.blocks = FUNCTIONS[size], .weight = weight, .x = panel_x, .bias = bias, .y = y, .kind = kind,
                  .num_rows = num_rows, .many = many, .panels = panels, .out = out, .pairs = pairs, .groups = groups,
                  .words = pairs / 4 * WORDS_IN_TURN[kind] * ROWS};
    if (kind == BF12)
        job.rest = open_short(side, blocks);
    else
        job.scales = side;
    pool_run(linear_block, &job, blocks);
    pool_give();
}
