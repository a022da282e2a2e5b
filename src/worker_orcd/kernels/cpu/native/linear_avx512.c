/*
 * Linear kernels for AVX-512 with VNNI. The arithmetic is that of linear_scalar.c, bit for bit.
 *
 * vpdpbusd adds four products of unsigned levels and int8 activations to each of 16 rows in 32 bits. The sum
 * starts with -offset * sum(q), so it ends with the signed dot product. Products of integers below 2^24 are
 * multiplied as floats, which is exact.
 */
#ifdef __x86_64__
#include "linear_avx2.h"
#include "quantize.h"

#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define VNNI_INLINE                 \
  static inline __attribute__((always_inline, \
                               target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define EACH_LANE _Pragma("GCC unroll 8") for (int t = 0; t < lanes; t++)

VNNI_INLINE int is_split(const int format) { return format == Q2_K || format == Q3_K || format == Q6_K; }
VNNI_INLINE int has_correction(const int format) {
  return !is_k_quant(format) ? !has_minimum(format) : format == Q3_K || format == Q6_K;
}

VNNI_INLINE __m512i load512(const uint8_t *p) { return _mm512_loadu_si512(p); }
VNNI_INLINE __m512i shift512(__m512i v, const int left) {
  return left >= 0 ? _mm512_slli_epi16(v, (unsigned)left) : _mm512_srli_epi16(v, (unsigned)-left);
}
VNNI_INLINE __m512i mask512(__m512i v, const int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }

/* (v & mask) | w */
VNNI_INLINE __m512i put_bits(__m512i v, const int mask, __m512i w) {
  return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8((char)mask), w, 0xea);
}

/* Unsigned levels of 16 rows, k = 4 j + i (lo) and 16 + 4 j + i (hi). */
VNNI_INLINE void levels512(const int format, const uint8_t *body, const int j, __m512i *lo, __m512i *hi) {
  if (format == Q8_0) {
    const __m512i top = _mm512_set1_epi8((char)128);
    *lo = _mm512_xor_si512(load512(body + 64 * j), top);
    *hi = _mm512_xor_si512(load512(body + 256 + 64 * j), top);
    return;
  }
  if (format == Q2_K || format == Q3_K) {
    *lo = mask512(shift512(load512(body), -2 * j), 3);
    *hi = mask512(shift512(load512(body + 64), -2 * j), 3);
    if (format == Q3_K) {
      const __m512i bits = load512(body + 128);
      *lo = put_bits(shift512(bits, 2 - j), 4, *lo);
      *hi = put_bits(shift512(bits, -2 - j), 4, *hi);
    }
    return;
  }
  const __m512i v = load512(body + 64 * j);
  *lo = mask512(v, 15);
  *hi = mask512(shift512(v, -4), 15);
  if (format == Q5_0 || format == Q5_1 || format == Q5_K) {
    const __m512i bits = load512(body + 256);
    *lo = put_bits(shift512(bits, 4 - j), 16, *lo);
    *hi = put_bits(shift512(bits, -j), 16, *hi);
  } else if (format == Q6_K) {
    *lo = put_bits(shift512(load512(body + 256), 4 - 2 * j), 48, *lo);
    *hi = put_bits(shift512(load512(body + 320), 4 - 2 * j), 48, *hi);
  } else if (format == IQ4_NL || format == MXFP4) {
    const __m128i values = format == IQ4_NL ? _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153,
                                                            (char)166, (char)181, (char)197, (char)217, (char)241)
                                            : _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    *lo = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), *lo);
    *hi = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), *hi);
  }
}

VNNI_INLINE __m512i broadcast_int(const uint8_t *p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

VNNI_INLINE __m512 broadcast_512(const uint8_t *p) {
  float v;
  memcpy(&v, p, 4);
  return _mm512_set1_ps(v);
}

/* Two sums: where halves need scales of their own, and for few lanes, so that chains are short. */
VNNI_INLINE int two_sums(const int format, const int lanes) { return is_split(format) || lanes <= 2; }

VNNI_INLINE void dot_step(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, const int j,
                          __m512i first[8], __m512i second[8]) {
  __m512i lo, hi;
  levels512(format, body, j, &lo, &hi);
  EACH_LANE {
    const uint8_t *q = tile + 32 * t + 4 * j;
    first[t] = _mm512_dpbusd_epi32(first[t], lo, broadcast_int(q));
    if (two_sums(format, lanes))
      second[t] = _mm512_dpbusd_epi32(second[t], hi, broadcast_int(q + 16));
    else
      first[t] = _mm512_dpbusd_epi32(first[t], hi, broadcast_int(q + 16));
  }
}

VNNI_INLINE void body_dot(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, __m512i first[8],
                          __m512i second[8]) {
  EACH_LANE {
    const uint8_t *start = tile + 40 * lanes + 8 * t;
    first[t] = has_correction(format) ? broadcast_int(start) : _mm512_setzero_si512();
    second[t] = has_correction(format) && is_split(format) ? broadcast_int(start + 4) : _mm512_setzero_si512();
  }
  dot_step(format, lanes, body, tile, 0, first, second);
  dot_step(format, lanes, body, tile, 1, first, second);
  dot_step(format, lanes, body, tile, 2, first, second);
  dot_step(format, lanes, body, tile, 3, first, second);
  if (two_sums(format, lanes) && !is_split(format)) EACH_LANE first[t] = _mm512_add_epi32(first[t], second[t]);
}

VNNI_INLINE __m512 halves_512(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

VNNI_INLINE __m512 scales_512(const int format, const uint8_t *block) {
  if (format != MXFP4) return halves_512(block);
  return _mm512_insertf32x8(_mm512_castps256_ps512(e8m0_halves(block)), e8m0_halves(block + 8), 1);
}

/* Formats of 32 weights a block. */
VNNI_INLINE void small_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks, const uint8_t *tile,
                           float *out) {
  const packed_shape f = shape_of(format);
  __m512 acc[8];
  EACH_LANE acc[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++, block += f.header + f.body, tile += LANE_BLOCK_BYTES * lanes) {
    __m512i first[8], second[8];
    prefetch_ahead(block, f.header + f.body);
    body_dot(format, lanes, block + f.header, tile, first, second);
    const __m512 d = scales_512(format, block);
    EACH_LANE {
      const __m512 scale = _mm512_mul_ps(d, broadcast_512(tile + 32 * lanes + 4 * t));
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first[t]), scale, acc[t]);
      if (has_minimum(format))
        acc[t] = _mm512_fmadd_ps(halves_512(block + 32), broadcast_512(tile + 36 * lanes + 4 * t), acc[t]);
    }
  }
  EACH_LANE _mm512_storeu_ps(out + 16 * t, acc[t]);
}

