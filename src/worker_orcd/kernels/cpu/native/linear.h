/*
 * What the files of the linear operation share: weight formats, the packed layout, quantised activations, and
 * the table of kernels of an instruction set.
 *
 * Packed layout, "R16". A matrix is panels of 16 rows (n is padded with zero rows); a panel is a sequence of
 * blocks over k, as in GGUF; a block of 16 rows is `header` bytes of scales followed by `blocks` bodies of 32
 * weights a row. In a body, weights lie in chunks of 64 bytes: byte 4 r + i of a chunk belongs to row r and to
 * one of 4 consecutive k: what a 4-way integer dot instruction wants in a 32-bit lane. All bits of the GGUF
 * block are kept and none is added.
 *
 *   format           header                              body (32 k x 16 rows)
 *   Q4_0, IQ4_NL     f16 d[16]                           u8 qs[4][64]
 *   Q4_1             f16 d[16], m[16]                    u8 qs[4][64]
 *   Q5_0             f16 d[16]                           u8 qs[4][64], h1[64]
 *   Q5_1             f16 d[16], m[16]                    u8 qs[4][64], h1[64]
 *   Q8_0             f16 d[16]                           i8 qs[8][64]
 *   MXFP4            u8 e[16]                            u8 qs[4][64]
 *   Q2_K             f16 d[16], m[16], u8 sc[16][16]     u8 q2[2][64]
 *   Q3_K             f16 d[16], u8 sc[12][16]            u8 q2[2][64], h1[64]
 *   Q4_K             f16 d[16], m[16], u8 sc[12][16]     u8 qs[4][64]
 *   Q5_K             f16 d[16], m[16], u8 sc[12][16]     u8 qs[4][64], h1[64]
 *   Q6_K             f16 d[16], i8 sc[16][16]            u8 qs[4][64], q2[2][64]
 *   F32              -                                   f32 w[32][16]
 *   F16, BF16        -                                   u16 w[32][16]
 *
 * qs[j]: low nibbles are k = 4 j + i, high nibbles k = 16 + 4 j + i.   q2[0]: bits 2 j, 2 j + 1 are k = 4 j + i;
 * q2[1]: k = 16 + 4 j + i.   h1: bit j is k = 4 j + i, bit 4 + j is k = 16 + 4 j + i.   Q8_0: qs[j] is
 * k = 4 j + i.   sc keeps the bytes of GGUF, one row a column.   F32, F16, BF16: k need not be a multiple of 32.
 */
#ifndef ORCD_LINEAR_H
#define ORCD_LINEAR_H

#include "orcd.h"

#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

enum { /* ggml type ids */
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
  Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, BF16 = 30, MXFP4 = 39,
  NUM_TYPE_IDS = 40
};

typedef struct {
  int32_t block;   /* weights of a row in a block; 0: no such format */
  int32_t bytes;   /* of a GGUF block of one row */
  int32_t header;  /* bytes before the bodies of a packed block */
  int32_t body;    /* bytes of 16 rows x 32 weights (16 x 1 for the float formats) */
  int32_t offset;  /* stored levels are unsigned; a weight's level is stored - offset (Q8_0: what a kernel adds) */
} orcd_format;

/* NULL if the format is unknown. */
const orcd_format *orcd_find_format(int32_t id);

/* Every format, for tables. */
#define SMALL_FORMATS(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(IQ4_NL) X(MXFP4)
#define K_FORMATS(X) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)
#define FLOAT_FORMATS(X) X(F32) X(F16) X(BF16)

static inline int is_float_format(int32_t id) { return id == F32 || id == F16 || id == BF16; }
static inline int64_t panel_bytes(const orcd_format *f, int64_t k) { return k / f->block * 16 * f->bytes; }

/* ---- reading packed blocks, one row at a time (pack.c) ------------------------------------------------- */

