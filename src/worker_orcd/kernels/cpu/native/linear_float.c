/*
 * Linear kernels with float activations for AVX2 and AVX-512. The arithmetic is that of linear_scalar.c.
 *
 * 32 x 16 weights are dequantised into a buffer that stays in the first-level cache, then multiplied with every
 * token before the next 32.
 */
#ifdef __x86_64__
#include "linear_avx2.h"

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))

typedef float weight_row[16]; /* of one k, 16 rows */

/* Byte i of each lane as a float level. */
AVX2_INLINE __m256 level(const int format, __m256i v, const int i, const int offset) {
  if (format == Q8_0 || format == IQ4_NL)
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24));
  v = _mm256_and_si256(_mm256_srli_epi32(v, 8 * i), _mm256_set1_epi32(255));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(v, _mm256_set1_epi32(offset)));
}

/* What turns levels into weights: scale * level, then + minimum or - minimum. */
typedef struct {
  __m256 scale, minimum;
} affine;

AVX2_INLINE __m256 weight(const int format, affine a, __m256 level) {
  const __m256 product = _mm256_mul_ps(a.scale, level);
  switch (format) {
    case Q4_1:
    case Q5_1: return _mm256_add_ps(product, a.minimum);
    case Q2_K:
    case Q4_K:
    case Q5_K: return _mm256_sub_ps(product, a.minimum);
    default: return product;
  }
}

AVX2_INLINE void four_weights(const int format, affine a, __m256i v, weight_row out[4]) {
  const int offset = format == Q4_0 ? 8 : format == Q5_0 ? 16 : format == MXFP4 ? 12 : format == Q3_K ? 4 : format == Q6_K ? 32 : 0;
  _mm256_storeu_ps(out[0], weight(format, a, level(format, v, 0, offset)));
  _mm256_storeu_ps(out[1], weight(format, a, level(format, v, 1, offset)));
  _mm256_storeu_ps(out[2], weight(format, a, level(format, v, 2, offset)));
  _mm256_storeu_ps(out[3], weight(format, a, level(format, v, 3, offset)));
}

/* lo, hi: for the first and the second 16 of k. */
AVX2_INLINE void body_weights(const int format, const uint8_t *body, const int h, affine lo, affine hi, weight_row out[32]) {
  __m256i a, b;
#define STEP(j)                                              \
  levels(format, body, j, h, &a, &b);                        \
  four_weights(format, lo, a, (weight_row *)(out[4 * j] + 8 * h)); \
  four_weights(format, hi, b, (weight_row *)(out[16 + 4 * j] + 8 * h));
  STEP(0)
  STEP(1)
  STEP(2)
  STEP(3)
#undef STEP
}

AVX2_INLINE affine sub_affine(const int format, const uint8_t *block, const int h, const uint8_t *scale, const uint8_t *minimum) {
  const int is_signed = format == Q3_K || format == Q6_K;
  const __m128i s = load64(scale + 8 * h);
  const __m256 integer = _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(s) : _mm256_cvtepu8_epi32(s));
  affine a = {_mm256_mul_ps(halves_to_floats(block + 16 * h), integer), _mm256_setzero_ps()};
  if (!is_signed)
    a.minimum = _mm256_mul_ps(halves_to_floats(block + 32 + 16 * h),
                              _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load64(minimum + 8 * h))));
  return a;
}

AVX2_INLINE void half_weights(const int format, const uint8_t *at, int count, weight_row out[32]) {
  for (int i = 0; i < count; i++)
    EACH_HALF {
      const uint8_t *p = at + 32 * i + 16 * h;
      const __m256i top = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
      _mm256_storeu_ps(out[i] + 8 * h, format == F16 ? halves_to_floats(p) : _mm256_castsi256_ps(top));
    }
}

/* Sub-scales of the K-quant block that is being read. */
typedef struct {
  uint8_t scale[16][16], minimum[16][16];
} k_scales;

/* Weights k0 .. k0 + count - 1 of a panel. Called with k0 = 0, 32, ... in order. */
AVX2_INLINE void panel_weights(const int format, const uint8_t *panel, int64_t k0, int count, k_scales *s, weight_row out[32]) {
  if (is_float_format(format)) {
    half_weights(format, panel + k0 * 32, count, out);
    return;
  }
  const packed_shape shape = shape_of(format);
  if (!is_k_quant(format)) {
    const uint8_t *block = panel + k0 / 32 * (shape.header + shape.body);
    EACH_HALF {
      affine a = {row_scales(format, block, h), _mm256_setzero_ps()};
      if (has_minimum(format)) a.minimum = halves_to_floats(block + 32 + 16 * h);
      body_weights(format, block + shape.header, h, a, a, out);
    }
    return;
  }
  const uint8_t *block = panel + k0 / 256 * (shape.header + 8 * shape.body);
  const int j = (int)(k0 % 256 / 32);
  if (j == 0) sub_scales(format, block, s->scale, s->minimum);
  const int per_32 = format == Q4_K || format == Q5_K, first = per_32 ? j : 2 * j, second = per_32 ? j : 2 * j + 1;
  EACH_HALF {
    const affine lo = sub_affine(format, block, h, s->scale[first], s->minimum[first]);
    const affine hi = sub_affine(format, block, h, s->scale[second], s->minimum[second]);
    body_weights(format, block + shape.header + j * shape.body, h, lo, hi, out);
  }
}