VNNI_INLINE __m512 integers_512(const uint8_t *bytes, const int is_signed) {
  const __m128i v = _mm_load_si128((const __m128i *)bytes);
  return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
}

/* One sub-block of 32: add to p (products) and q (minima), as in linear_scalar.c. */
VNNI_INLINE void sub_block(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, int j,
                           uint8_t scale[16][16], uint8_t minimum[16][16], __m512 p[8], __m512 q[8]) {
  const int per_32 = format == Q4_K || format == Q5_K, is_signed = format == Q3_K || format == Q6_K;
  __m512i first[8], second[8];
  prefetch_ahead(body, shape_of(format).body);
  body_dot(format, lanes, body, tile, first, second);
  const __m512 s0 = integers_512(scale[per_32 ? j : 2 * j], is_signed);
  const __m512 s1 = per_32 ? s0 : integers_512(scale[2 * j + 1], is_signed);
  EACH_LANE {
    const __m512 x = broadcast_512(tile + 32 * lanes + 4 * t);
    __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(first[t]), s0);
    if (!per_32) product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second[t]), s1, product);
    p[t] = _mm512_fmadd_ps(product, x, p[t]);
    if (per_32) {
      q[t] = _mm512_fmadd_ps(integers_512(minimum[j], 0), broadcast_512(tile + 36 * lanes + 4 * t), q[t]);
    } else if (format == Q2_K) {
      const uint8_t *sums = tile + 40 * lanes + 8 * t;
      __m512 m = _mm512_mul_ps(integers_512(minimum[2 * j], 0), _mm512_cvtepi32_ps(broadcast_int(sums)));
      m = _mm512_fmadd_ps(integers_512(minimum[2 * j + 1], 0), _mm512_cvtepi32_ps(broadcast_int(sums + 4)), m);
      q[t] = _mm512_fmadd_ps(m, x, q[t]);
    }
  }
}

/* K-quants: 256 weights a block. */
VNNI_INLINE void k_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks32, const uint8_t *tile,
                       float *out) {
  const int has_dmin = format == Q2_K || format == Q4_K || format == Q5_K;
  const packed_shape f = shape_of(format);
  __m512 acc[8];
  EACH_LANE acc[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks32; b += 8, block += f.header + 8 * f.body) {
    _Alignas(64) uint8_t scale[16][16], minimum[16][16];
    __m512 p[8], q[8];
    prefetch_ahead(block, f.header);
    sub_scales(format, block, scale, minimum);
    EACH_LANE p[t] = q[t] = _mm512_setzero_ps();
    for (int j = 0; j < 8; j++, tile += LANE_BLOCK_BYTES * lanes)
      sub_block(format, lanes, block + f.header + j * f.body, tile, j, scale, minimum, p, q);
    const __m512 d = halves_512(block);
    EACH_LANE {
      acc[t] = _mm512_fmadd_ps(d, p[t], acc[t]);
      if (has_dmin) acc[t] = _mm512_fnmadd_ps(halves_512(block + 32), q[t], acc[t]);
    }
  }
  EACH_LANE _mm512_storeu_ps(out + 16 * t, acc[t]);
}

#define DOT(kind, format, lanes)                                                                         \
  VNNI static void dot_##format##_##lanes(const uint8_t *p, int64_t b, const uint8_t *tile, float *out) { \
    kind(format, lanes, p, b, tile, out);                                                                \
  }
#define DEFINE(kind, format) DOT(kind, format, 1) DOT(kind, format, 2) DOT(kind, format, 4) DOT(kind, format, 8)
#define SMALL(format) DEFINE(small_dot, format)
#define K_QUANT(format) DEFINE(k_dot, format)
SMALL_FORMATS(SMALL)
K_FORMATS(K_QUANT)

#define DOT_ENTRY(format) \
  [format] = {dot_##format##_1, dot_##format##_2, dot_##format##_4, dot_##format##_8},
#define FLOAT_ENTRY(format) [format] = orcd_float_dot_avx512_##format,
const orcd_kernels orcd_avx512_kernels = {
    .name = "avx512vnni",
    .max_lanes = 8,
    .pairs = 0,
    .quantize = orcd_quantize_avx2,
    .dot = {SMALL_FORMATS(DOT_ENTRY) K_FORMATS(DOT_ENTRY)},
    .float_dot = {SMALL_FORMATS(FLOAT_ENTRY) K_FORMATS(FLOAT_ENTRY) FLOAT_FORMATS(FLOAT_ENTRY)},
};
#endif
