/*
 * The expert_linear operation: each slot of a routing (routing.h) times its own expert's matrix.
 *
 * A chunk is a range of panels of one expert with all of the rows that go to it: its group. Which expert and which
 * rows a chunk has, the routing says when it runs; the plan knows only how many groups there may be, so few chunks
 * find nothing to do. Each row of x is quantised once, alone; a chunk gathers its group's rows into tiles of several
 * lanes, and keeps them for the next chunk of the same group.
 */
#include "routing.h"
#include "tiles.h"

#include <errno.h>

#define MANY_PAIRS 4        /* a group, on average: arithmetic, no longer reading, takes the time */
#define MANY_PAIRS_PANELS 32 /* of a chunk then: gathering costs about one */
#define FLOAT_BLOCK_BYTES (1 << 20)

/* Planning numbers of a task: p0 rows of x, p1 panels a chunk (or rows, of x), p2 pairs gathered at a time, p3 serial. */

static uint64_t serial;
static struct {
  _Alignas(64) uint64_t serial; /* of the task for which this thread has quantised */
  int64_t group;                /* whose rows it has gathered, or -1 */
} prepared[MAX_THREADS];

/* A group: the rows of one expert. */
typedef struct {
  routing routing;
  int64_t expert, first, count; /* pairs [first, first + count) of the routing's list */
} group;

static group find_group(const orcd_task *task, int64_t index) {
  const orcd_op *op = task->op;
  const routing r = routing_at(op->y, op->ldy, op->top_k);
  const int64_t pairs = batch_rows(op, task->batch) * op->top_k;
  const int64_t first = *routing_int(r, ROUTING_START, index);
  if (first >= pairs) return (group){.routing = r};
  const int64_t end = index + 1 < pairs ? *routing_int(r, ROUTING_START, index + 1) : pairs;
  return (group){.routing = r, .expert = *routing_int(r, ROUTING_GROUP, index), .first = first, .count = end - first};
}

static int64_t pair_of(const group *g, int64_t i) { return *routing_int(g->routing, ROUTING_PAIR, g->first + i); }

/* The row of x of a pair; rows count slots if each has inputs of its own. */
static int64_t row_of(const orcd_op *op, int64_t pair) { return op->width ? pair : pair / op->top_k; }

static const float *row_at(const orcd_op *op, int64_t row) {
  return op->width ? op->x + row / op->top_k * op->ldx + row % op->top_k * op->width : op->x + row * op->ldx;
}

static float *output_of(const orcd_op *op, int64_t pair, int64_t panel) {
  return op->out + pair / op->top_k * op->ldout + pair % op->top_k * op->n + 16 * panel;
}

static int64_t bytes_of_panel(const orcd_op *op) { return panel_bytes(orcd_find_format(op->format), op->k); }

static const uint8_t *panel_at(const orcd_op *op, int64_t expert, int64_t panel) {
  return (const uint8_t *)op->weight + (expert * divide_up(op->n, 16) + panel) * bytes_of_panel(op);
}

/* Results [pair][plane][16] of `count` pairs from `first` on. */
static void store_pairs(const orcd_op *op, const group *g, int64_t panel, int64_t first, int64_t count, int planes,
                        const float *results) {
  const int64_t rows = smaller(16, op->n - 16 * panel);
  float bias[16];
  if (op->vector != NULL) read_bias(bias, op->vector + g->expert * op->n + 16 * panel, rows);
  for (int64_t i = 0; i < count; i++, results += 16 * planes)
    store_outputs(output_of(op, pair_of(g, first + i), panel), op->vector ? bias : NULL, rows, planes, results);
}

/* ---- quantised activations ------------------------------------------------------------------------------- */

/* A row of x quantised alone: a tile of as many lanes as there are planes. */
static int64_t row_bytes(const orcd_op *op) { return op->k / 32 * LANE_BLOCK_BYTES * planes_of(op); }

static void quantize_rows(const orcd_task *task, uint8_t *rows, int64_t first, int64_t last) {
  const orcd_op *op = task->op;
  const orcd_kernels *kernels = orcd_kernels_in_use();
  const orcd_correction correction = correction_for(op->format, kernels);
  const int planes = planes_of(op);
  for (int64_t row = first; row < last; row++)
    kernels->quantize(row_at(op, row), op->k / 32, rows + row * row_bytes(op), planes, 0, planes, &correction);
}

static void run_quantize_rows(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  quantize_rows(task, task->scratch, chunk * task->p1, smaller(task->p0, (chunk + 1) * task->p1));
}

/* Copy a quantised row to lanes [lane, lane + planes) of a tile. */
static void gather_row(uint8_t *tile, int lanes, int lane, const uint8_t *row, int planes, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++, tile += LANE_BLOCK_BYTES * lanes, row += LANE_BLOCK_BYTES * planes)
    for (int plane = 0; plane < planes; plane++) {
      memcpy(tile + 32 * (lane + plane), row + 32 * plane, 32);
      memcpy(tile + 32 * lanes + 4 * (lane + plane), row + 32 * planes + 4 * plane, 4);
      memcpy(tile + 36 * lanes + 4 * (lane + plane), row + 36 * planes + 4 * plane, 4);
      memcpy(tile + 40 * lanes + 8 * (lane + plane), row + 40 * planes + 8 * plane, 8);
    }
}

