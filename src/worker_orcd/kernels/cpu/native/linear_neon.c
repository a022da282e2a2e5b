/*
 * Linear kernels for aarch64 with the dot product instructions. The arithmetic is that of linear_scalar.c, bit for
 * bit.
 *
 * Four rows at a time: sdot by lane multiplies four consecutive k of four rows with the same four activations.
 * Levels are signed bytes; where they are stored with an offset the sum starts with -offset * sum(q).
 */
#if defined(__aarch64__) && defined(__ARM_NEON)
#include "linear.h"
#include "quantize.h"

#include <arm_neon.h>

#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define INLINE static inline __attribute__((always_inline, target("arch=armv8.2-a+dotprod")))
#define EACH_LANE _Pragma("GCC unroll 4") for (int t = 0; t < lanes; t++)
#define EACH_QUAD for (int v = 0; v < 4; v++)

INLINE int is_k_quant(const int format) { return format >= Q2_K && format <= Q6_K; }
INLINE int has_minimum(const int format) { return format == Q4_1 || format == Q5_1; }
INLINE int has_dmin(const int format) { return format == Q2_K || format == Q4_K || format == Q5_K; }
INLINE int per_32(const int format) { return format == Q4_K || format == Q5_K; }
INLINE int is_split(const int format) { return format == Q2_K || format == Q3_K || format == Q6_K; }
INLINE int stored_offset(const int format) {
  return format == Q4_0 ? 8 : format == Q5_0 ? 16 : format == Q3_K ? 4 : format == Q6_K ? 32 : 0;
}

INLINE uint8x16_t shifted(uint8x16_t v, const int left) { return vshlq_u8(v, vdupq_n_s8((int8_t)left)); }
INLINE uint8x16_t masked(uint8x16_t v, const int mask) { return vandq_u8(v, vdupq_n_u8((uint8_t)mask)); }

/* Stored levels of rows 4 v .. 4 v + 3, k = 4 j + i (lo) and 16 + 4 j + i (hi). */
INLINE void levels(const int format, const uint8_t *body, const int j, const int v, int8x16_t *low, int8x16_t *high) {
  uint8x16_t lo, hi;
  body += 16 * v;
  if (format == Q8_0) {
    lo = vld1q_u8(body + 64 * j);
    hi = vld1q_u8(body + 256 + 64 * j);
  } else if (format == Q2_K || format == Q3_K) {
    lo = masked(shifted(vld1q_u8(body), -2 * j), 3);
    hi = masked(shifted(vld1q_u8(body + 64), -2 * j), 3);
    if (format == Q3_K) {
      const uint8x16_t bits = vld1q_u8(body + 128);
      lo = vorrq_u8(lo, masked(shifted(bits, 2 - j), 4));
      hi = vorrq_u8(hi, masked(shifted(bits, -2 - j), 4));
    }
  } else {
    const uint8x16_t w = vld1q_u8(body + 64 * j);
    lo = masked(w, 15);
    hi = shifted(w, -4);
    if (format == Q5_0 || format == Q5_1 || format == Q5_K) {
      const uint8x16_t bits = vld1q_u8(body + 256);
      lo = vorrq_u8(lo, masked(shifted(bits, 4 - j), 16));
      hi = vorrq_u8(hi, masked(shifted(bits, -j), 16));
    } else if (format == Q6_K) {
      lo = vorrq_u8(lo, masked(shifted(vld1q_u8(body + 256), 4 - 2 * j), 48));
      hi = vorrq_u8(hi, masked(shifted(vld1q_u8(body + 320), 4 - 2 * j), 48));
    } else if (format == IQ4_NL || format == MXFP4) {
      static const int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
      static const int8_t mxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
      const uint8x16_t values = vreinterpretq_u8_s8(vld1q_s8(format == IQ4_NL ? iq4 : mxfp4));
      lo = vqtbl1q_u8(values, lo);
      hi = vqtbl1q_u8(values, hi);
    }
  }
  *low = vreinterpretq_s8_u8(lo);
  *high = vreinterpretq_s8_u8(hi);
}

INLINE float32x4_t halves(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))); }

