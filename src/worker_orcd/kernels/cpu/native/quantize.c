/*
 * Quantising activations to int8 in blocks of 32.
 *
 * scale = max|x| / 127, q = round-half-even(x * (127 / max|x|)); the next plane quantises fma(-scale, q, x). The
 * maximum is taken over the bits of |x| as integers, so its result does not depend on the order. A block with a
 * maximum below 2^-100 counts as zero (127 / max would overflow); one with an infinity or NaN gets a NaN scale
 * and zero q, so that all outputs of its token, and of no other, are NaN.
 */
#include "quantize.h"

#include <math.h>

#define LARGEST_FINITE 0x7f7fffff
#define SMALLEST 0x1p-100f

typedef struct {
  int8_t *q;
  float *scale, *sum;
  int32_t *correction;
} lane_block;

static inline lane_block lane_of(uint8_t *block, int lanes, int lane) {
  return (lane_block){
      .q = (int8_t *)block + 32 * lane,
      .scale = (float *)(block + 32 * lanes) + lane,
      .sum = (float *)(block + 36 * lanes) + lane,
      .correction = (int32_t *)(block + 40 * lanes) + 2 * lane,
  };
}

/* sums[half][pair]: of q over k % 4 < 2 and k % 4 >= 2 of each half of the block. */
static void write_correction(int32_t *out, int sums[2][2], const orcd_correction *c) {
  if (!c->split)
    for (int pair = 0; pair < 2; pair++) {
      sums[0][pair] += sums[1][pair];
      sums[1][pair] = 0;
    }
  for (int half = 0; half < 2; half++) {
    const int32_t a = c->factor * sums[half][0], b = c->factor * sums[half][1];
    out[half] = c->pairs ? (int32_t)((uint32_t)(a & 0xffff) | (uint32_t)b << 16) : a + b;
  }
}

/* Quantises x[32] and leaves the remainder in it. */
static void quantize_block(float x[32], lane_block out, const orcd_correction *c) {
  int32_t largest = 0;
  for (int k = 0; k < 32; k++) {
    int32_t bits;
    memcpy(&bits, &x[k], 4);
    bits &= 0x7fffffff;
    if (bits > largest) largest = bits;
  }
  float maximum, scale = 0, inverse = 0;
  memcpy(&maximum, &largest, 4);
  const int finite = largest <= LARGEST_FINITE;
  if (finite && maximum >= SMALLEST) {
    scale = maximum / 127.0f;
    inverse = 127.0f / maximum;
  }
  int sums[2][2] = {{0, 0}, {0, 0}};
  for (int k = 0; k < 32; k++) {
    const int q = finite ? (int)lrintf(x[k] * inverse) : 0;
    out.q[k] = (int8_t)q;
    sums[k / 16][k / 2 % 2] += q;
    x[k] = fmaf(-scale, (float)q, x[k]);
  }
  if (!finite) scale = NAN;
  *out.scale = scale;
  *out.sum = scale * (float)(sums[0][0] + sums[0][1] + sums[1][0] + sums[1][1]);
  write_correction(out.correction, sums, c);
}

void orcd_quantize_scalar(const float *x, int64_t blocks, uint8_t *tile, int lanes, int lane, int planes,
                          const orcd_correction *correction) {
  for (int64_t b = 0; b < blocks; b++) {
    float rest[32];
    memcpy(rest, x + 32 * b, sizeof rest);
    for (int plane = 0; plane < planes; plane++)
      quantize_block(rest, lane_of(tile + b * LANE_BLOCK_BYTES * lanes, lanes, lane + plane), correction);
  }
}

#ifdef __x86_64__
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

AVX2_INLINE int32_t largest_bits(const __m256 x[4]) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i m[4];
  for (int i = 0; i < 4; i++) m[i] = _mm256_and_si256(_mm256_castps_si256(x[i]), magnitude);
  const __m256i all = _mm256_max_epi32(_mm256_max_epi32(m[0], m[1]), _mm256_max_epi32(m[2], m[3]));
  __m128i h = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  h = _mm_max_epi32(h, _mm_unpackhi_epi64(h, h));
  return _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 1)));
}

/* Four sums of q: (k % 4 < 2, k % 4 >= 2) as int16, for the first and second half of the block. */
AVX2_INLINE __m128i pair_sums(__m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q); /* dword g: k = 4 g .. 4 g + 3 */
  const __m256i two = _mm256_add_epi16(pairs, _mm256_unpackhi_epi64(pairs, pairs));
  const __m256i four = _mm256_add_epi16(two, _mm256_shuffle_epi32(two, 1));
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}

AVX2_INLINE void quantize_block_avx2(__m256 x[4], lane_block out, const orcd_correction *c) {
  const int32_t largest = largest_bits(x);
  float maximum, scale = 0, inverse = 0;
  memcpy(&maximum, &largest, 4);
  const int finite = largest <= LARGEST_FINITE;
  if (finite && maximum >= SMALLEST) {
    scale = maximum / 127.0f;
    inverse = 127.0f / maximum;
  }
  __m256i q[4];
  const __m256i keep = _mm256_set1_epi32(-finite);
  for (int i = 0; i < 4; i++) {
    q[i] = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(x[i], _mm256_set1_ps(inverse))), keep);
    x[i] = _mm256_fnmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(q[i]), x[i]);
  }
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256((__m256i *)out.q, bytes);
  __m128i sums = pair_sums(bytes);
  const __m128i halves = _mm_madd_epi16(sums, _mm_set1_epi16(1));
  if (!finite) scale = NAN;
  *out.scale = scale;
  *out.sum = scale * (float)(_mm_cvtsi128_si32(halves) + _mm_extract_epi32(halves, 1));
  if (!c->split) {
    sums = _mm_add_epi16(sums, _mm_srli_epi64(sums, 32));
    sums = _mm_and_si128(sums, _mm_setr_epi32(-1, 0, -1, 0));
  }
  const __m128i factor = _mm_set1_epi16((int16_t)c->factor);
  _mm_storel_epi64((__m128i *)out.correction,
                   c->pairs ? _mm_mullo_epi16(sums, factor) : _mm_madd_epi16(sums, factor));
}

AVX2 void orcd_quantize_avx2(const float *x, int64_t blocks, uint8_t *tile, int lanes, int lane, int planes,
                             const orcd_correction *correction) {
  for (int64_t b = 0; b < blocks; b++) {
    __m256 rest[4];
    for (int i = 0; i < 4; i++) rest[i] = _mm256_loadu_ps(x + 32 * b + 8 * i);
    for (int plane = 0; plane < planes; plane++)
      quantize_block_avx2(rest, lane_of(tile + b * LANE_BLOCK_BYTES * lanes, lanes, lane + plane), correction);
  }
}
#endif
