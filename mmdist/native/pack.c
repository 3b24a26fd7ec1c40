/* Weights into the blocks of linear.c, and bfloat16 ones into 12 bits a number without loss.

   Nearly all numbers of a block of weights have one of 15 neighbouring exponents, so BF12 keeps 4 bits of it: how far
   it is below the block's `top`. (That bfloat16 weights carry about 11 bits: DFloat11, arXiv:2504.11651.) Words for 4
   pairs of columns, of 32 rows each: the codes, as int4's nibbles; signs and fractions of pairs 0 and 1, of pairs 2 and 3
   (the odd ones' turned left by 8 bits into the gaps of the others). Other numbers are listed beside the words. */
#include "pack.h"

#include <stdlib.h>

enum { SAMPLES = 2048, EXPONENTS = 15 };

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

INLINE void pack_rows(Kind kind, const Packing *job, long block, uint32_t *to)
{
    const long width = 2 * PAIRS_IN_WORD[kind], size = kind == BF16 ? 2 : 1, whole = job->columns / width;
    const char *from = (const char *)job->from + block * ROWS * job->columns * size;
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
    uint32_t *to = job->to + block * job->words * ROWS;
    if (job->kind == BF16)
        pack_rows(BF16, job, block, to);
    else if (job->kind == INT8)
        pack_rows(INT8, job, block, to);
    else
        pack_rows(INT4, job, block, to);
}

/* from (rows, columns) of bfloat16, or of int8 for both kinds of integers -> blocks of columns filled up to COLUMNS. */
MMDIST_API void mmdist_pack(int kind, const void *from, uint32_t *to, long rows, long columns)
{
    long words = (columns + COLUMNS - 1) / COLUMNS * COLUMNS / 2 / PAIRS_IN_WORD[kind];
    pool_take();
    pool_run(pack_block, &(Packing){kind, from, to, rows, columns, words}, (rows + ROWS - 1) / ROWS);
    pool_give();
}

/* The greatest of the 15 exponents that most of the block's numbers have; from a sample. */
static uint32_t find_top(const uint32_t *words, long count)
{
    uint32_t counts[256] = {0}, best = 0, top = EXPONENTS;
    const long step = count / SAMPLES | 1; /* odd, to meet all rows */
    for (long i = 0; i < count; i += step) {
        counts[words[i] >> 7 & 0xff]++;
        counts[words[i] >> 23 & 0xff]++;
    }
    for (uint32_t last = EXPONENTS; last < 256; last++) {
        uint32_t found = 0;
        for (uint32_t e = last - EXPONENTS + 1; e <= last; e++)
            found += counts[e];
        if (found > best) /* not >=: there is more room below, where the small numbers of no sample are */
            best = found, top = last;
    }
    return top;
}

typedef struct {
    const void *from;
    int in_blocks;
    uint32_t *to;
    long rows, columns, pairs, most;
    uint32_t *tops, *counts;
    Other *others;
} Shortening;

/* The words of 4 pairs for VL rows; marks where numbers have no code. */
INLINE vu shorten_turn(const uint32_t *words, uint32_t top, uint32_t *to, vs *marks)
{
    vu rest[2], codes = {0}, marked = {0};
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        vu word = load_words(words + t * ROWS);
        vs code = (uint16_t)top - ((vs)word >> 7 & 0xff), other = (vs)(code >= EXPONENTS);
        vu kept = word & (SIGN_AND_FRACTION * 0x10001u) & ~(vu)other;
        rest[t / 2] = t % 2 ? rest[t / 2] | (kept << 8 | kept >> 24) : kept;
        codes |= (vu)((code & ~other) | (other & OTHER)) << 4 * t;
        marks[t] = other & (vs)((vs)word << 1 != 0);
        marked |= (vu)marks[t];
    }
    memcpy(to, &codes, sizeof codes);
    memcpy(to + ROWS, &rest[0], sizeof *rest);
    memcpy(to + 2 * ROWS, &rest[1], sizeof *rest);
    return marked;
}

static void list_others(const Shortening *job, long block, long pair, int row, const uint32_t *words, const vs *marks)
{
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 2 * VL; i++)
            if (marks[t][i]) {
                const uint32_t place = job->counts[block]++;
                if (place < job->most)
                    job->others[block * job->most + place] = (Other){
                        (uint32_t)((pair + t) * 2 + i % 2), (uint16_t)(row + i / 2),
                        (bf16)(words[t * ROWS + i / 2] >> i % 2 * 16)};
            }
}

static void shorten_block(void *arg, long block)
{
    static _Thread_local uint32_t *kept;
    static _Thread_local long size;
    const Shortening *job = arg;
    const long count = job->pairs * ROWS;
    const uint32_t *words = (const uint32_t *)job->from + block * count;
    if (!job->in_blocks) {
        if (size < count) {
            free(kept);
            kept = aligned_alloc(64, (size_t)(size = count) * 4);
            if (kept == NULL)
                abort();
        }
        pack_rows(BF16, &(Packing){BF16, job->from, NULL, job->rows, job->columns, job->pairs}, block, kept);
        words = kept;
    }
    const uint32_t top = job->tops[block] = find_top(words, count);
    uint32_t *to = job->to + block * count / 4 * 3;
    job->counts[block] = 0;
    for (long pair = 0; pair < job->pairs; pair += 4, words += 4 * ROWS, to += 3 * ROWS)
        for (int row = 0; row < ROWS; row += VL) {
            vs marks[4];
            if (any((vi)shorten_turn(words + row, top, to + row, marks)))
                list_others(job, block, pair, row, words + row, marks);
        }
}

/* bfloat16 -> BF12 words; for each block its top, and how many numbers have no code: the first `most` of them in
   others[block][most]. from: (rows, columns), or with in_blocks packed already: then the caller's thread does it alone,
   beside products that have the pool. */
MMDIST_API void mmdist_shorten(const void *from, int in_blocks, uint32_t *to, long rows, long columns, long most,
                               uint32_t *tops, uint32_t *counts, void *others)
{
    const long pairs = (columns + COLUMNS - 1) / COLUMNS * COLUMNS / 2, blocks = (rows + ROWS - 1) / ROWS;
    Shortening job = {from, in_blocks, to, rows, columns, pairs, most, tops, counts, others};
    if (in_blocks) {
        for (long block = 0; block < blocks; block++)
            shorten_block(&job, block);
        return;
    }
    pool_take();
    pool_run(shorten_block, &job, blocks);
    pool_give();
}
