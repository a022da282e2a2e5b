/*
 * Sixteen float lanes, the same bits on every instruction set: one zmm, two ymm, or a plain array.
 *
 * Included once per instruction set by each_isa.h, which defines ISA (a suffix), TARGET (a function attribute)
 * and one of ISA_AVX512, ISA_AVX2, ISA_PLAIN. Every operation here is one correctly rounded IEEE operation per
 * lane, in an order that is written down, so the instruction set cannot change a result. Fused multiply-adds are
 * explicit; the compiler is told not to invent any (-ffp-contract=off).
 */

#define V_(name, isa) name##_##isa
#define V__(name, isa) V_(name, isa)
#define V(name) V__(name, ISA)
#define INLINE static inline __attribute__((always_inline)) TARGET

#if defined(ISA_AVX512)

typedef struct {
  __m512 v;
} V(v16);
#define v16 V(v16)

INLINE v16 V(load)(const float *p) { return (v16){_mm512_loadu_ps(p)}; }
INLINE void V(store)(float *p, v16 a) { _mm512_storeu_ps(p, a.v); }
INLINE v16 V(load_n)(const float *p, int n) {
  return (v16){_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p)};
}
INLINE void V(store_n)(float *p, v16 a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a.v); }
INLINE v16 V(load_half)(const uint16_t *p) {
  return (v16){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))};
}
INLINE void V(store_half)(uint16_t *p, v16 a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE v16 V(set1)(float x) { return (v16){_mm512_set1_ps(x)}; }
INLINE v16 V(add)(v16 a, v16 b) { return (v16){_mm512_add_ps(a.v, b.v)}; }
INLINE v16 V(sub)(v16 a, v16 b) { return (v16){_mm512_sub_ps(a.v, b.v)}; }
INLINE v16 V(mul)(v16 a, v16 b) { return (v16){_mm512_mul_ps(a.v, b.v)}; }
INLINE v16 V(div)(v16 a, v16 b) { return (v16){_mm512_div_ps(a.v, b.v)}; }
INLINE v16 V(fma)(v16 a, v16 b, v16 c) { return (v16){_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE v16 V(max)(v16 a, v16 b) { return (v16){_mm512_max_ps(a.v, b.v)}; } /* a > b ? a : b */
INLINE v16 V(min)(v16 a, v16 b) { return (v16){_mm512_min_ps(a.v, b.v)}; } /* a < b ? a : b */
/* Lanes first <= i < last of a, `other` elsewhere. */
INLINE v16 V(keep)(v16 a, int first, int last, float other) {
  __mmask16 mask = (__mmask16)(((1u << last) - 1) & ~((1u << first) - 1));
  return (v16){_mm512_mask_mov_ps(_mm512_set1_ps(other), mask, a.v)};
}
/* a * 2^n for integers n given as floats plus 1.5 * 2^23; -160 <= n <= 140. */
INLINE v16 V(scale2)(v16 a, v16 shifted) {
  __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(0x4b400000));
  __m512i low = _mm512_srai_epi32(n, 1), high = _mm512_sub_epi32(n, low), bias = _mm512_set1_epi32(127);
  __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(low, bias), 23));
  __m512 y = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(high, bias), 23));
  return (v16){_mm512_mul_ps(_mm512_mul_ps(a.v, x), y)};
}

#elif defined(ISA_AVX2)

typedef struct {
  __m256 a, b;
} V(v16);
#define v16 V(v16)
#define EACH(f, x, y) \
  (v16) { f((x).a, (y).a), f((x).b, (y).b) }

