/* What the products of `linear` and of `expert_linear` share: the size of their chunks, tiles of quantised
 * activations, and the storing of results. Included by .c files only. */
#ifndef ORCD_TILES_H
#define ORCD_TILES_H

#include "linear.h"

#define CHUNK_BYTES (96 << 10)      /* of weights: long enough to hide a claim, short enough to share out evenly */
#define CHUNKS_PER_THREAD 4         /* at least, so that a slow thread can be helped */
#define TOKEN_BLOCK_BYTES (256 << 10) /* of quantised activations: they stay in the second-level cache */
#define QUANTIZE_CHUNK_FLOATS 8192
#define FLOAT_TOKEN_BLOCK 64
#define SELF_QUANTIZED_LANES 4      /* up to so many lanes every thread quantises for itself */
#define MAX_THREADS 256

static inline int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int planes_of(const orcd_op *op) { return op->activations == 16 ? 2 : 1; }

static inline int64_t batch_rows(const orcd_op *op, const orcd_batch *batch) {
  return op->rows == ORCD_LOGITS ? batch->num_logits : batch->num_tokens;
}

/* Lanes of a tile that starts at lane `first`: full, or the power of two that holds the rest. */
static inline int lanes_of_tile(int64_t first, int64_t all, int max_lanes) {
  int lanes = max_lanes;
  while (lanes > 1 && lanes / 2 >= all - first) lanes /= 2;
  return lanes;
}

static inline int log2_of(int lanes) { return lanes >= 8 ? 3 : lanes / 2; }

/* Blocks of one lane lie `lanes` lanes apart; all of its numbers become zero. */
static inline void clear_lane(uint8_t *tile, int64_t blocks, int lanes, int lane) {
  for (int64_t b = 0; b < blocks; b++, tile += LANE_BLOCK_BYTES * lanes) {
    memset(tile + 32 * lane, 0, 32);
    memset(tile + 32 * lanes + 4 * lane, 0, 4);
    memset(tile + 36 * lanes + 4 * lane, 0, 4);
    memset(tile + 40 * lanes + 8 * lane, 0, 8);
  }
}

static inline orcd_correction correction_for(int32_t format, const orcd_kernels *kernels) {
  const int32_t offset = orcd_find_format(format)->offset;
  const int split = format == Q2_K || format == Q3_K || format == Q6_K;
  return (orcd_correction){format == Q2_K ? 1 : -offset, split, kernels->pairs};
}

/* The bias of `rows` rows of a panel, padded. */
static inline void read_bias(float bias[16], const float *source, int64_t rows) {
  memset(bias, 0, 16 * sizeof(float));
  memcpy(bias, source, sizeof(float) * (size_t)rows);
}

/* One token's results, [plane][16], to the `rows` outputs that exist; bias: 16 values or NULL. */
static inline void store_outputs(float *out, const float *bias, int64_t rows, int planes, const float *results) {
  float sum[16];
  memcpy(sum, results, sizeof sum);
  if (planes == 2)
    for (int r = 0; r < 16; r++) sum[r] += results[16 + r];
  if (bias != NULL)
    for (int r = 0; r < 16; r++) sum[r] += bias[r];
  if (rows == 16)
    memcpy(out, sum, sizeof sum);
  else
    memcpy(out, sum, sizeof(float) * (size_t)rows);
}

#endif
