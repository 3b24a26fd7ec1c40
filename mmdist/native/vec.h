/* Vectors of as many floats as the level's registers hold, and bfloat16 to and from them. */
#ifndef MMDIST_VEC_H
#define MMDIST_VEC_H

#include "pool.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef int8_t vb __attribute__((vector_size(VL)));

#define UNROLL _Pragma("GCC unroll 16")

INLINE vf splat(float x)
{
    return x - (vf){}; /* not +: -0 stays -0 */
}

INLINE vf choose(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

INLINE vf vmax(vf a, vf b)
{ /* b where one is NaN */
#if VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vf vabs(vf x)
{
    return (vf)((vi)x & 0x7fffffff);
}

/* GCC 12 does not find these instructions by itself. */
#if VL == 16
INLINE vf widen(vh bits)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
}
INLINE vf from_int8(vb x)
{
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
}
#elif VL == 8
INLINE vf widen(vh bits)
{
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
}
INLINE vf from_int8(vb x)
{
    int64_t bytes;
    memcpy(&bytes, &x, 8);
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
}
#else
INLINE vf widen(vh bits)
{
    return (vf)(__builtin_convertvector(bits, vu) << 16);
}
INLINE vf from_int8(vb x)
{ /* each byte into its own lane's highest, then down with its sign */
    uint32_t bytes;
    memcpy(&bytes, &x, 4);
    vi whole = (vi)(bytes * (vu){1 << 24, 1 << 16, 1 << 8, 1}) >> 24;
    return __builtin_convertvector(whole, vf);
}
#endif

INLINE vh narrow(vf x)
{
    vu bits = (vu)x, nan = (vu)(x != x);
    vu up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & up), vh);
}

/* What x becomes when it is kept as bfloat16. */
INLINE vf rounded(vf x)
{
    return widen(narrow(x));
}

INLINE vf load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, vf x)
{
    memcpy(p, &x, sizeof x);
}

INLINE vf load_bf16(const bf16 *p)
{
    vh x;
    memcpy(&x, p, sizeof x);
    return widen(x);
}

INLINE void store_bf16(bf16 *p, vf x)
{
    vh bits = narrow(x);
    memcpy(p, &bits, sizeof bits);
}

INLINE vf load_int8(const int8_t *p)
{
    vb x;
    memcpy(&x, p, sizeof x);
    return from_int8(x);
}

/* The first n < VL numbers, zeros behind them. */
INLINE vf load_bf16_part(const bf16 *p, long n)
{
    vh x = {};
    memcpy(&x, p, 2 * n);
    return widen(x);
}

INLINE vf load_int8_part(const int8_t *p, long n)
{
    vb x = {};
    memcpy(&x, p, n);
    return from_int8(x);
}

INLINE void store_bf16_part(bf16 *p, vf x, long n)
{
    vh bits = narrow(x);
    memcpy(p, &bits, 2 * n);
}

INLINE float sum(vf x)
{
    float parts[VL];
    store(parts, x);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

INLINE float largest_lane(vf x)
{
    float parts[VL], found;
    store(parts, x);
    found = parts[0];
    for (int i = 1; i < VL; i++) found = parts[i] > found ? parts[i] : found;
    return found;
}

INLINE int any(vi mask)
{
    int32_t parts[VL], found = 0;
    memcpy(parts, &mask, sizeof parts);
    for (int i = 0; i < VL; i++) found |= parts[i];
    return found != 0;
}

/* e^x within two units in the last place; overflows to infinity, underflows to 0, NaN stays NaN. */
INLINE vf vexp(vf x)
{
#if VL == 16
    const __m512 in = _mm512_min_ps(_mm512_set1_ps(200), _mm512_max_ps(_mm512_set1_ps(-200), (__m512)x));
    const __m512 whole = _mm512_roundscale_ps(in * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf n = (vf)whole, r = (vf)in - n * 0.693145752f;
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693145752f;
#endif
    r = r - n * 1.42860677e-6f;
    vf p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if VL == 16
    return (vf)_mm512_scalef_ps((__m512)p, whole);
#else
    vi in_range = (x < 88.0f) & (x > -87.0f); /* false for NaN */
    vi power = (__builtin_convertvector(choose(in_range, n, splat(0)), vi) + 127) << 23;
    vf outside = choose(x >= 88.0f, splat(__builtin_inff()), choose(x <= -87.0f, splat(0), x));
    return choose(in_range, p * (vf)power, outside);
#endif
}

#endif