INLINE __m256i V(first)(int n) { /* all ones in lanes below n, which may be negative or above 8 */
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE v16 V(load)(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void V(store)(float *p, v16 a) {
  _mm256_storeu_ps(p, a.a);
  _mm256_storeu_ps(p + 8, a.b);
}
INLINE v16 V(load_n)(const float *p, int n) {
  return (v16){_mm256_maskload_ps(p, V(first)(n)), _mm256_maskload_ps(p + 8, V(first)(n - 8))};
}
INLINE void V(store_n)(float *p, v16 a, int n) {
  _mm256_maskstore_ps(p, V(first)(n), a.a);
  _mm256_maskstore_ps(p + 8, V(first)(n - 8), a.b);
}
INLINE v16 V(load_half)(const uint16_t *p) {
  return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
               _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void V(store_half)(uint16_t *p, v16 a) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE v16 V(set1)(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16 V(add)(v16 a, v16 b) { return EACH(_mm256_add_ps, a, b); }
INLINE v16 V(sub)(v16 a, v16 b) { return EACH(_mm256_sub_ps, a, b); }
INLINE v16 V(mul)(v16 a, v16 b) { return EACH(_mm256_mul_ps, a, b); }
INLINE v16 V(div)(v16 a, v16 b) { return EACH(_mm256_div_ps, a, b); }
INLINE v16 V(fma)(v16 a, v16 b, v16 c) {
  return (v16){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE v16 V(max)(v16 a, v16 b) { return EACH(_mm256_max_ps, a, b); }
INLINE v16 V(min)(v16 a, v16 b) { return EACH(_mm256_min_ps, a, b); }
INLINE __m256 V(keep8)(__m256 a, int first, int last, float other) {
  __m256i mask = _mm256_andnot_si256(V(first)(first), V(first)(last));
  return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(mask));
}
INLINE v16 V(keep)(v16 a, int first, int last, float other) {
  return (v16){V(keep8)(a.a, first, last, other), V(keep8)(a.b, first - 8, last - 8, other)};
}
INLINE __m256 V(scale2_8)(__m256 a, __m256 shifted) {
  __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b400000));
  __m256i low = _mm256_srai_epi32(n, 1), high = _mm256_sub_epi32(n, low), bias = _mm256_set1_epi32(127);
  __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(low, bias), 23));
  __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(high, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, x), y);
}
INLINE v16 V(scale2)(v16 a, v16 shifted) { return EACH(V(scale2_8), a, shifted); }
#undef EACH

#else /* ISA_PLAIN */

typedef struct {
  float f[16];
} V(v16);
#define v16 V(v16)
#define LANES(expression)                              \
  do {                                                 \
    v16 r;                                             \
    for (int i = 0; i < 16; i++) r.f[i] = (expression); \
    return r;                                          \
  } while (0)

