/*
 * The native CPU backend: one flat list of operations, run a step at a time by one thread pool.
 *
 * A program is built once per model by Python (kernels/cpu/program.py) and run once per step. Buffers never
 * move; how many tokens, rows and logits a step has comes with the step. All activations are float32, row-major,
 * one row a token, with a row stride in floats.
 *
 * Arithmetic contract: what is computed for a token depends on the weights and on that token's inputs only.
 * Sums run in one fixed order per output, whatever the number of tokens, threads, or the instruction set.
 */
#ifndef ORCD_H
#define ORCD_H

#include <stddef.h>
#include <stdint.h>

#define ORCD_ABI_VERSION 4

/* The inputs of a step; kernels/backend.py BatchInputs says what each holds. */
typedef struct {
  const int32_t *token_ids;    /* [num_tokens] */
  const int32_t *positions;    /* [num_tokens] */
  const int32_t *slots;        /* [num_groups][slots_stride], num_tokens of them */
  const int32_t *query_start;  /* [num_rows + 1] */
  const int32_t *context_lens; /* [num_rows] */
  const int32_t *block_tables; /* [num_groups][block_group_stride], in that [num_rows][block_table_stride] */
  const int32_t *logit_tokens; /* [num_logits] */
  int64_t slots_stride, block_group_stride, block_table_stride; /* in elements */
  int64_t num_tokens, num_rows, num_logits;
} orcd_batch;

enum { ORCD_TOKENS = 0, ORCD_LOGITS = 1 }; /* which count of the batch an operation's rows are */

enum orcd_kind {
  ORCD_LINEAR = 1,    /* out[t][0..n) = W x[t] (+ bias)         linear.c   */
  ORCD_EMBED = 2,     /* out[t] = dequantised row token_ids[t]  linear.c   */
  ORCD_RMS_NORM = 3,  /* per run of `width` columns             ops.c      */
  ORCD_ROPE = 4,      /* ops.c: y = the angles of ORCD_ROPE_ANGLES */
  ORCD_STORE_KV = 5,  /* attention.c */
  ORCD_ATTENTION = 6, /* attention.c */
  ORCD_SWIGLU = 7,    /* ops.c */
  ORCD_ADD = 8,       /* ops.c */
  ORCD_SCALE = 9,     /* ops.c */
  ORCD_TAKE = 10,     /* ops.c: out[i] = x[logit_tokens[i]] */
  ORCD_ROPE_ANGLES = 11, /* ops.c: out[t][0..width) = cos then sin of position * inv_freq, once a step */
  ORCD_EMBED_POSITIONS = 12, /* linear.c: as ORCD_EMBED, of row positions[t] */
  ORCD_LAYER_NORM = 13,      /* ops.c: over the whole row */
  ORCD_GELU = 14,            /* ops.c: of x; its tanh approximation */
  ORCD_GEGLU = 15,           /* ops.c: gelu(x) * y */
  ORCD_CLAMPED_SWIGLU = 16,  /* ops.c: g / (1 + e^(-f1 g)) * (u + 1), g = min(x, f0), u = y within +-f0 */
  ORCD_ROUTE = 17,           /* route.c: out = the routing that logits x make, see routing.h */
  ORCD_EXPERT_LINEAR = 18,   /* experts.c: out[t][slot] = W[expert] x (+ bias[expert]), y = the routing */
  ORCD_COMBINE = 19,         /* ops.c: out[t] = sum over slots of weight * x[t][slot], y = the routing */
};

/* One operation. Unused fields are zero. */
typedef struct {
  int32_t kind, rows;        /* orcd_kind; ORCD_TOKENS or ORCD_LOGITS */
  const float *x, *y;        /* inputs; q in attention; k, v in store_kv */
  float *out;
  int64_t ldx, ldy, ldout;   /* row strides, in floats */
  int64_t n, k;              /* linear: outputs, inputs (k is a multiple of the format's block). expert_linear: of one
                                expert. route: n = experts. Others: n = width of a row of `out` */
  const void *weight;        /* linear, embed: packed by orcd_pack; expert_linear: one such matrix an expert, end to end;
                                rope_angles: double inv_freq[width / 2]; layer_norm: float bias [n] */
  int32_t format;            /* ggml type id of the weight */
  int32_t activations;       /* linear, expert_linear: 8, 16 (two int8 planes) or 32 (float) */
  const float *vector;       /* rms_norm: gain [width]; layer_norm: gain [n]; linear: bias [n] or NULL; expert_linear: bias
                                [num_experts][n] or NULL; attention: sinks [num_heads] or NULL */
  int64_t width;             /* rms_norm: run length; rope, rope_angles: rotary_dim; attention: window, 0 = none;
                                expert_linear: floats from a slot's inputs to the next's, 0 if all slots share them */
  float f0, f1;              /* f0: rms_norm, layer_norm: eps; scale: factor; rope_angles: attention_factor; attention:
                                scale of q.k. clamped_swiglu: limit, alpha */
  int32_t num_heads, num_kv_heads, head_dim, block_size; /* rope (num_heads, head_dim), store_kv, attention */
  void *cache;               /* store_kv, attention: the layer's blocks */
  int32_t cache_dtype;       /* 0 float32, 1 float16 */
  int32_t group;             /* store_kv, attention: which slots and block tables the layer goes by */
  int32_t num_experts, top_k; /* expert_linear; top_k: also route, combine */
} orcd_op;

