/*
 * Attention over the paged KV cache, and writing to it. attention.h fixes the layout and the order of the sums.
 *
 * Work is cut into items: some consecutive tokens of a row, so that they share the loads of K and V, for one KV
 * head. An item passes over all splits of its positions; when there are few items, each split is an item of its
 * own and a second task merges them, by the same merge in the same order.
 */
#include <errno.h>
#include <math.h>
#include <string.h>

#include "attention.h"

#define KERNELS "attention_kernels.h"
#include "each_isa.h"

enum { STORE_TOKENS = 16, ITEMS_PER_THREAD = 4, MOST_PARTS_BYTES = 32 << 20 };

/* Some tokens of a row. */
typedef struct {
  int64_t row, first, last;     /* tokens first <= t < last of the step */
  int32_t first_split, splits;  /* the splits that any of them sees */
  int64_t part;                 /* number of the first of its parts: one a split, counted over all items */
} item;

/* task->p0: how many tokens an item has; p1: whether splits are items; p2: whether every row is one token. */

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int32_t first_visible(const orcd_op *op, int32_t position) {
  return op->width > 0 && position >= op->width ? position - (int32_t)op->width + 1 : 0;
}

static void find_splits(const orcd_op *op, const orcd_batch *batch, item *it) {
  int32_t begin = INT32_MAX, end = 0;
  for (int64_t t = it->first; t < it->last; t++) {
    const int32_t position = batch->positions[t];
    begin = (int32_t)smaller(begin, first_visible(op, position));
    end = (int32_t)larger(end, position + 1);
  }
  it->first_split = begin / SPLIT;
  it->splits = (end + SPLIT - 1) / SPLIT - it->first_split;
}

/* Go on to the next item; start with last = row = part = splits = 0. 0 at the end. */
static int next_item(const orcd_op *op, const orcd_batch *batch, int64_t tokens, item *it) {
  it->part += it->splits;
  it->first = it->last;
  while (it->row < batch->num_rows && it->first >= batch->query_start[it->row + 1]) it->row++;
  if (it->row >= batch->num_rows) return 0;
  it->last = smaller(it->first + tokens, batch->query_start[it->row + 1]);
  find_splits(op, batch, it);
  return 1;
}

/* ---- one item ------------------------------------------------------------------------------------------ */

static int64_t group_size(const orcd_op *op) { return op->num_heads / op->num_kv_heads; }

static int64_t state_floats(const orcd_op *op) { return 16 + attention_value_stride(op); } /* peak, total; values */

/* Scratch of a thread: queries, values of part and sum, scores. */
static int64_t queries_bytes(const orcd_op *op, int64_t tokens) {
  return round64(tokens * group_size(op) * (int64_t)sizeof(attention_query));
}

static int64_t scratch_bytes(const orcd_op *op, int64_t tokens) {
  const int64_t values = 2 * tokens * group_size(op) * attention_value_stride(op);
  return queries_bytes(op, tokens) + (values + GROUP * SPLIT) * (int64_t)sizeof(float);
}

static void fill_queries(const orcd_task *task, const item *it, attention_work *work, char *scratch) {
  const orcd_op *op = task->op;
  const int64_t group = group_size(op), stride = attention_value_stride(op);
  float *values = (float *)(scratch + queries_bytes(op, task->p0));
  work->queries = (attention_query *)scratch;
  work->num_queries = 0;
  for (int64_t t = it->first; t < it->last; t++) {
    const int32_t position = task->batch->positions[t];
    const float *q = op->x + t * op->ldx + work->kv_head * group * op->head_dim;
    for (int64_t head = 0; head < group; head++, values += 2 * stride) {
      work->queries[work->num_queries++] = (attention_query){
          .q = q + head * op->head_dim,
          .begin = first_visible(op, position),
          .end = position + 1,
          .part.values = values,
          .sum.values = values + stride,
      };
    }
  }
  work->scores = (float *)(scratch + scratch_bytes(op, task->p0)) - GROUP * SPLIT;
}

