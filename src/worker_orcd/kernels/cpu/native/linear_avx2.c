/*
 * Linear kernels for AVX2 with FMA. The arithmetic is that of linear_scalar.c, bit for bit.
 *
 * Unsigned levels times int8 activations go through vpmaddubsw and are summed in 16 bits. The sum starts with
 * -offset * sum(q), so what it ends with is the signed dot product, which fits 16 bits for every format (lanes
 * wrap on the way, which addition modulo 2^16 forgives). Formats whose sum would not fit keep the two halves of
 * a block apart. Q8_0 and IQ4_NL need 32 bits at once: |level| times sign(level) * q.
 */
#ifdef __x86_64__
#include "linear_avx2.h"
#include "quantize.h"

#define EACH_LANE _Pragma("GCC unroll 4") for (int t = 0; t < lanes; t++)
#define EACH_OF_HALVES _Pragma("GCC unroll 2") for (int h = h0; h < h0 + halves; h++)

AVX2_INLINE int is_wide(const int format) { return format == Q8_0 || format == IQ4_NL; }
AVX2_INLINE int is_split(const int format) {
  return format == Q5_1 || format == Q5_K || format == Q2_K || format == Q3_K || format == Q6_K;
}
AVX2_INLINE int has_correction(const int format) {
  return format == Q4_0 || format == Q5_0 || format == MXFP4 || format == Q3_K || format == Q6_K;
}

AVX2_INLINE __m256i broadcast32(const void *p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

AVX2_INLINE __m256 broadcast_float(const uint8_t *p) {
  float v;
  memcpy(&v, p, 4);
  return _mm256_set1_ps(v);
}

/* Add levels times activations to a sum: 16-bit pairs, or 32-bit for the wide formats. */
AVX2_INLINE __m256i dot_add(const int format, __m256i sum, __m256i w, __m256i q) {
  if (!is_wide(format)) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q));
  const __m256i product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(product, _mm256_set1_epi16(1)));
}

/* Half panels (8 rows) whose sums are kept in registers at once. */
AVX2_INLINE int halves_at_once(const int format, const int lanes) { return is_split(format) && lanes == 4 ? 1 : 2; }

/*
 * The compiler would rather collect products and add them up at the end, for which there are not enough registers:
 * sums are made opaque to it after every step, and loads are forgotten between half panels.
 */
#define KEEP(sum) __asm__ volatile("" : "+x"(sum))
#define FORGET_LOADS() __asm__ volatile("" ::: "memory")

AVX2_INLINE void dot_step(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, const int j,
                          const int h0, const int halves, __m256i first[4][2], __m256i second[4][2]) {
  __m256i lo[2], hi[2];
  EACH_OF_HALVES levels(format, body, j, h, &lo[h], &hi[h]);
  EACH_LANE {
    const __m256i a = broadcast32(tile + 32 * t + 4 * j), b = broadcast32(tile + 32 * t + 16 + 4 * j);
    EACH_OF_HALVES {
      first[t][h] = dot_add(format, first[t][h], lo[h], a);
      if (is_split(format)) {
        second[t][h] = dot_add(format, second[t][h], hi[h], b);
        KEEP(second[t][h]);
      } else {
        first[t][h] = dot_add(format, first[t][h], hi[h], b);
      }
      KEEP(first[t][h]);
    }
  }
}

/* The dot products of a body with a block of the tile; `second` is the second half of k, where it is kept apart. */
AVX2_INLINE void body_dot(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, const int h0,
                          const int halves, __m256i first[4][2], __m256i second[4][2]) {
  if (halves == 1) FORGET_LOADS();
  EACH_LANE EACH_OF_HALVES {
    const uint8_t *start = tile + 40 * lanes + 8 * t;
    const __m256i zero = _mm256_setzero_si256();
    first[t][h] = has_correction(format) ? broadcast32(start) : zero;
    second[t][h] = has_correction(format) && is_split(format) ? broadcast32(start + 4) : zero;
  }
  dot_step(format, lanes, body, tile, 0, h0, halves, first, second);
  dot_step(format, lanes, body, tile, 1, h0, halves, first, second);
  dot_step(format, lanes, body, tile, 2, h0, halves, first, second);
  dot_step(format, lanes, body, tile, 3, h0, halves, first, second);
}

AVX2_INLINE void small_block(const int format, const int lanes, const uint8_t *block, const uint8_t *tile, const int h0,
                             const int halves, __m256 acc[4][2]) {
  __m256i first[4][2], second[4][2];
  body_dot(format, lanes, block + shape_of(format).header, tile, h0, halves, first, second);
  EACH_OF_HALVES {
    const __m256 d = row_scales(format, block, h);
    const __m256i one = _mm256_set1_epi16(1);
    EACH_LANE {
      __m256i sum = is_wide(format) ? first[t][h] : _mm256_madd_epi16(first[t][h], one);
      if (is_split(format)) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(second[t][h], one));
      const __m256 scale = _mm256_mul_ps(d, broadcast_float(tile + 32 * lanes + 4 * t));
      acc[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[t][h]);
      if (has_minimum(format))
        acc[t][h] = _mm256_fmadd_ps(halves_to_floats(block + 32 + 16 * h), broadcast_float(tile + 36 * lanes + 4 * t),
                                    acc[t][h]);
    }
  }
}

/* Formats of 32 weights a block. */
AVX2_INLINE void small_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks, const uint8_t *tile,
                           float *out) {
  const int bytes = shape_of(format).header + shape_of(format).body, halves = halves_at_once(format, lanes);
  __m256 acc[4][2];
  EACH_LANE acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; b++, block += bytes, tile += LANE_BLOCK_BYTES * lanes) {
    prefetch_ahead(block, bytes);
    small_block(format, lanes, block, tile, 0, halves, acc);
    if (halves == 1) small_block(format, lanes, block, tile, 1, halves, acc);
  }
  EACH_LANE EACH_HALF _mm256_storeu_ps(out + 16 * t + 8 * h, acc[t][h]);
}

