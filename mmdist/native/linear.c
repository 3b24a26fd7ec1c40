/* y = x W^T + b in bfloat16 over packed weights: bfloat16, int8 or int4 ones, accumulated in float32.

   A packed weight is a row of blocks, each of ROWS rows of W (the last one filled up with zeros). In a block, columns go
   in words of 32 bits, one a row, ROWS words after each other; a word's halves hold the even and the odd columns:
     bfloat16: columns 0 | 1                       (the pairs that vdpbf16ps takes)
     int8:     bytes   0, 2 | 1, 3
     int4:     nibbles 0, 2, 4, 6 | 1, 3, 5, 7
   so that one contiguous stream is read once, whatever the number of rows of x. Columns come in multiples of COLUMNS.
   Integers become bfloat16 exactly, in registers; their scale (one for each row and group of columns) comes after. */
#include "block.h"

#include <stdlib.h>

enum { PACK_PAIRS = 512, CHUNK = 1024, PANELS = 64 }; /* pairs of columns; panels */

typedef void (*Block)(const uint32_t *words, const uint32_t *x, long pairs, const float *scale, float *total);

#define BLOCK(kind, many)                                                                                               \
    static void block_##kind##_##many(const uint32_t *words, const uint32_t *x, long pairs, const float *scale,        \
                                      float *total)                                                                    \
    {                                                                                                                  \
        dot_block(kind, many, words, x, pairs, scale, total);                                                          \
    }
#define BLOCKS(many) BLOCK(BF16, many) BLOCK(INT8, many) BLOCK(INT4, many)
#define NAMES(many) {block_BF16_##many, block_INT8_##many, block_INT4_##many}

/* Sizes of panels, the rows of x that go together; a panel is filled up with rows of zeros. */
BLOCKS(1) BLOCKS(2)
#if defined(__AVX512F__)
BLOCKS(3) BLOCKS(4) BLOCKS(6) BLOCKS(8) BLOCKS(10) BLOCKS(12)
static const int SIZES[] = {1, 2, 3, 4, 6, 8, 10, 12};
static const Block FUNCTIONS[][3] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4), NAMES(6), NAMES(8), NAMES(10), NAMES(12)};
#elif defined(__AVX2__)
BLOCKS(3)
static const int SIZES[] = {1, 2, 3};
static const Block FUNCTIONS[][3] = {NAMES(1), NAMES(2), NAMES(3)};
#else
static const int SIZES[] = {1, 2};
static const Block FUNCTIONS[][3] = {NAMES(1), NAMES(2)};
#endif