static const float *sink_of(const orcd_op *op, int64_t head) { return op->vector ? op->vector + head : NULL; }

static float *part_of(const orcd_task *task, int64_t part, int64_t token, int64_t head) {
  const int64_t heads = task->p0 * task->op->num_heads; /* states a part, for full items */
  return (float *)task->scratch + (part * heads + token * task->op->num_heads + head) * state_floats(task->op);
}

static void attend_all(const orcd_task *task, const item *it, const attention_work *work) {
  const orcd_op *op = task->op;
  const int64_t group = group_size(op), stride = attention_value_stride(op);
  for (int32_t s = 0; s < it->splits; s++) {
    ORCD_PICK(split)(work, (it->first_split + s) * SPLIT);
    for (int i = 0; i < work->num_queries; i++) {
      attention_query *query = &work->queries[i];
      if (query->part.total == 0.0f) continue;
      ORCD_PICK(merge)(&query->sum, &query->part, stride, query->seen);
      query->seen = 1;
    }
  }
  for (int i = 0; i < work->num_queries; i++) {
    const int64_t token = it->first + i / group, head = work->kv_head * group + i % group;
    float *out = op->out + token * op->ldout + head * op->head_dim;
    ORCD_PICK(finish)(&work->queries[i].sum, sink_of(op, head), out, op->head_dim);
  }
}

static void attend_split(const orcd_task *task, const item *it, const attention_work *work, int64_t split) {
  const int64_t group = group_size(task->op);
  for (int i = 0; i < work->num_queries; i++) {
    float *state = part_of(task, it->part + split, i / group, work->kv_head * group + i % group);
    work->queries[i].part.values = state + 16;
  }
  ORCD_PICK(split)(work, (int32_t)(it->first_split + split) * SPLIT);
  for (int i = 0; i < work->num_queries; i++) {
    float *state = part_of(task, it->part + split, i / group, work->kv_head * group + i % group);
    state[0] = work->queries[i].part.peak;
    state[1] = work->queries[i].part.total;
  }
}

static void run_attention(const orcd_task *task, int64_t chunk, int thread) {
  const orcd_op *op = task->op;
  const int64_t number = chunk / op->num_kv_heads; /* of the item, or of the part */
  item it = {0};
  int64_t index = -1;
  if (task->p2 && !task->p1) { /* no need to search */
    it = (item){.row = number, .first = number, .last = number + 1};
    find_splits(op, task->batch, &it);
  } else {
    while (next_item(op, task->batch, task->p0, &it)) {
      index++;
      if (task->p1 ? number < it.part + it.splits : number == index) break;
    }
  }
  char *scratch = orcd_thread_scratch(thread, (size_t)scratch_bytes(op, task->p0)); /* the planner grew it */
  attention_work work = {
      .op = op,
      .blocks = task->batch->block_tables + op->group * task->batch->block_group_stride +
                it.row * task->batch->block_table_stride,
      .kv_head = chunk % op->num_kv_heads,
  };
  fill_queries(task, &it, &work, scratch);
  if (task->p1) {
    attend_split(task, &it, &work, number - it.part);
  } else {
    attend_all(task, &it, &work);
  }
}

/* A chunk is an item: all of its tokens and heads. */
static void run_merge(const orcd_task *task, int64_t chunk, int thread) {
  const orcd_op *op = task->op;
  const int64_t stride = attention_value_stride(op);
  item it = {0};
  for (int64_t i = 0; i <= chunk; i++) next_item(op, task->batch, task->p0, &it);
  attention_state sum = {.values = orcd_thread_scratch(thread, (size_t)scratch_bytes(op, task->p0))};
  for (int64_t token = it.first; token < it.last; token++) {
    for (int64_t head = 0; head < op->num_heads; head++) {
      int seen = 0;
      for (int32_t s = 0; s < it.splits; s++) {
        float *state = part_of(task, it.part + s, token - it.first, head);
        const attention_state part = {.peak = state[0], .total = state[1], .values = state + 16};
        if (part.total == 0.0f) continue;
        ORCD_PICK(merge)(&sum, &part, stride, seen);
        seen = 1;
      }
      ORCD_PICK(finish)(&sum, sink_of(op, head), op->out + token * op->ldout + head * op->head_dim, op->head_dim);
    }
  }
}