/* A scale for each row as two equal int16, for vpmaddwd. */
AVX2_INLINE __m256i scale_pairs(const uint8_t *bytes, const int is_signed) {
  const __m256i v = is_signed ? _mm256_and_si256(_mm256_cvtepi8_epi32(load64(bytes)), _mm256_set1_epi32(0xffff))
                              : _mm256_cvtepu8_epi32(load64(bytes));
  return _mm256_or_si256(v, _mm256_slli_epi32(v, 16));
}

/* The scales of the block that is being read, and its sums so far: p (products) and q (minima). */
typedef struct {
  uint8_t scale[16][16], minimum[16][16];
  __m256 p[4][2], q[4][2];
} k_state;

/* Sub-block j: add to p and q, as in linear_scalar.c. */
AVX2_INLINE void sub_block(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, int j,
                           const int h0, const int halves, k_state *s) {
  const int per_32 = format == Q4_K || format == Q5_K, is_signed = format == Q3_K || format == Q6_K;
  __m256i first[4][2], second[4][2];
  body_dot(format, lanes, body, tile, h0, halves, first, second);
  EACH_OF_HALVES {
    const __m256i s0 = scale_pairs(s->scale[per_32 ? j : 2 * j] + 8 * h, is_signed);
    const __m256i s1 = per_32 ? s0 : scale_pairs(s->scale[2 * j + 1] + 8 * h, is_signed);
    EACH_LANE {
      const __m256 x = broadcast_float(tile + 32 * lanes + 4 * t);
      __m256i sum = _mm256_madd_epi16(first[t][h], s0);
      if (is_split(format)) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(second[t][h], s1));
      s->p[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), x, s->p[t][h]);
      if (per_32) {
        const __m256 m = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load64(s->minimum[j] + 8 * h)));
        s->q[t][h] = _mm256_fmadd_ps(m, broadcast_float(tile + 36 * lanes + 4 * t), s->q[t][h]);
      } else if (format == Q2_K) {
        const uint8_t *sums = tile + 40 * lanes + 8 * t;
        const __m256i a = _mm256_madd_epi16(broadcast32(sums), scale_pairs(s->minimum[2 * j] + 8 * h, 0));
        const __m256i b = _mm256_madd_epi16(broadcast32(sums + 4), scale_pairs(s->minimum[2 * j + 1] + 8 * h, 0));
        s->q[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), x, s->q[t][h]);
      }
    }
  }
}

/* K-quants: 256 weights a block. */
AVX2_INLINE void k_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks32, const uint8_t *tile,
                       float *out) {
  const int has_dmin = format == Q2_K || format == Q4_K || format == Q5_K, halves = halves_at_once(format, lanes);
  const packed_shape f = shape_of(format);
  __m256 acc[4][2];
  EACH_LANE acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks32; b += 8, block += f.header + 8 * f.body) {
    k_state s;
    prefetch_ahead(block, f.header);
    sub_scales(format, block, s.scale, s.minimum);
    EACH_LANE s.p[t][0] = s.p[t][1] = s.q[t][0] = s.q[t][1] = _mm256_setzero_ps();
    for (int j = 0; j < 8; j++, tile += LANE_BLOCK_BYTES * lanes) {
      const uint8_t *body = block + f.header + j * f.body;
      prefetch_ahead(body, f.body);
      sub_block(format, lanes, body, tile, j, 0, halves, &s);
      if (halves == 1) sub_block(format, lanes, body, tile, j, 1, halves, &s);
    }
    EACH_HALF {
      const __m256 d = halves_to_floats(block + 16 * h), m = halves_to_floats(block + 32 + 16 * h);
      EACH_LANE {
        acc[t][h] = _mm256_fmadd_ps(d, s.p[t][h], acc[t][h]);
        if (has_dmin) acc[t][h] = _mm256_fnmadd_ps(m, s.q[t][h], acc[t][h]);
      }
    }
  }
  EACH_LANE EACH_HALF _mm256_storeu_ps(out + 16 * t + 8 * h, acc[t][h]);
}

#define DOT(kind, format, lanes)                                                                         \
  AVX2 static void dot_##format##_##lanes(const uint8_t *p, int64_t b, const uint8_t *tile, float *out) { \
    kind(format, lanes, p, b, tile, out);                                                                \
  }
#define DEFINE(kind, format) DOT(kind, format, 1) DOT(kind, format, 2) DOT(kind, format, 4)
#define SMALL(format) DEFINE(small_dot, format)
#define K_QUANT(format) DEFINE(k_dot, format)
SMALL_FORMATS(SMALL)
K_FORMATS(K_QUANT)

#define DOT_ENTRY(format) [format] = {dot_##format##_1, dot_##format##_2, dot_##format##_4, NULL},
#define FLOAT_ENTRY(format) [format] = orcd_float_dot_avx2_##format,
const orcd_kernels orcd_avx2_kernels = {
    .name = "avx2",
    .max_lanes = 4,
    .pairs = 1,
    .quantize = orcd_quantize_avx2,
    .dot = {SMALL_FORMATS(DOT_ENTRY) K_FORMATS(DOT_ENTRY)},
    .float_dot = {SMALL_FORMATS(FLOAT_ENTRY) K_FORMATS(FLOAT_ENTRY) FLOAT_FORMATS(FLOAT_ENTRY)},
};
#endif