typedef struct {
    Block block;
    const uint32_t *weight, *x; /* x: panels of `many` rows, side by side */
    const float *scales;
    const bf16 *bias;
    bf16 *y;
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

/* Columns [first, last), in pairs, of a block with one panel. */
static void dot_columns(const Linear *job, long block, long panel, long first, long last, float *total)
{
    static const float ones[ROWS];
    const long group_pairs = job->pairs / job->groups, words = job->words / job->pairs;
    for (long pair = first; pair < last;) {
        const long group = pair / group_pairs, end = (group + 1) * group_pairs < last ? (group + 1) * group_pairs : last;
        const float *scale = job->scales == NULL ? ones : job->scales + (block * job->groups + group) * ROWS;
        job->block(job->weight + block * job->words + pair * words, job->x + (panel * job->pairs + pair) * job->many,
                   end - pair, scale, total);
        pair = end;
    }
}

/* One block of the weight with some panels of x. A chunk of its columns stays in the cache while the panels pass. */
static void dot_panels(const Linear *job, long block, long first, long last)
{
    float totals[PANELS][MOST * ROWS];
    memset(totals, 0, (size_t)(last - first) * sizeof *totals);
    for (long at = 0; at < job->pairs; at += CHUNK)
        for (long panel = first; panel < last; panel++)
            dot_columns(job, block, panel, at, at + CHUNK < job->pairs ? at + CHUNK : job->pairs, totals[panel - first]);
    for (long panel = first; panel < last; panel++)
        write_panel(job, block, panel, totals[panel - first]);
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

/* y (num_rows, out) = x (num_rows, columns) W^T * scales + bias. scales: [block][group][ROWS] for integers, else NULL;
   bias: NULL for none. columns: a multiple of COLUMNS, and of groups * COLUMNS. */
MMDIST_API void mmdist_linear(int kind, const uint32_t *weight, const float *scales, long groups, const bf16 *bias,
                              const bf16 *x, bf16 *y, long num_rows, long out, long columns)
{
    pool_take();
    long panels = (num_rows + MOST - 1) / MOST, size = 0;
    while (SIZES[size] * panels < num_rows)
        size++;
    long many = SIZES[size], pairs = columns / 2, parts = (pairs + PACK_PAIRS - 1) / PACK_PAIRS;
    const uint32_t *panel_x = (const uint32_t *)x;
    if (many > 1) {
        uint32_t *to = scratch((size_t)(panels * many * pairs) * 4);
        pool_run(pack_panel, &(Panels){x, to, num_rows, many, pairs, parts}, panels * parts);
        panel_x = to;
    }
    Linear job = {FUNCTIONS[size][kind], weight, panel_x, scales, bias, y, num_rows, many, panels, out, pairs, groups,
                  pairs / PAIRS_IN_WORD[kind] * ROWS};
    pool_run(linear_block, &job, (out + ROWS - 1) / ROWS);
    pool_give();
}

typedef struct {
    Kind kind;
    const void *from;
    uint32_t *to;
    long rows, columns, words;
} Packing;

/* The word of a whole row's columns from `from` on. */
INLINE uint32_t word_of(Kind kind, const void *from)
{
    uint32_t packed = 0;
    uint8_t bytes[8];
    if (kind == BF16) {
        memcpy(&packed, from, 4);
        return packed;
    }
    memcpy(bytes, from, kind == INT8 ? 4 : 8);
    if (kind == INT8)
        return bytes[0] | (uint32_t)bytes[2] << 8 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[3] << 24;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        packed |= (uint32_t)(bytes[i] & 15) << (i % 2 * 16 + i / 2 * 4);
    return packed;
}

INLINE void pack_rows(Kind kind, const Packing *job, long block)
{
    const long width = 2 * PAIRS_IN_WORD[kind], size = kind == BF16 ? 2 : 1, whole = job->columns / width;
    const char *from = (const char *)job->from + block * ROWS * job->columns * size;
    uint32_t *to = job->to + block * job->words * ROWS;
    long rows = job->rows - block * ROWS < ROWS ? job->rows - block * ROWS : ROWS;
    if (rows < ROWS || whole < job->words)
        memset(to, 0, (size_t)(job->words * ROWS) * 4);
    for (long first = 0; first < whole; first += 16) /* some cache lines of each row at a time */
        for (long r = 0; r < rows; r++)
            for (long word = first; word < first + 16 && word < whole; word++)
                to[word * ROWS + r] = word_of(kind, from + (r * job->columns + word * width) * size);
    for (long r = 0; r < rows && whole * width < job->columns; r++) {
        char tail[16] = {0};
        memcpy(tail, from + (r * job->columns + whole * width) * size, (size_t)((job->columns - whole * width) * size));
        to[whole * ROWS + r] = word_of(kind, tail);
    }
}

static void pack_block(void *arg, long block)
{
    const Packing *job = arg;
    if (job->kind == BF16)
        pack_rows(BF16, job, block);
    else if (job->kind == INT8)
        pack_rows(INT8, job, block);
    else
        pack_rows(INT4, job, block);
}

/* from (rows, columns) of bfloat16, or of int8 for both kinds of integers -> blocks of columns filled up to COLUMNS. */
MMDIST_API void mmdist_pack(int kind, const void *from, uint32_t *to, long rows, long columns)
{
    long words = (columns + COLUMNS - 1) / COLUMNS * COLUMNS / 2 / PAIRS_IN_WORD[kind];
    pool_take();
    pool_run(pack_block, &(Packing){kind, from, to, rows, columns, words}, (rows + ROWS - 1) / ROWS);
    pool_give();
}
