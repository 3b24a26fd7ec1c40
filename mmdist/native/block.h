/* Products of a block of packed rows with a few rows of x beside each other, accumulated in float32: what the linear
   layers and the attention of whole prompts are made of. The packing is that of linear.c. */
#ifndef MMDIST_BLOCK_H
#define MMDIST_BLOCK_H

#include "vec.h"

#if defined(__AVX512F__)
enum { MOST = 12 }; /* rows of x whose sums the registers hold */
#elif defined(__AVX2__)
enum { MOST = 3 };
#else
enum { MOST = 2 };
#endif
enum { ROWS = 32, COLUMNS = 8, VECTORS = ROWS / VL, AHEAD = 4096 };

typedef enum { BF16, INT8, INT4, BF12 } Kind; /* as mmdist/kernels/native_linear.py numbers them */
static const int PAIRS_IN_WORD[] = {1, 2, 4};
static const int WORDS_IN_TURN[] = {4, 2, 1, 3}; /* of a row: what 4 pairs take */

typedef uint16_t vs __attribute__((vector_size(4 * VL)));
enum { SIGN_AND_FRACTION = 0x807f, OTHER = 15 }; /* OTHER: the code of numbers with none of the 15 exponents, as zero */

INLINE vu load_words(const uint32_t *words)
{
    vu vector;
    memcpy(&vector, words, sizeof vector);
    return vector;
}

/* sum + even column * low half of x + odd column * high half */
INLINE vf dot(vf sum, vu pair, uint32_t x)
{
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)_mm512_set1_epi32((int)x));
#else
    return sum + (vf)(pair << 16) * to_float((bf16)x) + (vf)(pair & 0xffff0000u) * to_float((bf16)(x >> 16));
#endif
}

/* The signed integers of `bits` bits at `place` of each half of the words. */
INLINE vu integers(vu words, int bits, int place)
{
    vi even = (vi)(words << (32 - bits - place)) >> (32 - bits);
    vi odd = (vi)(words << (16 - bits - place)) >> (32 - bits);
    return (vu) __builtin_convertvector(even, vf) >> 16 | ((vu) __builtin_convertvector(odd, vf) & 0xffff0000u);
}

#if defined(__AVX512BW__)
/* bfloat16 by nibble, twice, because an index has five bits: -8 .. 7; 0 .. 15; 16 times -8 .. 7 */
enum { SIGNED, LOW, HIGH };
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
static const uint16_t TABLES[][32] __attribute__((aligned(64))) = {
    TWICE(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80),
    TWICE(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
          0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170),
    TWICE(0x0000, 0x4180, 0x4200, 0x4240, 0x4280, 0x42a0, 0x42c0, 0x42e0,
          0xc300, 0xc2e0, 0xc2c0, 0xc2a0, 0xc280, 0xc240, 0xc200, 0xc180)};

INLINE vu look_up(int table, vu words, int nibble)
{
    __m512i index = _mm512_srli_epi16((__m512i)words, 4 * nibble);
    return (vu)_mm512_permutexvar_epi16(index, *(const __m512i *)TABLES[table]);
}
#endif

/* BF12: a number's sign and fraction stay as they are, its exponent is `top` minus a code of 4 bits. */
INLINE vs exponents_by_code(uint32_t top)
{
    vs table;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * VL; i++)
        table[i] = i % 16 == OTHER ? 0 : (uint16_t)((top - (uint32_t)i % 16) << 7);
    return table;
}

/* Pair `i` of the four in words of BF12. */
INLINE vu restore(vu rest, vu codes, int i, uint32_t top, vs table)
{
    vu turned = i % 2 ? rest >> 8 | rest << 24 : rest;
    vs code = (vs)codes >> 4 * i;
#if defined(__AVX512BW__)
    (void)top;
    vu exponent = (vu)_mm512_permutexvar_epi16((__m512i)code, (__m512i)table);
#else
    (void)table;
    code &= 15;
    vu exponent = (vu)((vs)(code != OTHER) & (vs)((uint16_t)(top << 7) - (code << 7)));
#endif
    return (turned & (SIGN_AND_FRACTION * 0x10001u)) | exponent;
}

