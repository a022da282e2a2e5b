/*
 * Routing rows to experts: the top_k of each row's logits and the softmax over them, then the groups of rows that go
 * to the same expert, so that `expert_linear` need not search. routing.h has the result.
 */
#include "routing.h"

#include <errno.h>
#include <string.h>

#define KERNELS "route_kernels.h"
#include "each_isa.h"

enum { CHUNK_LOGITS = 4096 };

/* p0: rows of the step; p1: rows a chunk. */

/* A NaN counts as the highest logit: such a row's weights are all NaN, and no other row notices. */
static int is_higher(float a, float b) { return a > b || (a != a && b == b); }

/* The experts of the top_k highest logits and those logits, highest first; of equal ones the lower index first. */
static void choose(const float *logits, int64_t num_experts, int64_t top_k, int32_t *experts, float *chosen) {
  int64_t count = 0;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const float logit = logits[expert];
    if (count == top_k && !is_higher(logit, chosen[top_k - 1])) continue;
    int64_t at = count < top_k ? count++ : top_k - 1;
    for (; at > 0 && is_higher(logit, chosen[at - 1]); at--) {
      experts[at] = experts[at - 1];
      chosen[at] = chosen[at - 1];
    }
    experts[at] = (int32_t)expert;
    chosen[at] = logit;
  }
}

static void run_choose(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const orcd_op *op = task->op;
  const routing r = routing_at(op->out, op->ldout, op->top_k);
  const int64_t last = (chunk + 1) * task->p1 < task->p0 ? (chunk + 1) * task->p1 : task->p0;
  for (int64_t row = chunk * task->p1; row < last; row++) {
    float *weights = routing_entry(r, ROUTING_WEIGHT, row * op->top_k);
    choose(op->x + row * op->ldx, op->n, op->top_k, routing_int(r, ROUTING_EXPERT, row * op->top_k), weights);
    ORCD_PICK(softmax)(weights, op->top_k);
  }
}

/* Sorting by counting. One chunk: it takes a fraction of what one expert's product takes. */
static void run_group(const orcd_task *task, int64_t chunk, int thread) {
  (void)chunk;
  const orcd_op *op = task->op;
  const routing r = routing_at(op->out, op->ldout, op->top_k);
  const int64_t pairs = task->p0 * op->top_k;
  int32_t *next = orcd_thread_scratch(thread, sizeof(int32_t) * (size_t)op->n); /* the planner grew it */
  memset(next, 0, sizeof(int32_t) * (size_t)op->n);
  for (int64_t pair = 0; pair < pairs; pair++) next[*routing_int(r, ROUTING_EXPERT, pair)]++;
  int64_t groups = 0;
  int32_t start = 0;
  for (int32_t expert = 0; expert < op->n; expert++) {
    const int32_t count = next[expert];
    next[expert] = start;
    if (count == 0) continue;
    *routing_int(r, ROUTING_GROUP, groups) = expert;
    *routing_int(r, ROUTING_START, groups++) = start;
    start += count;
  }
  for (; groups < pairs; groups++) *routing_int(r, ROUTING_START, groups) = start;
  for (int64_t pair = 0; pair < pairs; pair++)
    *routing_int(r, ROUTING_PAIR, next[*routing_int(r, ROUTING_EXPERT, pair)]++) = (int32_t)pair;
}

int orcd_plan_route(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  const int64_t rows = op->rows == ORCD_LOGITS ? batch->num_logits : batch->num_tokens;
  if (!op->x || !op->out || op->top_k < 1 || op->n < op->top_k || op->n > INT32_MAX) return -EINVAL;
  if (op->ldout < (int64_t)ROUTING_LISTS * op->top_k || rows < 0 || rows > INT32_MAX / op->top_k) return -EINVAL;
  for (int thread = 0; thread < orcd_num_threads(); thread++)
    if (!orcd_thread_scratch(thread, sizeof(int32_t) * (size_t)op->n)) return -ENOMEM;
  tasks[0] = tasks[1] = (orcd_task){.op = op, .batch = batch, .p0 = rows};
  tasks[0].run = run_choose;
  tasks[0].p1 = CHUNK_LOGITS / op->n > 0 ? CHUNK_LOGITS / op->n : 1;
  tasks[0].num_chunks = (rows + tasks[0].p1 - 1) / tasks[0].p1;
  tasks[1].run = run_group;
  tasks[1].num_chunks = rows > 0;
  return 2;
}
