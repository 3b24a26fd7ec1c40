/* Weights in blocks (linear.c says how): what multiplying with the shortened ones takes. */
#ifndef MMDIST_PACK_H
#define MMDIST_PACK_H

#include "block.h"

/* A number that BF12 has no code for: it counts as zero in the words. */
typedef struct {
    uint32_t column;
    uint16_t row; /* in its block */
    bf16 value;
} Other;

/* What lies beside the words of BF12: firsts[blocks + 1], tops[blocks], then (at 8 bytes) the others, block by block. */
typedef struct {
    const uint32_t *firsts, *tops;
    const Other *others;
} Short;

INLINE Short open_short(const void *side, long blocks)
{
    const uint32_t *words = side;
    return (Short){words, words + blocks + 1, (const Other *)(words + (2 * blocks + 2))};
}

/* Begin to read a block's others, which are needed after its words. */
INLINE void fetch_others(const Short *rest, long block)
{
    const char *end = (const char *)(rest->others + rest->firsts[block + 1]);
    for (const char *line = (const char *)(rest->others + rest->firsts[block]); line < end; line += 64)
        __builtin_prefetch(line);
}

/* total[many][ROWS] += the products with a block's others; x: a panel. */
INLINE void add_others(const Short *rest, long block, const uint32_t *x, long many, float *total)
{
    for (const Other *o = rest->others + rest->firsts[block], *end = rest->others + rest->firsts[block + 1]; o < end; o++)
        for (long m = 0; m < many; m++) {
            uint32_t pair = x[(long)(o->column / 2) * many + m];
            total[m * ROWS + o->row] += to_float(o->value) * to_float((bf16)(pair >> o->column % 2 * 16));
        }
}

/* BF12 of `pairs` pairs of columns -> words of bfloat16 */
INLINE void make_whole(const uint32_t *words, long pairs, uint32_t top, uint32_t *to)
{
    const vs table = exponents_by_code(top);
    for (long pair = 0; pair < pairs; pair += 4, words += 3 * ROWS)
#pragma GCC unroll 8
        for (int i = 0; i < 4 * VECTORS; i++) {
            const int t = i / VECTORS, at = i % VECTORS * VL;
            vu codes = load_words(words + at), rest = load_words(words + (1 + t / 2) * ROWS + at);
            vu whole = restore(rest, codes, t, top, table);
            memcpy(to + (pair + t) * ROWS + at, &whole, sizeof whole);
        }
}

#endif