/* `count` pairs of a group from `first` on as tiles, the last of which may be narrower. */
static void gather_tiles(const orcd_op *op, const group *g, int64_t first, int64_t count, const uint8_t *rows, uint8_t *tiles) {
  const int planes = planes_of(op), max_lanes = orcd_kernels_in_use()->max_lanes;
  const int64_t blocks = op->k / 32;
  for (int64_t begin = 0; begin < count * planes; begin += max_lanes) {
    uint8_t *tile = tiles + begin * blocks * LANE_BLOCK_BYTES;
    const int lanes = lanes_of_tile(begin, count * planes, max_lanes);
    const int used = (int)smaller(lanes, count * planes - begin);
    for (int lane = 0; lane < used; lane += planes) {
      const int64_t row = row_of(op, pair_of(g, first + (begin + lane) / planes));
      gather_row(tile, lanes, lane, rows + row * row_bytes(op), planes, blocks);
    }
    for (int pad = used; pad < lanes; pad++) clear_lane(tile, blocks, lanes, pad);
  }
}

/* Panels of this chunk with `count` gathered pairs. */
static void multiply_tiles(const orcd_task *task, const group *g, int64_t panel0, int64_t first, int64_t count,
                           const uint8_t *tiles) {
  const orcd_op *op = task->op;
  const orcd_kernels *kernels = orcd_kernels_in_use();
  const int planes = planes_of(op), max_lanes = kernels->max_lanes;
  const int64_t blocks = op->k / 32, all = count * planes, panel1 = smaller(divide_up(op->n, 16), panel0 + task->p1);
  for (int64_t panel = panel0; panel < panel1; panel++)
    for (int64_t begin = 0; begin < all; begin += max_lanes) {
      const int lanes = lanes_of_tile(begin, all, max_lanes);
      _Alignas(64) float results[MAX_LANES * 16];
      kernels->dot[op->format][log2_of(lanes)](panel_at(op, g->expert, panel), blocks,
                                               tiles + begin * blocks * LANE_BLOCK_BYTES, results);
      store_pairs(op, g, panel, first + begin / planes, smaller(lanes, all - begin) / planes, planes, results);
    }
}

/* Chunks a group. */
static int64_t num_ranges(const orcd_task *task) { return divide_up(divide_up(task->op->n, 16), task->p1); }

/* A thread's scratch: the rows, if it quantises for itself, then gathered tiles. */
static void run_quantized(const orcd_task *task, int64_t chunk, int thread) {
  const orcd_op *op = task->op;
  const int64_t index = chunk / num_ranges(task), panel0 = chunk % num_ranges(task) * task->p1;
  const group g = find_group(task, index);
  if (g.count == 0) return;
  uint8_t *tiles = orcd_thread_scratch(thread, 0); /* the planner grew it */
  const uint8_t *rows = task->scratch;
  if (rows == NULL) {
    rows = tiles;
    tiles += task->p0 * row_bytes(op);
  }
  if (prepared[thread].serial != (uint64_t)task->p3) {
    if (task->scratch == NULL) quantize_rows(task, (uint8_t *)rows, 0, task->p0);
    prepared[thread].serial = (uint64_t)task->p3;
    prepared[thread].group = -1;
  }
  if (g.count == 1) { /* a row is a tile already */
    multiply_tiles(task, &g, panel0, 0, 1, rows + row_of(op, pair_of(&g, 0)) * row_bytes(op));
    return;
  }
  const int is_gathered = prepared[thread].group == index;
  for (int64_t first = 0; first < g.count; first += task->p2) {
    const int64_t count = smaller(task->p2, g.count - first);
    if (!is_gathered) gather_tiles(op, &g, first, count, rows, tiles);
    multiply_tiles(task, &g, panel0, first, count, tiles);
  }
  prepared[thread].group = g.count <= task->p2 ? index : -1;
}

/* ---- float activations --------------------------------------------------------------------------------------- */

static void multiply_rows(const orcd_task *task, const group *g, int64_t panel0, int64_t first, int64_t count, const float *x) {
  const orcd_op *op = task->op;
  const orcd_float_dot_fn dot = orcd_kernels_in_use()->float_dot[op->format];
  const int64_t panel1 = smaller(divide_up(op->n, 16), panel0 + task->p1);
  for (int64_t panel = panel0; panel < panel1; panel++) {
    _Alignas(64) float results[FLOAT_TOKEN_BLOCK * 16];
    dot(panel_at(op, g->expert, panel), op->k, x, op->k, count, results);
    store_pairs(op, g, panel, first, count, 1, results);
  }
}