/* ---- pool.c -------------------------------------------------------------------------------------------- */

/* Each operation becomes one or two tasks; a task is `num_chunks` independent chunks that any thread may run.
 * A task starts when every chunk of the task before it is done. */
typedef struct orcd_task orcd_task;
typedef void (*orcd_chunk_fn)(const orcd_task *task, int64_t chunk, int thread);
struct orcd_task {
  const orcd_op *op;
  const orcd_batch *batch;
  orcd_chunk_fn run;
  int64_t num_chunks;
  int64_t p0, p1, p2, p3; /* the operation's own planning numbers */
  void *scratch;
};

/* Number of threads of the pool, the caller included. Threads are created on first use and never destroyed. */
int orcd_set_threads(int num_threads, int pin);
int orcd_num_threads(void);

/* Run a program. Returns 0, or a negative error number for an operation it cannot plan. One caller at a time. */
int orcd_run(const orcd_op *ops, int32_t num_ops, const orcd_batch *batch);

/* Scratch memory of the calling thread (64-byte aligned, grows, is kept). NULL when memory is out. */
void *orcd_thread_scratch(int thread, size_t bytes);
/* Scratch shared by the chunks of a task and the task after it. Two alternating buffers. NULL when out. */
void *orcd_shared_scratch(size_t bytes);

/* ---- planners: write the tasks of an operation, return how many (0 to 2), or -EINVAL or -ENOMEM ------------- */

int orcd_plan_linear(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks);
int orcd_plan_embed(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks); /* of both kinds */
int orcd_plan_elementwise(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks); /* ops.c: all of its kinds */
int orcd_plan_store_kv(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks);
int orcd_plan_attention(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks);
int orcd_plan_route(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks);
int orcd_plan_expert_linear(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks);

/* ---- attention.c --------------------------------------------------------------------------------------------- */

/* Bytes of one block of one layer's cache, or -1 for a shape it cannot have (block_size: a multiple of 16). */
int64_t orcd_cache_block_bytes(int32_t block_size, int32_t num_kv_heads, int32_t head_dim, int32_t cache_dtype);

/* ---- linear.c: packing ------------------------------------------------------------------------------------- */

/* Bytes of an (n, k) matrix once packed, or -1 for a format this library cannot execute. */
int64_t orcd_packed_bytes(int32_t format, int64_t n, int64_t k);
/* Re-arrange rows [row0, row0 + rows) of GGUF bytes into `dst`, which was zeroed. row0 is a multiple of 16. */
int orcd_pack(int32_t format, int64_t n, int64_t k, int64_t row0, int64_t rows, const uint8_t *src, void *dst);
/* Dequantise packed row `row` to out[k]: exactly what quant/ gives. */
int orcd_unpack_row(int32_t format, int64_t n, int64_t k, int64_t row, const void *packed, float *out);

/* ---- pages.c ----------------------------------------------------------------------------------------------- */

/* From now on, pages in [start, start + bytes) of a mapped file that cannot be read become zeros. The number of
 * this range, or a negative error. */
int orcd_watch_pages(const void *start, int64_t bytes);
/* Whether that has happened in the range. */
int orcd_pages_lost(int range);
/* Before the range is unmapped. */
void orcd_forget_pages(int range);

/* ---- facts ----------------------------------------------------------------------------------------------------- */

int orcd_abi_version(void);
/* "avx512vnni", "avx2", "neon", "scalar": what the kernels chosen at load use. */
const char *orcd_isa(void);
/* For tests and benchmarks: force an instruction set by name; 0 if done, -1 if this machine lacks it. */
int orcd_force_isa(const char *name);

#endif
