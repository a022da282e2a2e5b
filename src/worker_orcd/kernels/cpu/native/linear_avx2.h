/* AVX2 readers of the packed layout, shared by the AVX2 and AVX-512 kernels. Included by .c files only. */
#ifndef ORCD_LINEAR_AVX2_H
#define ORCD_LINEAR_AVX2_H

#include "linear.h"

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

#define EACH_HALF _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

/* header and body of orcd_format, as constants where `format` is one. */
typedef struct {
  int header, body;
} packed_shape;

AVX2_INLINE packed_shape shape_of(const int format) {
  switch (format) {
    case Q4_1: return (packed_shape){64, 256};
    case Q5_0: return (packed_shape){32, 320};
    case Q5_1: return (packed_shape){64, 320};
    case Q8_0: return (packed_shape){32, 512};
    case MXFP4: return (packed_shape){16, 256};
    case Q2_K: return (packed_shape){320, 128};
    case Q3_K: return (packed_shape){224, 192};
    case Q4_K: return (packed_shape){256, 256};
    case Q5_K: return (packed_shape){256, 320};
    case Q6_K: return (packed_shape){288, 384};
    default: return (packed_shape){32, 256}; /* Q4_0, IQ4_NL */
  }
}

AVX2_INLINE int is_k_quant(const int format) { return format >= Q2_K && format <= Q6_K; }
AVX2_INLINE int has_minimum(const int format) { return format == Q4_1 || format == Q5_1; }

AVX2_INLINE __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
AVX2_INLINE void store256(void *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }
AVX2_INLINE __m128i load64(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }

/*
 * The hardware's own prefetching falls behind one core's reading, most of all where the reading order is uneven:
 * from 12-33 to 35-44 GB/s with this. Reading past the end of a matrix is harmless, prefetches do not fault.
 */
#define PREFETCH_DISTANCE 8192

AVX2_INLINE void prefetch_ahead(const uint8_t *p, const int bytes) {
  for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)p + PREFETCH_DISTANCE + i, _MM_HINT_T0);
}

AVX2_INLINE __m256i six_bits(__m256i low_nibbles, __m256i top, const int shift) {
  const __m256i two = _mm256_and_si256(shift < 4 ? _mm256_slli_epi16(top, 4 - shift) : _mm256_srli_epi16(top, shift - 4),
                                       _mm256_set1_epi8(0x30));
  return _mm256_or_si256(_mm256_and_si256(low_nibbles, _mm256_set1_epi8(15)), two);
}

/*
 * Integer scales of a K-quant block as bytes: scale[c][row], minimum[c][row]; c is a sub-block of 32 (Q4_K, Q5_K:
 * 8 of them) or of 16 (16 of them). Q3_K and Q6_K: signed, no minimum. Two columns of 16 rows at a time.
 */
AVX2_INLINE void sub_scales(const int format, const uint8_t *block, uint8_t scale[16][16], uint8_t minimum[16][16]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int c = 0; c < 16; c += 2) {
    if (format == Q2_K) {
      const __m256i v = load256(block + 64 + 16 * c);
      store256(scale[c], _mm256_and_si256(v, low));
      store256(minimum[c], _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    } else if (format == Q3_K) {
      __m256i v = load256(block + 32 + 16 * (c % 8));
      if (c >= 8) v = _mm256_srli_epi16(v, 4);
      v = six_bits(v, load256(block + 32 + 16 * (8 + c % 4)), c / 4 * 2);
      store256(scale[c], _mm256_sub_epi8(v, _mm256_set1_epi8(32)));
    } else if (format == Q6_K) {
      store256(scale[c], load256(block + 32 + 16 * c));
    } else if (c < 4) { /* Q4_K, Q5_K */
      const __m256i a = load256(block + 64 + 16 * c), b = load256(block + 64 + 16 * (c + 4));
      const __m256i top = load256(block + 64 + 16 * (c + 8)), six = _mm256_set1_epi8(63);
      store256(scale[c], _mm256_and_si256(a, six));
      store256(minimum[c], _mm256_and_si256(b, six));
      store256(scale[c + 4], six_bits(top, a, 6));
      store256(minimum[c + 4], six_bits(_mm256_srli_epi16(top, 4), b, 6));
    }
  }
}

AVX2_INLINE __m256 halves_to_floats(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

/* 2^(e - 128) of 8 bytes, subnormals included. */
AVX2_INLINE __m256 e8m0_halves(const uint8_t *p) {
  const __m256i e = _mm256_cvtepu8_epi32(load64(p)), one = _mm256_set1_epi32(1);
  const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
  const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e); /* a shift of 32 or more gives 0 */
  return _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, _mm256_cmpgt_epi32(e, one)));
}

AVX2_INLINE __m256 row_scales(const int format, const uint8_t *block, const int half) {
  return format == MXFP4 ? e8m0_halves(block + 8 * half) : halves_to_floats(block + 16 * half);
}

AVX2_INLINE __m256i shifted(__m256i v, const int left) {
  return left >= 0 ? _mm256_slli_epi16(v, left) : _mm256_srli_epi16(v, -left);
}

AVX2_INLINE __m256i masked(__m256i v, const int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }

/* Levels of rows 8 h .. 8 h + 7, k = 4 j + i (lo) and 16 + 4 j + i (hi); signed for Q8_0 and IQ4_NL. */
AVX2_INLINE void levels(const int format, const uint8_t *body, const int j, const int h, __m256i *lo, __m256i *hi) {
  body += 32 * h;
  if (format == Q8_0) {
    *lo = load256(body + 64 * j);
    *hi = load256(body + 256 + 64 * j);
    return;
  }
  if (format == Q2_K || format == Q3_K) {
    *lo = masked(shifted(load256(body), -2 * j), 3);
    *hi = masked(shifted(load256(body + 64), -2 * j), 3);
    if (format == Q3_K) {
      const __m256i bits = load256(body + 128);
      *lo = _mm256_or_si256(*lo, masked(shifted(bits, 2 - j), 4));
      *hi = _mm256_or_si256(*hi, masked(shifted(bits, -2 - j), 4));
    }
    return;
  }
  const __m256i v = load256(body + 64 * j);
  *lo = masked(v, 15);
  *hi = masked(shifted(v, -4), 15);
  if (format == Q5_0 || format == Q5_1 || format == Q5_K) {
    const __m256i bits = load256(body + 256);
    *lo = _mm256_or_si256(*lo, masked(shifted(bits, 4 - j), 16));
    *hi = _mm256_or_si256(*hi, masked(shifted(bits, -j), 16));
  } else if (format == Q6_K) {
    *lo = _mm256_or_si256(*lo, masked(shifted(load256(body + 256), 4 - 2 * j), 48));
    *hi = _mm256_or_si256(*hi, masked(shifted(load256(body + 320), 4 - 2 * j), 48));
  } else if (format == IQ4_NL || format == MXFP4) {
    const __m128i values = format == IQ4_NL ? _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38,
                                                            53, 69, 89, 113)
                                            : _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    *lo = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), *lo);
    *hi = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), *hi);
  }
}

#endif