static void run_float(const orcd_task *task, int64_t chunk, int thread) {
  const orcd_op *op = task->op;
  const int64_t index = chunk / num_ranges(task), panel0 = chunk % num_ranges(task) * task->p1;
  const group g = find_group(task, index);
  if (g.count == 0) return;
  if (g.count == 1) {
    multiply_rows(task, &g, panel0, 0, 1, row_at(op, row_of(op, pair_of(&g, 0))));
    return;
  }
  float *gathered = orcd_thread_scratch(thread, 0); /* the planner grew it */
  const int is_gathered = prepared[thread].serial == (uint64_t)task->p3 && prepared[thread].group == index;
  for (int64_t first = 0; first < g.count; first += task->p2) {
    const int64_t count = smaller(task->p2, g.count - first);
    for (int64_t i = 0; i < count && !is_gathered; i++)
      memcpy(gathered + i * op->k, row_at(op, row_of(op, pair_of(&g, first + i))), sizeof(float) * (size_t)op->k);
    multiply_rows(task, &g, panel0, first, count, gathered);
  }
  prepared[thread].serial = (uint64_t)task->p3;
  prepared[thread].group = g.count <= task->p2 ? index : -1;
}

/* ---- planning -------------------------------------------------------------------------------------------------- */

static int reserve(int64_t bytes) {
  for (int i = 0; i < orcd_num_threads(); i++)
    if (orcd_thread_scratch(i, (size_t)bytes) == NULL) return -ENOMEM;
  return 0;
}

/* About CHUNK_BYTES of weights, or so much that gathering is nothing beside it, but enough chunks for all threads. */
static int64_t panels_per_chunk(const orcd_op *op, int64_t rows, int64_t groups) {
  const int64_t panels = divide_up(op->n, 16), threads = orcd_num_threads();
  if (threads == 1) return panels;
  const int64_t fair = divide_up(panels * groups, threads * CHUNKS_PER_THREAD);
  const int many = rows * op->top_k >= MANY_PAIRS * groups;
  return at_least_one(smaller(smaller(many ? MANY_PAIRS_PANELS : CHUNK_BYTES / bytes_of_panel(op), fair), panels));
}

static int plan_quantized(const orcd_op *op, int64_t rows, orcd_task *tasks) {
  const int planes = planes_of(op), max_lanes = orcd_kernels_in_use()->max_lanes;
  const int64_t tile_bytes = op->k / 32 * LANE_BLOCK_BYTES * max_lanes, pairs_of_tile = max_lanes / planes;
  const int64_t tiles = smaller(divide_up(rows, pairs_of_tile), at_least_one(TOKEN_BLOCK_BYTES / tile_bytes));
  orcd_task *task = &tasks[0];
  const int each_for_itself = task->p0 * planes <= SELF_QUANTIZED_LANES;
  task->run = run_quantized;
  task->p2 = tiles * pairs_of_tile;
  if (reserve((each_for_itself ? task->p0 * row_bytes(op) : 0) + tiles * tile_bytes) < 0) return -ENOMEM;
  if (each_for_itself) return 1;
  task->scratch = orcd_shared_scratch((size_t)(task->p0 * row_bytes(op)));
  if (task->scratch == NULL) return -ENOMEM;
  tasks[1] = tasks[0];
  task->run = run_quantize_rows;
  task->p1 = at_least_one(QUANTIZE_CHUNK_FLOATS / op->k);
  task->num_chunks = divide_up(task->p0, task->p1);
  return 2;
}

static int plan_float(const orcd_op *op, int64_t rows, orcd_task *task) {
  task->run = run_float;
  task->p2 = smaller(smaller(rows, FLOAT_TOKEN_BLOCK), at_least_one(FLOAT_BLOCK_BYTES / 4 / op->k));
  return reserve(task->p2 * op->k * (int64_t)sizeof(float)) < 0 ? -ENOMEM : 1;
}

int orcd_plan_expert_linear(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  const int64_t rows = batch_rows(op, batch);
  if (orcd_packed_bytes(op->format, op->n, op->k) < 0 || !op->weight || !op->x || !op->y || !op->out) return -EINVAL;
  if (op->activations != 8 && op->activations != 16 && op->activations != 32) return -EINVAL;
  if (op->top_k < 1 || op->num_experts < op->top_k || (op->width != 0 && op->width != op->k)) return -EINVAL;
  if (rows <= 0) return rows == 0 ? 0 : -EINVAL;
  const int64_t groups = routing_groups(op, rows);
  tasks[0] = (orcd_task){.op = op, .batch = batch, .p0 = op->width ? rows * op->top_k : rows, .p3 = (int64_t)++serial};
  tasks[0].p1 = panels_per_chunk(op, rows, groups);
  tasks[0].num_chunks = groups * num_ranges(tasks);
  if (op->activations == 32 || is_float_format(op->format)) return plan_float(op, rows, tasks);
  return plan_quantized(op, rows, tasks);
}