INLINE float32x4_t scales(const int format, const uint8_t *block, const int v) {
  if (format != MXFP4) return halves(block + 8 * v);
  float d[4];
  for (int r = 0; r < 4; r++) d[r] = orcd_e8m0_half(block[4 * v + r]);
  return vld1q_f32(d);
}

typedef struct {
  int32x4_t first[4], second[4]; /* of each lane: both halves of k, or the second half apart */
} sums;

/* Activations of each lane: 32 bytes in two registers. */
INLINE void body_dot(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, const int v, sums *s) {
  int8x16_t lo, hi;
  EACH_LANE {
    const int32_t *start = (const int32_t *)(tile + 40 * lanes + 8 * t);
    const int starts = stored_offset(format) != 0;
    s->first[t] = vdupq_n_s32(starts ? start[0] : 0);
    s->second[t] = vdupq_n_s32(starts && is_split(format) ? start[1] : 0);
  }
#define STEP(j)                                                                    \
  levels(format, body, j, v, &lo, &hi);                                            \
  EACH_LANE {                                                                      \
    const int8x16_t a = vld1q_s8((const int8_t *)tile + 32 * t);                   \
    const int8x16_t b = vld1q_s8((const int8_t *)tile + 32 * t + 16);              \
    int32x4_t *second = is_split(format) ? &s->second[t] : &s->first[t];           \
    s->first[t] = vdotq_laneq_s32(s->first[t], lo, a, j);                          \
    *second = vdotq_laneq_s32(*second, hi, b, j);                                  \
  }
  STEP(0)
  STEP(1)
  STEP(2)
  STEP(3)
#undef STEP
}

INLINE const float *scale_of(const uint8_t *tile, int lanes) { return (const float *)(tile + 32 * lanes); }
INLINE const float *sum_of(const uint8_t *tile, int lanes) { return (const float *)(tile + 36 * lanes); }

/* Formats of 32 weights a block. */
INLINE void small_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks, const uint8_t *tile,
                      float *out) {
  const orcd_format *f = orcd_find_format(format);
  float32x4_t acc[4][4];
  EACH_LANE EACH_QUAD acc[t][v] = vdupq_n_f32(0);
  for (int64_t b = 0; b < blocks; b++, block += f->header + f->body, tile += LANE_BLOCK_BYTES * lanes)
    EACH_QUAD {
      sums s;
      body_dot(format, lanes, block + f->header, tile, v, &s);
      const float32x4_t d = scales(format, block, v);
      EACH_LANE {
        const float32x4_t scale = vmulq_n_f32(d, scale_of(tile, lanes)[t]);
        acc[t][v] = vfmaq_f32(acc[t][v], vcvtq_f32_s32(s.first[t]), scale);
        if (has_minimum(format))
          acc[t][v] = vfmaq_f32(acc[t][v], halves(block + 32 + 8 * v), vdupq_n_f32(sum_of(tile, lanes)[t]));
      }
    }
  EACH_LANE EACH_QUAD vst1q_f32(out + 16 * t + 4 * v, acc[t][v]);
}

/* Integer scales and minima of a K-quant block as floats, by sub-block and row. */
typedef struct {
  float scale[16][16], minimum[16][16];
} k_scales;

INLINE void read_scales(const int format, const uint8_t *block, k_scales *s) {
  for (int r = 0; r < 16; r++) {
    int scale[16], minimum[16];
    orcd_row_sub_scales(format, block, r, scale, minimum);
    for (int c = 0; c < (per_32(format) ? 8 : 16); c++) {
      s->scale[c][r] = (float)scale[c];
      s->minimum[c][r] = (float)minimum[c];
    }
  }
}

