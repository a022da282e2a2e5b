/*
 * The row operations: rms_norm, layer_norm, rope and its angles, gelu, gated linear units, add, scale, take, combine.
 *
 * Sums have one order whatever the instruction set (ops_kernels.h); everything else is a fixed expression of its
 * own element, so how rows and columns are dealt to chunks cannot be seen in the result.
 */
#include <errno.h>
#include <math.h>
#include <string.h>

#define KERNELS "ops_kernels.h"
#include "each_isa.h"

enum { CHUNK_ELEMENTS = 8192, CHUNK_EXPONENTIALS = 2048 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Cosine and sine of x in double, within 1e-15 for |x| < 1.6e6: reduction by pi/2 in three parts (Cody and Waite),
 * then fdlibm's polynomials. Our own, so that the bits do not depend on the C library. */
static void cosine_sine(double x, double *cosine, double *sine) {
  const double n = floor(x * 6.36619772367581382433e-01 + 0.5);
  double r = x - n * 1.57079632673412561417e+00;
  r -= n * 6.07710050630396597660e-11;
  r -= n * 2.02226624879595063154e-21;
  const double z = r * r;
  const double s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 +
      z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 +
      z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c = 1.0 - 0.5 * z + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 +
      z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 +
      z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  switch ((int64_t)n & 3) {
    case 0: *cosine = c, *sine = s; break;
    case 1: *cosine = -s, *sine = c; break;
    case 2: *cosine = -c, *sine = -s; break;
    default: *cosine = s, *sine = -c; break;
  }
}

static void rope_angles(const orcd_op *op, const orcd_batch *batch, int64_t row0, int64_t row1) {
  const double *inv_freq = op->weight;
  const int64_t half = op->width / 2;
  for (int64_t row = row0; row < row1; row++) {
    float *out = op->out + row * op->ldout;
    for (int64_t i = 0; i < half; i++) {
      double cosine, sine;
      cosine_sine((double)batch->positions[row] * inv_freq[i], &cosine, &sine);
      out[i] = (float)(cosine * (double)op->f0);
      out[half + i] = (float)(sine * (double)op->f0);
    }
  }
}

/* p0: rows a chunk; p1: columns a chunk; p2: chunks a row of chunks; p3: number of rows. */
static void run_rows(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const orcd_op *op = task->op;
  const int64_t row0 = chunk * task->p0, row1 = smaller(row0 + task->p0, task->p3);
  switch (op->kind) {
    case ORCD_RMS_NORM: ORCD_PICK(rms_norm)(op, row0, row1); break;
    case ORCD_LAYER_NORM: ORCD_PICK(layer_norm)(op, row0, row1); break;
    case ORCD_ROPE: ORCD_PICK(rope)(op, row0, row1); break;
    case ORCD_ROPE_ANGLES: rope_angles(op, task->batch, row0, row1); break;
    default: /* take */
      for (int64_t row = row0; row < row1; row++) {
        const float *x = op->x + task->batch->logit_tokens[row] * op->ldx;
        memcpy(op->out + row * op->ldout, x, (size_t)op->n * sizeof(float));
      }
  }
}

static void run_columns(const orcd_task *task, int64_t chunk, int thread) {
  (void)thread;
  const int64_t row0 = chunk / task->p2 * task->p0, row1 = smaller(row0 + task->p0, task->p3);
  const int64_t col0 = chunk % task->p2 * task->p1, col1 = smaller(col0 + task->p1, task->op->n);
  ORCD_PICK(columns)(task->op, row0, row1, col0, col1);
}

static int has_exponentials(int32_t kind) {
  return kind == ORCD_SWIGLU || kind == ORCD_CLAMPED_SWIGLU || kind == ORCD_GELU || kind == ORCD_GEGLU;
}

static int by_columns(int32_t kind) {
  return has_exponentials(kind) || kind == ORCD_ADD || kind == ORCD_SCALE || kind == ORCD_COMBINE;
}

static int valid(const orcd_op *op) {
  if (op->n <= 0 || !op->out) return 0;
  switch (op->kind) {
    case ORCD_RMS_NORM: return op->x && op->vector && op->width > 0 && op->n % op->width == 0;
    case ORCD_LAYER_NORM: return op->x && op->vector && op->weight;
    case ORCD_ROPE:
      return op->x && op->y && op->width > 0 && op->width % 2 == 0 && op->width <= op->head_dim &&
             (int64_t)op->num_heads * op->head_dim == op->n;
    case ORCD_ROPE_ANGLES: return op->weight && op->width == op->n && op->width % 2 == 0;
    case ORCD_COMBINE: return op->x && op->y && op->top_k > 0;
    case ORCD_SWIGLU:
    case ORCD_GEGLU:
    case ORCD_CLAMPED_SWIGLU:
    case ORCD_ADD: return op->x && op->y;
    case ORCD_GELU:
    case ORCD_SCALE:
    case ORCD_TAKE: return op->x != NULL;
    default: return 0;
  }
}

int orcd_plan_elementwise(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  if (!valid(op)) return -EINVAL;
  const int columns = by_columns(op->kind), expensive = has_exponentials(op->kind) || op->kind == ORCD_ROPE_ANGLES;
  const int64_t elements = expensive ? CHUNK_EXPONENTIALS : CHUNK_ELEMENTS;
  const int64_t rows = op->rows == ORCD_LOGITS ? batch->num_logits : batch->num_tokens;
  orcd_task task = {.op = op, .batch = batch, .p1 = op->n, .p2 = 1, .p3 = rows};
  task.p0 = elements / op->n > 0 ? elements / op->n : 1;
  task.run = columns ? run_columns : run_rows;
  if (columns && op->n >= 2 * elements) {
    task.p1 = elements;
    task.p2 = (op->n + elements - 1) / elements;
  }
  task.num_chunks = (rows + task.p0 - 1) / task.p0 * task.p2;
  *tasks = task;
  return 1;
}