INLINE float V(half_to_float)(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  union {
    uint32_t u;
    float f;
  } x;
  if (exponent == 31) {
    x.u = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0);
  } else if (exponent) {
    x.u = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    x.f = (float)mantissa * 0x1p-24f;
    x.u |= sign;
  }
  return x.f;
}
INLINE uint16_t V(float_to_half)(float f) { /* to nearest, ties to even */
  union {
    float f;
    uint32_t u;
  } x = {f}, y;
  uint16_t sign = (uint16_t)(x.u >> 16 & 0x8000);
  x.u &= 0x7fffffff;
  if (x.u > 0x7f800000) return sign | 0x7e00 | (uint16_t)(x.u >> 13 & 0x1ff);
  if (x.u >= 0x477ff000) return sign | 0x7c00; /* 65520 and above */
  if (x.u < 0x38800000) {                       /* below 2^-14: a multiple of 2^-24, rounded by this addition */
    y.f = x.f + 0.5f;
    return sign | (uint16_t)(y.u - 0x3f000000);
  }
  return sign | (uint16_t)((x.u + 0xfff + (x.u >> 13 & 1) - 0x38000000) >> 13);
}
INLINE v16 V(load)(const float *p) { LANES(p[i]); }
INLINE void V(store)(float *p, v16 a) {
  for (int i = 0; i < 16; i++) p[i] = a.f[i];
}
INLINE v16 V(load_n)(const float *p, int n) { LANES(i < n ? p[i] : 0.0f); }
INLINE void V(store_n)(float *p, v16 a, int n) {
  for (int i = 0; i < n; i++) p[i] = a.f[i];
}
INLINE v16 V(load_half)(const uint16_t *p) { LANES(V(half_to_float)(p[i])); }
INLINE void V(store_half)(uint16_t *p, v16 a) {
  for (int i = 0; i < 16; i++) p[i] = V(float_to_half)(a.f[i]);
}
INLINE v16 V(set1)(float x) { LANES(x); }
INLINE v16 V(add)(v16 a, v16 b) { LANES(a.f[i] + b.f[i]); }
INLINE v16 V(sub)(v16 a, v16 b) { LANES(a.f[i] - b.f[i]); }
INLINE v16 V(mul)(v16 a, v16 b) { LANES(a.f[i] * b.f[i]); }
INLINE v16 V(div)(v16 a, v16 b) { LANES(a.f[i] / b.f[i]); }
INLINE v16 V(fma)(v16 a, v16 b, v16 c) { LANES(__builtin_fmaf(a.f[i], b.f[i], c.f[i])); }
INLINE v16 V(max)(v16 a, v16 b) { LANES(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
INLINE v16 V(min)(v16 a, v16 b) { LANES(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
INLINE v16 V(keep)(v16 a, int first, int last, float other) { LANES(i >= first && i < last ? a.f[i] : other); }
INLINE float V(power2)(int32_t n) {
  union {
    uint32_t u;
    float f;
  } x = {(uint32_t)(n + 127) << 23};
  return x.f;
}
INLINE v16 V(scale2)(v16 a, v16 shifted) {
  v16 r;
  for (int i = 0; i < 16; i++) {
    union {
      float f;
      int32_t i;
    } x = {shifted.f[i]};
    int32_t n = x.i - 0x4b400000, low = n >> 1;
    if (shifted.f[i] != shifted.f[i]) low = n = 0; /* NaN stays what it is */
    r.f[i] = a.f[i] * V(power2)(low) * V(power2)(n - low);
  }
  return r;
}
#undef LANES

#endif

/* Lane i + lane i + 8, then + 4, + 2, + 1. */
INLINE float V(sum)(v16 a) {
  float f[16];
  V(store)(f, a);
  for (int i = 0; i < 8; i++) f[i] += f[i + 8];
  for (int i = 0; i < 4; i++) f[i] += f[i + 4];
  return (f[0] + f[2]) + (f[1] + f[3]);
}

INLINE float V(largest)(v16 a) {
  float f[16];
  V(store)(f, a);
  float largest = f[0];
  for (int i = 1; i < 16; i++) largest = f[i] > largest ? f[i] : largest;
  return largest;
}

/* e^x to about 1 ulp; 0 below -104, infinity above 88.8. Polynomial: Cephes expf (Moshier). */
INLINE v16 V(exp)(v16 x) {
  const v16 shift = V(set1)(0x1.8p23f);
  x = V(max)(V(set1)(-110.0f), V(min)(V(set1)(89.0f), x)); /* in this order a NaN stays */
  v16 shifted = V(fma)(x, V(set1)(0x1.715476p0f), shift);
  v16 n = V(sub)(shifted, shift);
  v16 r = V(fma)(n, V(set1)(-0x1.62e4p-1f), x);
  r = V(fma)(n, V(set1)(-0x1.7f7d1cp-20f), r);
  v16 p = V(set1)(1.9875691500e-4f);
  p = V(fma)(p, r, V(set1)(1.3981999507e-3f));
  p = V(fma)(p, r, V(set1)(8.3334519073e-3f));
  p = V(fma)(p, r, V(set1)(4.1665795894e-2f));
  p = V(fma)(p, r, V(set1)(1.6666665459e-1f));
  p = V(fma)(p, r, V(set1)(5.0000001201e-1f));
  p = V(add)(V(fma)(p, V(mul)(r, r), r), V(set1)(1.0f));
  return V(scale2)(p, shifted);
}

INLINE float V(exp_1)(float x) {
  float f[16];
  V(store)(f, V(exp)(V(set1)(x)));
  return f[0];
}