/* ---- planning ------------------------------------------------------------------------------------------ */

static int valid(const orcd_op *op) {
  return op->x && op->cache && op->head_dim > 0 && op->num_kv_heads > 0 && op->block_size > 0 &&
         op->block_size % TILE == 0 && (op->cache_dtype == 0 || op->cache_dtype == 1);
}

static int one_token_a_row(const orcd_batch *batch) {
  if (batch->num_tokens != batch->num_rows) return 0;
  for (int64_t row = 0; row <= batch->num_rows; row++) {
    if (batch->query_start[row] != row) return 0;
  }
  return 1;
}

int orcd_plan_attention(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  if (!valid(op) || !op->out || op->num_heads <= 0 || op->num_heads % op->num_kv_heads) return -EINVAL;
  orcd_task task = {.op = op, .batch = batch, .run = run_attention};
  task.p2 = one_token_a_row(batch);
  task.p0 = task.p2 ? 1 : larger(1, TASK_QUERIES / group_size(op));
  const int threads = orcd_num_threads();
  int64_t items = 0;
  item it = {0};
  while (next_item(op, batch, task.p0, &it)) items++;
  const int64_t parts = it.part;
  const int64_t parts_bytes = parts * task.p0 * op->num_heads * state_floats(op) * (int64_t)sizeof(float);
  for (int thread = 0; thread < threads; thread++) {
    if (!orcd_thread_scratch(thread, (size_t)scratch_bytes(op, task.p0))) return -ENOMEM;
  }
  task.p1 = threads > 1 && parts > items && items * op->num_kv_heads < ITEMS_PER_THREAD * threads &&
            parts_bytes <= MOST_PARTS_BYTES;
  task.num_chunks = (task.p1 ? parts : items) * op->num_kv_heads;
  if (task.p1) {
    task.scratch = orcd_shared_scratch((size_t)parts_bytes);
    if (!task.scratch) return -ENOMEM;
    tasks[1] = task;
    tasks[1].run = run_merge;
    tasks[1].num_chunks = items;
  }
  tasks[0] = task;
  return task.p1 ? 2 : 1;
}

/* A chunk is STORE_TOKENS tokens. */
static void run_store(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const int64_t last = smaller((chunk + 1) * STORE_TOKENS, task->batch->num_tokens);
  const int32_t *slots = task->batch->slots + task->op->group * task->batch->slots_stride;
  for (int64_t t = chunk * STORE_TOKENS; t < last; t++) ORCD_PICK(store_token)(task->op, t, slots[t]);
}

int orcd_plan_store_kv(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  if (!valid(op) || !op->y) return -EINVAL;
  *tasks = (orcd_task){.op = op, .batch = batch, .run = run_store};
  tasks->num_chunks = (batch->num_tokens + STORE_TOKENS - 1) / STORE_TOKENS;
  return 1;
}

int64_t orcd_cache_block_bytes(int32_t block_size, int32_t num_kv_heads, int32_t head_dim, int32_t cache_dtype) {
  const orcd_op op = {.num_kv_heads = num_kv_heads, .head_dim = head_dim, .cache_dtype = cache_dtype};
  if (block_size <= 0 || block_size % TILE || num_kv_heads <= 0 || head_dim <= 0) return -1;
  return attention_tile_bytes(&op) * num_kv_heads * (block_size / TILE);
}