/* The same, where they are if they are floats already. */
AVX2_INLINE const weight_row *weights_at(const int format, const uint8_t *panel, int64_t k0, int count, k_scales *s,
                                         weight_row buffer[32]) {
  if (is_float_format(format)) prefetch_ahead(panel + k0 * (format == F32 ? 64 : 32), format == F32 ? 2048 : 1024);
  if (format == F32) return (const weight_row *)(panel + k0 * 64);
  panel_weights(format, panel, k0, count, s, buffer);
  return (const weight_row *)buffer;
}

/* acc += products of up to 32 weights with `tokens` rows of x, on rows 8 h of `halves` halves. */
AVX2_INLINE void multiply_avx2(const int tokens, const int h, const int halves, const weight_row *weights, int count,
                               const float *x, int64_t ldx, float *acc) {
  __m256 partial[4][2][2];
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < halves; v++) partial[t][v][0] = partial[t][v][1] = _mm256_setzero_ps();
#define ADD(i, parity)                                                                                           \
  _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++)                                                       \
      _Pragma("GCC unroll 2") for (int v = 0; v < halves; v++) partial[t][v][parity] =                           \
          _mm256_fmadd_ps(_mm256_loadu_ps(weights[i] + 8 * (h + v)), _mm256_set1_ps(x[t * ldx + (i)]), partial[t][v][parity]);
  int i = 0;
  for (; i + 1 < count; i += 2) {
    ADD(i, 0)
    ADD(i + 1, 1)
  }
  if (i < count) {
    ADD(i, 0)
  }
#undef ADD
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < halves; v++) {
      float *at = acc + 16 * t + 8 * (h + v);
      _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_add_ps(partial[t][v][0], partial[t][v][1])));
    }
}

AVX2_INLINE void float_dot_avx2(const int format, const uint8_t *panel, int64_t k, const float *x, int64_t ldx,
                                int64_t tokens, float *acc) {
  weight_row weights[32];
  k_scales s;
  memset(acc, 0, sizeof(float) * 16 * (size_t)tokens);
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    const int count = k - k0 < 32 ? (int)(k - k0) : 32;
    const weight_row *w = weights_at(format, panel, k0, count, &s, weights);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      multiply_avx2(4, 0, 1, w, count, x + t * ldx + k0, ldx, acc + 16 * t);
      multiply_avx2(4, 1, 1, w, count, x + t * ldx + k0, ldx, acc + 16 * t);
    }
    for (; t < tokens; t++) multiply_avx2(1, 0, 2, w, count, x + t * ldx + k0, ldx, acc + 16 * t);
  }
}

AVX512_INLINE void multiply_avx512(const int tokens, const weight_row *weights, int count, const float *x, int64_t ldx,
                                   float *acc) {
  __m512 partial[8][2];
  for (int t = 0; t < tokens; t++) partial[t][0] = partial[t][1] = _mm512_setzero_ps();
#define ADD(i, parity)                                                           \
  _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) partial[t][parity] = \
      _mm512_fmadd_ps(_mm512_loadu_ps(weights[i]), _mm512_set1_ps(x[t * ldx + (i)]), partial[t][parity]);
  int i = 0;
  for (; i + 1 < count; i += 2) {
    ADD(i, 0)
    ADD(i + 1, 1)
  }
  if (i < count) {
    ADD(i, 0)
  }
#undef ADD
  for (int t = 0; t < tokens; t++)
    _mm512_storeu_ps(acc + 16 * t, _mm512_add_ps(_mm512_loadu_ps(acc + 16 * t), _mm512_add_ps(partial[t][0], partial[t][1])));
}

AVX512_INLINE void float_dot_avx512(const int format, const uint8_t *panel, int64_t k, const float *x, int64_t ldx,
                                    int64_t tokens, float *acc) {
  weight_row weights[32];
  k_scales s;
  memset(acc, 0, sizeof(float) * 16 * (size_t)tokens);
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    const int count = k - k0 < 32 ? (int)(k - k0) : 32;
    const weight_row *w = weights_at(format, panel, k0, count, &s, weights);
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) multiply_avx512(8, w, count, x + t * ldx + k0, ldx, acc + 16 * t);
    for (; t < tokens; t++) multiply_avx512(1, w, count, x + t * ldx + k0, ldx, acc + 16 * t);
  }
}

#define DEFINE(format)                                                                                             \
  AVX2 void orcd_float_dot_avx2_##format(const uint8_t *p, int64_t k, const float *x, int64_t ldx, int64_t n,      \
                                         float *acc) {                                                             \
    float_dot_avx2(format, p, k, x, ldx, n, acc);                                                                  \
  }                                                                                                                \
  AVX512 void orcd_float_dot_avx512_##format(const uint8_t *p, int64_t k, const float *x, int64_t ldx, int64_t n, \
                                             float *acc) {                                                         \
    float_dot_avx512(format, p, k, x, ldx, n, acc);                                                                \
  }
SMALL_FORMATS(DEFINE)
K_FORMATS(DEFINE)
FLOAT_FORMATS(DEFINE)
#endif
