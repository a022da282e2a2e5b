/*
 * A routing: which experts each row of a step goes to, and which rows each expert gets.
 *
 * A buffer of 5 * top_k columns of four bytes and a row for each row of the step; an entry of a row's is a slot.
 *   expert  int32  of each slot, by falling logit
 *   weight  float  of each slot
 *   pair    int32  row * top_k + slot, of all slots of the step, ordered by expert, then by row
 *   group   int32  the experts that got any pair, ascending
 *   start   int32  where in `pair` a group begins; entries after the last group: the number of pairs
 * `pair`, `group` and `start` are lists of the whole step: entry i lies in row i / top_k, column i % top_k.
 */
#ifndef ORCD_ROUTING_H
#define ORCD_ROUTING_H

#include "orcd.h"

typedef struct {
  char *data;
  int64_t row_bytes, top_k;
} routing;

enum routing_list { ROUTING_EXPERT, ROUTING_WEIGHT, ROUTING_PAIR, ROUTING_GROUP, ROUTING_START, ROUTING_LISTS };

static inline routing routing_at(const float *buffer, int64_t stride, int32_t top_k) {
  return (routing){(char *)buffer, stride * (int64_t)sizeof(float), top_k};
}

static inline void *routing_entry(routing r, enum routing_list list, int64_t i) {
  return r.data + i / r.top_k * r.row_bytes + (list * r.top_k + i % r.top_k) * 4;
}

static inline int32_t *routing_int(routing r, enum routing_list list, int64_t i) { return routing_entry(r, list, i); }

/* How many experts may get a pair: the groups that are worth planning for. */
static inline int64_t routing_groups(const orcd_op *op, int64_t rows) {
  const int64_t pairs = rows * op->top_k;
  return pairs < op->num_experts ? pairs : op->num_experts;
}

#endif