/* One sub-block of 32 and four rows: add to p (products) and q (minima), as in linear_scalar.c. */
INLINE void sub_block(const int format, const int lanes, const uint8_t *body, const uint8_t *tile, int j, const int v,
                      const k_scales *k, float32x4_t p[4][4], float32x4_t q[4][4]) {
  const int c = per_32(format) ? j : 2 * j;
  sums s;
  body_dot(format, lanes, body, tile, v, &s);
  EACH_LANE {
    const float32x4_t x = vdupq_n_f32(scale_of(tile, lanes)[t]);
    float32x4_t product = vmulq_f32(vcvtq_f32_s32(s.first[t]), vld1q_f32(k->scale[c] + 4 * v));
    if (is_split(format))
      product = vfmaq_f32(product, vcvtq_f32_s32(s.second[t]), vld1q_f32(k->scale[c + 1] + 4 * v));
    p[t][v] = vfmaq_f32(p[t][v], product, x);
    if (per_32(format)) {
      q[t][v] = vfmaq_f32(q[t][v], vld1q_f32(k->minimum[c] + 4 * v), vdupq_n_f32(sum_of(tile, lanes)[t]));
    } else if (format == Q2_K) {
      const int32_t *plain = (const int32_t *)(tile + 40 * lanes + 8 * t);
      float32x4_t m = vmulq_n_f32(vld1q_f32(k->minimum[c] + 4 * v), (float)plain[0]);
      m = vfmaq_f32(m, vld1q_f32(k->minimum[c + 1] + 4 * v), vdupq_n_f32((float)plain[1]));
      q[t][v] = vfmaq_f32(q[t][v], m, x);
    }
  }
}

/* K-quants: 256 weights a block. */
INLINE void k_dot(const int format, const int lanes, const uint8_t *block, int64_t blocks32, const uint8_t *tile,
                  float *out) {
  const orcd_format *f = orcd_find_format(format);
  float32x4_t acc[4][4];
  EACH_LANE EACH_QUAD acc[t][v] = vdupq_n_f32(0);
  for (int64_t b = 0; b < blocks32; b += 8, block += f->header + 8 * f->body) {
    k_scales k;
    float32x4_t p[4][4], q[4][4];
    read_scales(format, block, &k);
    EACH_LANE EACH_QUAD p[t][v] = q[t][v] = vdupq_n_f32(0);
    for (int j = 0; j < 8; j++, tile += LANE_BLOCK_BYTES * lanes)
      EACH_QUAD sub_block(format, lanes, block + f->header + j * f->body, tile, j, v, &k, p, q);
    EACH_LANE EACH_QUAD {
      acc[t][v] = vfmaq_f32(acc[t][v], halves(block + 8 * v), p[t][v]);
      if (has_dmin(format)) acc[t][v] = vfmsq_f32(acc[t][v], halves(block + 32 + 8 * v), q[t][v]);
    }
  }
  EACH_LANE EACH_QUAD vst1q_f32(out + 16 * t + 4 * v, acc[t][v]);
}

/* ---- float activations ------------------------------------------------------------------------------------- */

typedef float weight_row[16]; /* of one k, 16 rows */

/* The levels in a register, four bytes for each of four rows, as weights of four k. */
INLINE void four_weights(const int format, float32x4_t scale, float32x4_t minimum, int8x16_t levels, const int v,
                         weight_row out[4]) {
  const int32x4_t words = vreinterpretq_s32_s8(levels), offset = vdupq_n_s32(stored_offset(format));
  for (int i = 0; i < 4; i++) {
    const int32x4_t level = vshrq_n_s32(vshlq_s32(words, vdupq_n_s32(24 - 8 * i)), 24);
    float32x4_t w = vmulq_f32(scale, vcvtq_f32_s32(vsubq_s32(level, offset)));
    if (has_minimum(format)) w = vaddq_f32(w, minimum);
    if (has_dmin(format)) w = vsubq_f32(w, minimum);
    vst1q_f32(out[i] + 4 * v, w);
  }
}

/* Weights k0 .. k0 + 31 of a panel. Called with k0 = 0, 32, ... in order; `k`: the scales of the current block. */
INLINE void panel_weights(const int format, const uint8_t *panel, int64_t k0, k_scales *k, weight_row out[32]) {
  const orcd_format *f = orcd_find_format(format);
  const uint8_t *block = panel + k0 / f->block * 16 * f->bytes;
  const int j = (int)(k0 % f->block / 32), c = per_32(format) ? j : 2 * j;
  if (is_k_quant(format) && j == 0) read_scales(format, block, k);
  EACH_QUAD {
    float32x4_t scale[2], minimum[2];
    scale[0] = scale[1] = scales(format, block, v);
    minimum[0] = minimum[1] = has_minimum(format) || has_dmin(format) ? halves(block + 32 + 8 * v) : vdupq_n_f32(0);
    if (is_k_quant(format))
      for (int half = 0; half < 2; half++) {
        const int sub = per_32(format) ? c : c + half;
        scale[half] = vmulq_f32(scale[half], vld1q_f32(k->scale[sub] + 4 * v));
        minimum[half] = vmulq_f32(minimum[half], vld1q_f32(k->minimum[sub] + 4 * v));
      }
    for (int step = 0; step < 4; step++) {
      int8x16_t lo, hi;
      levels(format, block + f->header + j * f->body, step, v, &lo, &hi);
      four_weights(format, scale[0], minimum[0], lo, v, out + 4 * step);
      four_weights(format, scale[1], minimum[1], hi, v, out + 16 + 4 * step);
    }
  }
}

