/*
 * The linear and embed operations: how they become tasks and chunks.
 *
 * A chunk is a range of 16-row panels times a range of tokens. With quantised activations and more than a few
 * tokens a task of its own quantises first; a token or two are quantised by each thread for itself.
 */
#include "tiles.h"

#include <errno.h>

/* Planning numbers of a task: p0 rows (tokens), p1 panels a chunk, p2 tiles (tokens, if float) a chunk, p3 serial. */

static uint64_t serial; /* numbers the tasks, so that a thread knows whether it has quantised for this one */
static struct {
  _Alignas(64) uint64_t serial;
} quantized_for[MAX_THREADS];

/* ---- quantised activations ------------------------------------------------------------------------------- */

/* Quantise tokens [token0, token1) into their lanes; the last token's caller also clears the lanes that pad a tile. */
static void quantize_tokens(const orcd_task *task, uint8_t *scratch, int64_t token0, int64_t token1) {
  const orcd_op *op = task->op;
  const orcd_kernels *kernels = orcd_kernels_in_use();
  const orcd_correction correction = correction_for(op->format, kernels);
  const int planes = planes_of(op), max_lanes = kernels->max_lanes;
  const int64_t blocks = op->k / 32, all = task->p0 * planes;
  for (int64_t token = token0; token < token1; token++) {
    const int64_t first = token * planes / max_lanes * max_lanes;
    const int lanes = lanes_of_tile(first, all, max_lanes), lane = (int)(token * planes - first);
    uint8_t *tile = scratch + first * blocks * LANE_BLOCK_BYTES;
    kernels->quantize(op->x + token * op->ldx, blocks, tile, lanes, lane, planes, &correction);
    if (token == task->p0 - 1)
      for (int pad = lane + planes; pad < lanes; pad++) clear_lane(tile, blocks, lanes, pad);
  }
}

static void run_quantize(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const int64_t token0 = chunk * task->p1;
  quantize_tokens(task, task->scratch, token0, smaller(task->p0, token0 + task->p1));
}

/* Results [lane][16] of a tile to the rows of `out` that exist, with planes and bias added. */
static void store_panel(const orcd_op *op, int planes, int64_t panel, int64_t token, int64_t tokens, const float *results) {
  const int64_t rows = smaller(16, op->n - 16 * panel);
  float bias[16];
  if (op->vector != NULL) read_bias(bias, op->vector + 16 * panel, rows);
  for (int64_t t = 0; t < tokens; t++, results += 16 * planes)
    store_outputs(op->out + (token + t) * op->ldout + 16 * panel, op->vector ? bias : NULL, rows, planes, results);
}

static void run_tiles(const orcd_task *task, int64_t chunk, const uint8_t *activations) {
  const orcd_op *op = task->op;
  const orcd_kernels *kernels = orcd_kernels_in_use();
  const orcd_format *f = orcd_find_format(op->format);
  const int planes = planes_of(op), max_lanes = kernels->max_lanes;
  const int64_t blocks = op->k / 32, size = panel_bytes(f, op->k), panels = divide_up(op->n, 16);
  const int64_t all = task->p0 * planes, tiles = divide_up(all, max_lanes), groups = divide_up(panels, task->p1);
  const int64_t panel0 = chunk % groups * task->p1, panel1 = smaller(panels, panel0 + task->p1);
  const int64_t tile0 = chunk / groups * task->p2, tile1 = smaller(tiles, tile0 + task->p2);
  for (int64_t panel = panel0; panel < panel1; panel++)
    for (int64_t tile = tile0; tile < tile1; tile++) {
      const int64_t first = tile * max_lanes;
      const int lanes = lanes_of_tile(first, all, max_lanes);
      _Alignas(64) float results[MAX_LANES * 16];
      kernels->dot[op->format][log2_of(lanes)]((const uint8_t *)op->weight + panel * size, blocks,
                                               activations + first * blocks * LANE_BLOCK_BYTES, results);
      store_panel(op, planes, panel, first / planes, smaller(lanes, all - first) / planes, results);
    }
}

static void run_linear(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  run_tiles(task, chunk, task->scratch);
}

static size_t activation_bytes(const orcd_op *op, int64_t tokens, int max_lanes) {
  const int64_t lanes = divide_up(tokens * planes_of(op), max_lanes) * max_lanes;
  return (size_t)(lanes * (op->k / 32) * LANE_BLOCK_BYTES);
}

static void run_self_quantized(const orcd_task *task, int64_t chunk, int thread) {
  uint8_t *activations = orcd_thread_scratch(thread, activation_bytes(task->op, task->p0, MAX_LANES));
  if (activations == NULL) return; /* cannot happen: orcd_plan_linear reserved it */
  if (quantized_for[thread].serial != (uint64_t)task->p3) {
    quantize_tokens(task, activations, 0, task->p0);
    quantized_for[thread].serial = (uint64_t)task->p3;
  }
  run_tiles(task, chunk, activations);
}

/* Panels a chunk: about CHUNK_BYTES, but enough chunks for all threads. */
static int64_t panels_per_chunk(int64_t panels, int64_t size, int64_t token_blocks) {
  const int64_t threads = orcd_num_threads();
  if (threads == 1 && token_blocks == 1) return panels;
  const int64_t fair = divide_up(panels * token_blocks, threads * CHUNKS_PER_THREAD);
  return at_least_one(smaller(smaller(CHUNK_BYTES / size, fair), panels));
}

