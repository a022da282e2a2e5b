/*
 * The layout of the KV cache and the shape of attention's sums.
 *
 * A block holds block_size / 16 tiles for each KV head; a tile holds 16 positions of one head: K transposed,
 * [head_dim][16], so that sixteen scores grow by broadcast multiply-adds, then V, [16][value_stride].
 *
 * What is computed for a token at position p is fixed by p (and the window) alone:
 *   score    a chain of fused multiply-adds over the head's dimensions, ascending, times scale;
 *   split    positions are cut at multiples of 512; a split has its largest score, its sum of exponentials (lane i
 *            sums positions i, i + 16, …; V(sum) adds the lanes), and a chain of multiply-adds of V, ascending;
 *   result   splits are merged in ascending order, then a head's sink, if any, joins the total, which divides at the end.
 * Slots a token may not see are never multiplied in, whatever they hold.
 */
#ifndef ORCD_ATTENTION_H
#define ORCD_ATTENTION_H

#include "orcd.h"

enum {
  TILE = 16,
  SPLIT = 512,
  SPLIT_TILES = SPLIT / TILE,
  GROUP = 4,        /* queries that share the loads of a tile */
  TASK_QUERIES = 32 /* queries (tokens times heads of a KV head) that a chunk computes */
};

/* A query's state: `values` is a sum of e^(score - peak) * V, `total` the sum of e^(score - peak). */
typedef struct {
  float peak, total;
  float *values;
} attention_state;

typedef struct {
  const float *q;     /* [head_dim] */
  int32_t begin, end; /* visible positions: begin <= position < end */
  int seen;           /* whether `sum` holds anything yet */
  attention_state part, sum; /* of the running split; of the splits before */
} attention_query;

/* One chunk's work on one split. */
typedef struct {
  const orcd_op *op;
  const int32_t *blocks; /* the row's block table */
  int64_t kv_head;
  int num_queries;
  attention_query *queries;
  float *scores; /* [GROUP][SPLIT] */
} attention_work;

static inline int64_t attention_value_stride(const orcd_op *op) { return (op->head_dim + 15) & ~15; }

static inline int64_t attention_tile_elements(const orcd_op *op) {
  return (int64_t)TILE * op->head_dim + TILE * attention_value_stride(op);
}

static inline int64_t attention_tile_bytes(const orcd_op *op) {
  return attention_tile_elements(op) * (op->cache_dtype == 1 ? 2 : 4);
}

/* The tile of position or slot-in-block `offset` of block `block`. */
static inline char *attention_tile(const orcd_op *op, int64_t block, int64_t kv_head, int64_t offset) {
  const int64_t tiles = op->block_size / TILE;
  const int64_t tile = (block * op->num_kv_heads + kv_head) * tiles + offset / TILE;
  return (char *)op->cache + tile * attention_tile_bytes(op);
}

#endif