float orcd_half_to_float(uint16_t h);
float orcd_e8m0_half(uint8_t e); /* 2^(e - 128) */
float orcd_row_scale(int32_t format, const uint8_t *block, int r);   /* d */
float orcd_row_minimum(int32_t format, const uint8_t *block, int r); /* m, dmin; 0 where there is none */
/* Signed levels of row r in a body. */
void orcd_row_levels(int32_t format, const uint8_t *body, int r, int8_t levels[32]);
/* Integer scales and minima of the sub-blocks of a K-quant block: 8 of 32 weights, or 16 of 16. */
void orcd_row_sub_scales(int32_t format, const uint8_t *block, int r, int scale[16], int minimum[16]);
/* Dequantised weights [count][16] of k0 .. k0 + count - 1 of a panel; count is 32 except at the end of float rows. */
void orcd_panel_weights(int32_t format, const uint8_t *panel, int64_t k0, int count, float weights[][16]);

/* ---- quantised activations (quantize.c) ---------------------------------------------------------------- */

/*
 * Activations are int8 in blocks of 32 with a float scale. With two planes the second holds what the first
 * left over; planes lie side by side as if they were tokens ("lanes"). A tile of `lanes` lanes (1, 2, 4 or 8)
 * is, for each block of 32:
 *   i8 q[lanes][32]; f32 scale[lanes]; f32 sum[lanes] (scale * sum of q); i32 correction[lanes][2].
 * correction: the integer with which a kernel's dot product starts, in the form its instruction set wants.
 */
#define LANE_BLOCK_BYTES 48
#define MAX_LANES 8

typedef struct {
  int32_t factor; /* correction = factor * sum of q: -offset of the format, or 1 where minima need plain sums */
  int32_t split;  /* 1: the two halves of a block apart; 0: their total in correction[0] */
  int32_t pairs;  /* 1: two int16 (sums of q over k % 4 < 2 and k % 4 >= 2); 0: one int32 */
} orcd_correction;

/* Quantise one token's row of 32 * blocks floats to `planes` lanes of a tile, from lane `lane` on. */
typedef void (*orcd_quantize_fn)(const float *x, int64_t blocks, uint8_t *tile, int lanes, int lane, int planes,
                                 const orcd_correction *correction);

/* ---- kernels of an instruction set ----------------------------------------------------------------------- */

/* out[lane][row] = dot products of a panel with a tile. */
typedef void (*orcd_dot_fn)(const uint8_t *panel, int64_t blocks32, const uint8_t *tile, float *out);
/* acc[token][row] = dot products of a panel with float activations, any number of tokens. */
typedef void (*orcd_float_dot_fn)(const uint8_t *panel, int64_t k, const float *x, int64_t ldx, int64_t tokens,
                                  float *acc);

typedef struct {
  const char *name;
  int32_t max_lanes; /* tile width: 1, 2, 4 .. max_lanes have kernels */
  int32_t pairs;     /* orcd_correction.pairs */
  orcd_quantize_fn quantize;
  orcd_dot_fn dot[NUM_TYPE_IDS][4]; /* by log2(lanes) */
  orcd_float_dot_fn float_dot[NUM_TYPE_IDS];
} orcd_kernels;

extern const orcd_kernels orcd_scalar_kernels;
#ifdef __x86_64__
extern const orcd_kernels orcd_avx2_kernels;
extern const orcd_kernels orcd_avx512_kernels;
#define DECLARE_FLOAT_DOT(format)                                                                               \
  void orcd_float_dot_avx2_##format(const uint8_t *, int64_t, const float *, int64_t, int64_t, float *); \
  void orcd_float_dot_avx512_##format(const uint8_t *, int64_t, const float *, int64_t, int64_t, float *);
SMALL_FORMATS(DECLARE_FLOAT_DOT) /* linear_float.c */
K_FORMATS(DECLARE_FLOAT_DOT)
FLOAT_FORMATS(DECLARE_FLOAT_DOT)
#endif
#ifdef __aarch64__
extern const orcd_kernels orcd_neon_kernels;
#endif
/* What isa.c chose. */
const orcd_kernels *orcd_kernels_in_use(void);

#endif
