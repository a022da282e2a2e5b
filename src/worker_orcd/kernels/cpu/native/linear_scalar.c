/*
 * Linear kernels in plain C: what any machine can run, and the definition of the float arithmetic.
 *
 * Every instruction set gives these bits. For one output (a row with a lane of activations), blocks in the order
 * of k, integer sums exact, x = scale of the activation block, s = its sum:
 *   Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4   acc = fma(isum, d * x, acc)
 *   Q4_1, Q5_1                        acc = fma(m, s, fma(isum, d * x, acc))        isum of the unsigned levels
 *   Q4_K, Q5_K                        p = fma(isum * sc, x, p), q = fma(mn, s, q) over the 8 sub-blocks, then
 *                                     acc = fma(-dmin, q, fma(d, p, acc))
 *   Q3_K, Q6_K                        p = fma(isum0 * sc0 + isum1 * sc1, x, p), then acc = fma(d, p, acc)
 *   Q2_K                              as Q3_K, with q = fma(mn0 * sum0 + mn1 * sum1, x, q) and acc as in Q4_K
 * The products in parentheses are integers below 2^24: exact in int32 and in float alike.
 *
 * With float activations the weights are dequantised exactly as quant/ does, and for each 32 of k: even k are
 * summed by fma into e, odd k into o, both from zero; then acc = acc + (e + o).
 */
#include "linear.h"
#include "quantize.h"

#include <math.h>

#define EACH_LANE for (int t = 0; t < lanes; t++)

typedef struct {
  const int8_t *q;
  const float *scale, *sum;
} tile_block;

static inline tile_block tile_at(const uint8_t *tile, int lanes) {
  return (tile_block){(const int8_t *)tile, (const float *)(tile + 32 * lanes), (const float *)(tile + 36 * lanes)};
}

/* Over one half of a block: the sum of q times levels, and of q. */
static int half_dot(const int8_t *q, const int8_t *levels, int *sum) {
  int dot = 0;
  *sum = 0;
  for (int k = 0; k < 16; k++) {
    dot += q[k] * levels[k];
    *sum += q[k];
  }
  return dot;
}

static void small_block_row(int32_t format, const uint8_t *block, const uint8_t *body, int r, int lanes, const uint8_t *tile,
                            float *out) {
  const tile_block x = tile_at(tile, lanes);
  const float d = orcd_row_scale(format, block, r), m = orcd_row_minimum(format, block, r);
  int8_t levels[32];
  int sum;
  orcd_row_levels(format, body, r, levels);
  EACH_LANE {
    const int dot = half_dot(x.q + 32 * t, levels, &sum) + half_dot(x.q + 32 * t + 16, levels + 16, &sum);
    float acc = fmaf((float)dot, d * x.scale[t], out[16 * t + r]);
    if (format == Q4_1 || format == Q5_1) acc = fmaf(m, x.sum[t], acc);
    out[16 * t + r] = acc;
  }
}

static void k_block_row(int32_t format, const orcd_format *f, const uint8_t *block, int r, int lanes, const uint8_t *tile,
                        float *out) {
  float p[MAX_LANES] = {0}, q[MAX_LANES] = {0};
  int scale[16], minimum[16];
  orcd_row_sub_scales(format, block, r, scale, minimum);
  for (int j = 0; j < 8; j++, tile += LANE_BLOCK_BYTES * lanes) {
    const tile_block x = tile_at(tile, lanes);
    int8_t levels[32];
    orcd_row_levels(format, block + f->header + j * f->body, r, levels);
    EACH_LANE {
      int sum0, sum1;
      const int dot0 = half_dot(x.q + 32 * t, levels, &sum0), dot1 = half_dot(x.q + 32 * t + 16, levels + 16, &sum1);
      if (format == Q4_K || format == Q5_K) {
        p[t] = fmaf((float)((dot0 + dot1) * scale[j]), x.scale[t], p[t]);
        q[t] = fmaf((float)minimum[j], x.sum[t], q[t]);
      } else {
        p[t] = fmaf((float)(dot0 * scale[2 * j] + dot1 * scale[2 * j + 1]), x.scale[t], p[t]);
        q[t] = fmaf((float)(minimum[2 * j] * sum0 + minimum[2 * j + 1] * sum1), x.scale[t], q[t]);
      }
    }
  }
  const float d = orcd_row_scale(format, block, r), m = orcd_row_minimum(format, block, r);
  EACH_LANE {
    float acc = fmaf(d, p[t], out[16 * t + r]);
    if (format == Q4_K || format == Q5_K || format == Q2_K) acc = fmaf(-m, q[t], acc);
    out[16 * t + r] = acc;
  }
}

static inline void dot(int32_t format, int lanes, const uint8_t *panel, int64_t blocks32, const uint8_t *tile, float *out) {
  const orcd_format *f = orcd_find_format(format);
  const int per_block = f->block / 32;
  memset(out, 0, sizeof(float) * 16 * (size_t)lanes);
  for (int64_t b = 0; b < blocks32; b += per_block, panel += 16 * f->bytes) {
    for (int r = 0; r < 16; r++)
      if (per_block == 1)
        small_block_row(format, panel, panel + f->header, r, lanes, tile, out);
      else
        k_block_row(format, f, panel, r, lanes, tile, out);
    tile += LANE_BLOCK_BYTES * lanes * per_block;
  }
}

static void float_dot(int32_t format, const uint8_t *panel, int64_t k, const float *x, int64_t ldx, int64_t tokens,
                      float *acc) {
  memset(acc, 0, sizeof(float) * 16 * (size_t)tokens);
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    float weights[32][16];
    const int count = k - k0 < 32 ? (int)(k - k0) : 32;
    orcd_panel_weights(format, panel, k0, count, weights);
    for (int64_t t = 0; t < tokens; t++) {
      float partial[2][16] = {{0}};
      const float *row = x + t * ldx + k0;
      for (int i = 0; i < count; i++)
        for (int r = 0; r < 16; r++) partial[i % 2][r] = fmaf(weights[i][r], row[i], partial[i % 2][r]);
      for (int r = 0; r < 16; r++) acc[16 * t + r] += partial[0][r] + partial[1][r];
    }
  }
}

#define FLOAT_DOT(format)                                                                                          \
  static void float_dot_##format(const uint8_t *p, int64_t k, const float *x, int64_t ldx, int64_t n, float *acc) { \
    float_dot(format, p, k, x, ldx, n, acc);                                                                       \
  }
#define DOT(format, lanes)                                                                          \
  static void dot_##format##_##lanes(const uint8_t *p, int64_t b, const uint8_t *tile, float *out) { \
    dot(format, lanes, p, b, tile, out);                                                            \
  }
#define QUANTISED(X) SMALL_FORMATS(X) K_FORMATS(X)
#define DEFINE(format) FLOAT_DOT(format) DOT(format, 1) DOT(format, 2) DOT(format, 4)
QUANTISED(DEFINE)
FLOAT_FORMATS(FLOAT_DOT)

#define DOT_ENTRY(format) [format] = {dot_##format##_1, dot_##format##_2, dot_##format##_4, NULL},
#define FLOAT_ENTRY(format) [format] = float_dot_##format,
const orcd_kernels orcd_scalar_kernels = {
    .name = "scalar",
    .max_lanes = 4,
    .pairs = 0,
    .quantize = orcd_quantize_scalar,
    .dot = {QUANTISED(DOT_ENTRY)},
    .float_dot = {QUANTISED(FLOAT_ENTRY) FLOAT_FORMATS(FLOAT_ENTRY)},
};