/* acc += products of up to 32 weights with one token. */
INLINE void multiply(const weight_row *weights, int count, const float *x, float *acc) {
  float32x4_t partial[2][4];
  EACH_QUAD partial[0][v] = partial[1][v] = vdupq_n_f32(0);
  for (int i = 0; i + 1 < count; i += 2)
    EACH_QUAD {
      partial[0][v] = vfmaq_n_f32(partial[0][v], vld1q_f32(weights[i] + 4 * v), x[i]);
      partial[1][v] = vfmaq_n_f32(partial[1][v], vld1q_f32(weights[i + 1] + 4 * v), x[i + 1]);
    }
  if (count % 2)
    EACH_QUAD partial[0][v] = vfmaq_n_f32(partial[0][v], vld1q_f32(weights[count - 1] + 4 * v), x[count - 1]);
  EACH_QUAD vst1q_f32(acc + 4 * v, vaddq_f32(vld1q_f32(acc + 4 * v), vaddq_f32(partial[0][v], partial[1][v])));
}

INLINE void float_dot(const int format, const uint8_t *panel, int64_t k, const float *x, int64_t ldx, int64_t tokens,
                      float *acc) {
  weight_row weights[32];
  k_scales scales_of_block;
  memset(acc, 0, sizeof(float) * 16 * (size_t)tokens);
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    const int count = k - k0 < 32 ? (int)(k - k0) : 32;
    if (is_float_format(format))
      orcd_panel_weights(format, panel, k0, count, weights);
    else
      panel_weights(format, panel, k0, &scales_of_block, weights);
    for (int64_t t = 0; t < tokens; t++) multiply((const weight_row *)weights, count, x + t * ldx + k0, acc + 16 * t);
  }
}

#define DOT(kind, format, lanes)                                                                            \
  DOTPROD static void dot_##format##_##lanes(const uint8_t *p, int64_t b, const uint8_t *tile, float *out) { \
    kind(format, lanes, p, b, tile, out);                                                                   \
  }
#define FLOAT_DOT(format)                                                                                    \
  DOTPROD static void float_dot_##format(const uint8_t *p, int64_t k, const float *x, int64_t ldx, int64_t n, \
                                         float *acc) {                                                       \
    float_dot(format, p, k, x, ldx, n, acc);                                                                 \
  }
#define SMALL(format) DOT(small_dot, format, 1) DOT(small_dot, format, 2) DOT(small_dot, format, 4) FLOAT_DOT(format)
#define K_QUANT(format) DOT(k_dot, format, 1) DOT(k_dot, format, 2) DOT(k_dot, format, 4) FLOAT_DOT(format)
SMALL_FORMATS(SMALL)
K_FORMATS(K_QUANT)
FLOAT_FORMATS(FLOAT_DOT)

#define DOT_ENTRY(format) [format] = {dot_##format##_1, dot_##format##_2, dot_##format##_4, NULL},
#define FLOAT_ENTRY(format) [format] = float_dot_##format,
const orcd_kernels orcd_neon_kernels = {
    .name = "neon",
    .max_lanes = 4,
    .pairs = 0,
    .quantize = orcd_quantize_scalar,
    .dot = {SMALL_FORMATS(DOT_ENTRY) K_FORMATS(DOT_ENTRY)},
    .float_dot = {SMALL_FORMATS(FLOAT_ENTRY) K_FORMATS(FLOAT_ENTRY) FLOAT_FORMATS(FLOAT_ENTRY)},
};
#endif