/* sum + pair `i` of the words * x, for `many` rows of x */
INLINE void dot_pair(Kind kind, int many, vu words, int i, const uint32_t *x, vf *sum, int stride)
{
#if defined(__AVX512BW__)
    if (kind == INT8 && many <= 3) { /* two products of nibbles cost less than bytes turned into floats */
        vu low = look_up(LOW, words, 2 * i), high = look_up(HIGH, words, 2 * i + 1);
#pragma GCC unroll 3
        for (int m = 0; m < many; m++)
            sum[m * stride] = dot(dot(sum[m * stride], low, x[m]), high, x[m]);
        return;
    }
    vu pair = kind == BF16 ? words : kind == INT8 ? integers(words, 8, 8 * i) : look_up(SIGNED, words, i);
#else
    vu pair = kind == BF16 ? words : kind == INT8 ? integers(words, 8, 8 * i) : integers(words, 4, 4 * i);
#endif
#pragma GCC unroll 12
    for (int m = 0; m < many; m++)
        sum[m * stride] = dot(sum[m * stride], pair, x[m]);
}

/* sum + a turn of pairs (a multiple of what a word holds) * x, for `many` rows of x, in `ways` sums of each. Processors
   foresee lines that are met in their order; with integers there is so much to do to each that asking ahead pays. */
INLINE void dot_turn(Kind kind, int many, int turn, const uint32_t *words, const uint32_t *x, vf *sum, int ways)
{
    const int in_word = PAIRS_IN_WORD[kind], stride = VECTORS * ways;
#pragma GCC unroll 4
    for (int t = 0; t < turn; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const uint32_t *at = words + t / in_word * ROWS + v * VL;
            if (kind != BF16 && t % in_word == 0)
                __builtin_prefetch((const char *)at + AHEAD);
            dot_pair(kind, many, load_words(at), t % in_word, x + t * many, sum + v * ways + t % ways, stride);
        }
    }
}

/* The same for four pairs of BF12. */
INLINE void dot_short_turn(int many, const uint32_t *words, const uint32_t *x, uint32_t top, vs table, vf *sum, int ways)
{
    vu codes[VECTORS], rest[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
        codes[v] = load_words(words + v * VL);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            if (t % 2 == 0)
                rest[v] = load_words(words + (1 + t / 2) * ROWS + v * VL);
            vu pair = restore(rest[v], codes[v], t, top, table);
            dot_pair(BF16, many, pair, 0, x + t * many, sum + v * ways + t % ways, VECTORS * ways);
        }
    }
}

/* total[many][ROWS] += scale[ROWS] * the products of `pairs` pairs of columns (a multiple of 4) with `many` rows of x,
   side by side. With few of them there are registers for several sums of each, so that no sum waits for the last.
   scale: of integers; top: of BF12. */
INLINE void dot_block(Kind kind, const int many, const uint32_t *words, const uint32_t *x, long pairs,
                      const float *scale, uint32_t top, float *total)
{
    const int in_word = kind == BF12 ? 4 : PAIRS_IN_WORD[kind];
    const int ways = many * VECTORS >= 8 ? 1 : 8 / VECTORS / many >= 4 ? 4 : 2;
    const int turn = ways > in_word ? ways : in_word, stride = VECTORS * ways;
    const vs table = kind == BF12 ? exponents_by_code(top) : (vs){0};
    vf sum[MOST * VECTORS * 2 < 8 ? 8 : MOST * VECTORS * 2];
#pragma GCC unroll 64
    for (int i = 0; i < many * stride; i++)
        sum[i] = (vf){0};
    for (const uint32_t *end = x + pairs * many; x != end; x += turn * many) {
        if (kind == BF12)
            dot_short_turn(many, words, x, top, table, sum, ways);
        else
            dot_turn(kind, many, turn, words, x, sum, ways);
        words += turn * WORDS_IN_TURN[kind] / 4 * ROWS;
    }
#pragma GCC unroll 64
    for (int i = 0; i < many * VECTORS; i++) {
        vf whole = sum[i * ways], factor, before;
#pragma GCC unroll 4
        for (int w = 1; w < ways; w++)
            whole += sum[i * ways + w];
        memcpy(&factor, scale + i % VECTORS * VL, sizeof factor);
        memcpy(&before, total + i * VL, sizeof before);
        before += kind == BF16 || kind == BF12 ? whole : whole * factor;
        memcpy(total + i * VL, &before, sizeof before);
    }
}

#endif