static int plan_quantized(const orcd_op *op, int64_t tokens, orcd_task *task) {
  const int max_lanes = orcd_kernels_in_use()->max_lanes;
  const int64_t panels = divide_up(op->n, 16), size = panel_bytes(orcd_find_format(op->format), op->k);
  const int64_t lanes = tokens * planes_of(op), tiles = divide_up(lanes, max_lanes);
  task->p0 = tokens;
  task->p3 = (int64_t)++serial;
  if (lanes <= SELF_QUANTIZED_LANES) {
    const size_t bytes = activation_bytes(op, tokens, MAX_LANES);
    for (int i = 0; i < orcd_num_threads(); i++)
      if (orcd_thread_scratch(i, bytes) == NULL) return -ENOMEM;
    task->p1 = panels_per_chunk(panels, size, 1);
    task->p2 = tiles;
    task->run = run_self_quantized;
    task->num_chunks = divide_up(panels, task->p1);
    return 1;
  }
  task->scratch = orcd_shared_scratch(activation_bytes(op, tokens, max_lanes));
  if (task->scratch == NULL) return -ENOMEM;
  const int64_t tile_bytes = op->k / 32 * LANE_BLOCK_BYTES * max_lanes;
  task->p2 = smaller(tiles, at_least_one(TOKEN_BLOCK_BYTES / tile_bytes));
  const int64_t token_blocks = divide_up(tiles, task->p2);
  task->p1 = panels_per_chunk(panels, size, token_blocks);
  task[1] = task[0];
  task[0].run = run_quantize;
  task[0].p1 = at_least_one(QUANTIZE_CHUNK_FLOATS / op->k);
  task[0].num_chunks = divide_up(tokens, task[0].p1);
  task[1].run = run_linear;
  task[1].num_chunks = divide_up(panels, task[1].p1) * token_blocks;
  return 2;
}

/* ---- float activations --------------------------------------------------------------------------------------- */

static void run_float(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const orcd_op *op = task->op;
  const orcd_float_dot_fn dot = orcd_kernels_in_use()->float_dot[op->format];
  const int64_t size = panel_bytes(orcd_find_format(op->format), op->k), panels = divide_up(op->n, 16);
  const int64_t groups = divide_up(panels, task->p1), panel0 = chunk % groups * task->p1;
  const int64_t panel1 = smaller(panels, panel0 + task->p1);
  const int64_t token = chunk / groups * task->p2, tokens = smaller(task->p2, task->p0 - token);
  for (int64_t panel = panel0; panel < panel1; panel++) {
    _Alignas(64) float results[FLOAT_TOKEN_BLOCK * 16];
    dot((const uint8_t *)op->weight + panel * size, op->k, op->x + token * op->ldx, op->ldx, tokens, results);
    store_panel(op, 1, panel, token, tokens, results);
  }
}

static int plan_float(const orcd_op *op, int64_t tokens, orcd_task *task) {
  const int64_t panels = divide_up(op->n, 16), size = panel_bytes(orcd_find_format(op->format), op->k);
  task->p0 = tokens;
  task->p2 = smaller(tokens, FLOAT_TOKEN_BLOCK);
  const int64_t token_blocks = divide_up(tokens, task->p2);
  task->p1 = panels_per_chunk(panels, size, token_blocks);
  task->run = run_float;
  task->num_chunks = divide_up(panels, task->p1) * token_blocks;
  return 1;
}

int orcd_plan_linear(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  const int64_t tokens = batch_rows(op, batch);
  if (orcd_packed_bytes(op->format, op->n, op->k) < 0 || op->weight == NULL) return -EINVAL;
  if (op->activations != 8 && op->activations != 16 && op->activations != 32) return -EINVAL;
  if (tokens <= 0) return tokens == 0 ? 0 : -EINVAL;
  tasks[0] = (orcd_task){.op = op, .batch = batch};
  if (op->activations == 32 || is_float_format(op->format)) return plan_float(op, tokens, tasks);
  return plan_quantized(op, tokens, tasks);
}

/* ---- embed ------------------------------------------------------------------------------------------------------ */

#define EMBED_TOKENS_PER_CHUNK 4

static void run_embed(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const orcd_op *op = task->op;
  const int32_t *indices = op->kind == ORCD_EMBED ? task->batch->token_ids : task->batch->positions;
  const int64_t first = chunk * EMBED_TOKENS_PER_CHUNK, end = smaller(task->p0, first + EMBED_TOKENS_PER_CHUNK);
  for (int64_t t = first; t < end; t++) /* an index was checked by the caller; a wrong one leaves its row as it is */
    (void)orcd_unpack_row(op->format, op->n, op->k, indices[t], op->weight, op->out + t * op->ldout);
}

int orcd_plan_embed(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  if (orcd_packed_bytes(op->format, op->n, op->k) < 0 || op->weight == NULL) return -EINVAL;
  if (batch->num_tokens < 0) return -EINVAL;
  tasks[0] = (orcd_task){.op = op, .batch = batch, .run = run_embed, .p0 = batch->num_tokens};
  tasks[0].num_chunks = divide_up(batch->num_tokens, EMBED_TOKENS_PER_CHUNK);
  return 1;
}
