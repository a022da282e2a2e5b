/*
 * Packing GGUF rows into the layout of linear.h, and reading it back one row at a time.
 *
 * Packing only moves bits. Words of four bytes (four consecutive k of a row) are the unit, so nibbles and bits
 * are moved four at a time with masks. What is read back is bit for bit what quant/ gives: products and
 * differences are rounded one by one, never fused (build with -ffp-contract=off).
 */
#include "linear.h"

#include <errno.h>


static const orcd_format formats[NUM_TYPE_IDS] = {
    [F32] = {1, 4, 0, 64, 0},          [F16] = {1, 2, 0, 32, 0},         [BF16] = {1, 2, 0, 32, 0},
    [Q4_0] = {32, 18, 32, 256, 8},     [Q4_1] = {32, 20, 64, 256, 0},    [Q5_0] = {32, 22, 32, 320, 16},
    [Q5_1] = {32, 24, 64, 320, 0},     [Q8_0] = {32, 34, 32, 512, 128},  [IQ4_NL] = {32, 18, 32, 256, 128},
    [MXFP4] = {32, 17, 16, 256, 12},   [Q2_K] = {256, 84, 320, 128, 0},  [Q3_K] = {256, 110, 224, 192, 4},
    [Q4_K] = {256, 144, 256, 256, 0},  [Q5_K] = {256, 176, 256, 320, 0}, [Q6_K] = {256, 210, 288, 384, 32},
};

static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* doubled */

const orcd_format *orcd_find_format(int32_t id) {
  return id >= 0 && id < NUM_TYPE_IDS && formats[id].block != 0 ? &formats[id] : NULL;
}

int64_t orcd_packed_bytes(int32_t format, int64_t n, int64_t k) {
  const orcd_format *f = orcd_find_format(format);
  if (f == NULL || n < 1 || k < 1 || k % f->block != 0 || n > INT64_MAX / 64 - 16 || k > INT32_MAX) return -1;
  int64_t bytes;
  return __builtin_mul_overflow((n + 15) / 16, panel_bytes(f, k), &bytes) ? -1 : bytes;
}

/* ---- packing --------------------------------------------------------------------------------------------- */

#define LOW4 0x0f0f0f0fu
#define HIGH4 0xf0f0f0f0u

static inline uint32_t load32(const uint8_t *p, int word) {
  uint32_t v;
  memcpy(&v, p + 4 * word, 4);
  return v;
}

/* Word `row` of chunk `chunk` of a body. */
static inline void store32(uint8_t *body, int chunk, int row, uint32_t v) { memcpy(body + 64 * chunk + 4 * row, &v, 4); }

static inline void store16(uint8_t *array, int row, const uint8_t *source) { memcpy(array + 2 * row, source, 2); }

/* Nibbles as in Q4_0: byte i of `qs` holds weights i and 16 + i. Already in order. */
static void pack_nibbles(uint8_t *body, int row, const uint8_t *qs) {
  for (int j = 0; j < 4; j++) store32(body, j, row, load32(qs, j));
}

/* Nibbles as in K-quants: 32 bytes of which one nibble each belongs to this sub-block. */
static void pack_split_nibbles(uint8_t *body, int row, const uint8_t *qs, int high) {
  for (int j = 0; j < 4; j++) {
    const uint32_t a = load32(qs, j), b = load32(qs, 4 + j);
    store32(body, j, row, high ? (a >> 4 & LOW4) | (b & HIGH4) : (a & LOW4) | (b & LOW4) << 4);
  }
}

/* One bit of each of 32 bytes. */
static void pack_bit(uint8_t *body, int chunk, int row, const uint8_t *bytes, int bit) {
  uint32_t v = 0;
  for (int g = 0; g < 8; g++) v |= (load32(bytes, g) >> bit & 0x01010101u) << g;
  store32(body, chunk, row, v);
}

/* The 32 bits of Q5_0 and Q5_1, bit k for weight k. */
static void pack_bits(uint8_t *body, int chunk, int row, uint32_t bits) {
  uint32_t v = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t b = bits >> i & 0x11111111u; /* every fourth bit, then pressed together */
    b = (b | b >> 3) & 0x03030303u;
    b = (b | b >> 6) & 0x000f000fu;
    b = (b | b >> 12) & 0xffu;
    v |= b << 8 * i;
  }
  store32(body, chunk, row, v);
}

/* Two bits of each of 32 bytes. */
static void pack_pairs(uint8_t *body, int chunk, int row, const uint8_t *bytes, int shift) {
  for (int half = 0; half < 2; half++) {
    uint32_t v = 0;
    for (int g = 0; g < 4; g++) v |= (load32(bytes, 4 * half + g) >> shift & 0x03030303u) << 2 * g;
    store32(body, chunk + half, row, v);
  }
}

static void pack_columns(uint8_t *array, int row, const uint8_t *source, int count) {
  for (int c = 0; c < count; c++) array[16 * c + row] = source[c];
}

#define FOR_ONE_FORMAT static inline __attribute__((always_inline)) /* with a constant format */

FOR_ONE_FORMAT void pack_small_block(const int32_t format, const orcd_format *f, uint8_t *block, int row, const uint8_t *s) {
  uint8_t *body = block + f->header;
  switch (format) {
    case MXFP4:
      block[row] = s[0];
      pack_nibbles(body, row, s + 1);
      return;
    case Q4_1:
    case Q5_1:
      store16(block + 32, row, s + 2);
      break;
    default: break;
  }
  store16(block, row, s);
  s += format == Q4_1 || format == Q5_1 ? 4 : 2;
  if (format == Q8_0) {
    for (int j = 0; j < 8; j++) store32(body, j, row, load32(s, j));
    return;
  }
  if (format == Q5_0 || format == Q5_1) {
    pack_bits(body, 4, row, load32(s, 0));
    s += 4;
  }
  pack_nibbles(body, row, s);
}

FOR_ONE_FORMAT void pack_k_block(const int32_t format, const orcd_format *f, uint8_t *block, int row, const uint8_t *s) {
  const int32_t d = format == Q2_K ? 80 : format == Q3_K ? 108 : format == Q6_K ? 208 : 0;
  store16(block, row, s + d);
  if (format != Q3_K && format != Q6_K) store16(block + 32, row, s + d + 2);
  switch (format) {
    case Q2_K: pack_columns(block + 64, row, s, 16); break;
    case Q3_K: pack_columns(block + 32, row, s + 96, 12); break;
    case Q6_K: pack_columns(block + 32, row, s + 192, 16); break;
    default: pack_columns(block + 64, row, s + 4, 12); break;
  }
  for (int j = 0; j < 8; j++) {
    uint8_t *body = block + f->header + j * f->body;
    switch (format) {
      case Q2_K: pack_pairs(body, 0, row, s + 16 + 32 * (j / 4), 2 * (j % 4)); break;
      case Q3_K:
        pack_pairs(body, 0, row, s + 32 + 32 * (j / 4), 2 * (j % 4));
        pack_bit(body, 2, row, s, j);
        break;
      case Q4_K: pack_split_nibbles(body, row, s + 16 + 32 * (j / 2), j % 2); break;
      case Q5_K:
        pack_split_nibbles(body, row, s + 48 + 32 * (j / 2), j % 2);
        pack_bit(body, 4, row, s + 16, j);
        break;
      default: /* Q6_K */
        pack_split_nibbles(body, row, s + 64 * (j / 4) + 32 * (j % 2), j % 4 / 2);
        pack_pairs(body, 4, row, s + 128 + 32 * (j / 4), 2 * (j % 4));
    }
  }
}

static void pack_float_row(const orcd_format *f, int64_t k, uint8_t *panel, int row, const uint8_t *s) {
  if (f->bytes == 4)
    for (int64_t i = 0; i < k; i++) memcpy(panel + 64 * i + 4 * row, s + 4 * i, 4);
  else
    for (int64_t i = 0; i < k; i++) memcpy(panel + 32 * i + 2 * row, s + 2 * i, 2);
}

/* `count` rows of a panel, block by block: a step in each row is one place in the panel. */
FOR_ONE_FORMAT void pack_panel(const int32_t format, int64_t blocks, uint8_t *panel, int count, const uint8_t *s) {
  const orcd_format *f = &formats[format];
  const int64_t row_bytes = blocks * f->bytes;
  for (int64_t b = 0; b < blocks; b++, s += f->bytes, panel += 16 * f->bytes)
    for (int r = 0; r < count; r++) {
      if (f->block == 256)
        pack_k_block(format, f, panel, r, s + r * row_bytes);
      else
        pack_small_block(format, f, panel, r, s + r * row_bytes);
    }
}

int orcd_pack(int32_t format, int64_t n, int64_t k, int64_t row0, int64_t rows, const uint8_t *src, void *dst) {
  if (orcd_packed_bytes(format, n, k) < 0) return -EINVAL;
  if (row0 < 0 || row0 % 16 != 0 || rows < 0 || rows > n || row0 > n - rows) return -EINVAL;
  const orcd_format *f = orcd_find_format(format);
  const int64_t blocks = k / f->block, row_bytes = blocks * f->bytes, panel_size = 16 * row_bytes;
  uint8_t *panel = (uint8_t *)dst + row0 / 16 * panel_size;
  for (int64_t first = 0; first < rows; first += 16, panel += panel_size) {
    const int count = rows - first < 16 ? (int)(rows - first) : 16;
    const uint8_t *s = src + first * row_bytes;
    switch (format) {
#define CASE(name)                                 \
  case name:                                       \
    pack_panel(name, blocks, panel, count, s); \
    break;
      SMALL_FORMATS(CASE)
      K_FORMATS(CASE)
#undef CASE
      default:
        for (int r = 0; r < count; r++) pack_float_row(f, k, panel, r, s + r * row_bytes);
    }
  }
  return 0;
}

/* ---- reading back ---------------------------------------------------------------------------------------- */

float orcd_half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00) { /* infinity; NaN becomes quiet, as the hardware does it */
    bits = 0x7f800000u | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000u : 0);
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    value = (float)magnitude * 0x1p-24f; /* exact */
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

float orcd_e8m0_half(uint8_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static float read_half(const uint8_t *array, int r) {
  uint16_t h;
  memcpy(&h, array + 2 * r, 2);
  return orcd_half_to_float(h);
}

float orcd_row_scale(int32_t format, const uint8_t *block, int r) {
  return format == MXFP4 ? orcd_e8m0_half(block[r]) : read_half(block, r);
}

float orcd_row_minimum(int32_t format, const uint8_t *block, int r) {
  switch (format) {
    case Q4_1:
    case Q5_1:
    case Q2_K:
    case Q4_K:
    case Q5_K: return read_half(block + 32, r);
    default: return 0;
  }
}

static int stored_level(int32_t format, const uint8_t *body, int r, int half, int j, int i) {
  const uint8_t *at = body + 4 * r + i;
  switch (format) {
    case Q8_0: return (int8_t)at[64 * (4 * half + j)];
    case Q2_K: return at[64 * half] >> 2 * j & 3;
    case Q3_K: return (at[64 * half] >> 2 * j & 3) | (at[128] >> (4 * half + j) & 1) << 2;
    default: break;
  }
  const int nibble = at[64 * j] >> 4 * half & 15;
  switch (format) {
    case Q5_0:
    case Q5_1:
    case Q5_K: return nibble | (at[256] >> (4 * half + j) & 1) << 4;
    case Q6_K: return nibble | (at[256 + 64 * half] >> 2 * j & 3) << 4;
    case IQ4_NL: return iq4_levels[nibble];
    case MXFP4: return mxfp4_levels[nibble];
    default: return nibble;
  }
}

void orcd_row_levels(int32_t format, const uint8_t *body, int r, int8_t levels[32]) {
  const int signed_already = format == Q8_0 || format == IQ4_NL || format == MXFP4;
  const int offset = signed_already ? 0 : formats[format].offset;
  for (int k = 0; k < 32; k++)
    levels[k] = (int8_t)(stored_level(format, body, r, k / 16, k % 16 / 4, k % 4) - offset);
}

/* The six-bit scales and minima of Q4_K and Q5_K; q: column r of sc[12][16]. */
static void six_bit_scales(const uint8_t *q, int scale[16], int minimum[16]) {
  for (int j = 0; j < 4; j++) {
    const int a = q[16 * j], b = q[16 * (j + 4)], c = q[16 * (j + 8)];
    scale[j] = a & 63;
    minimum[j] = b & 63;
    scale[j + 4] = (c & 15) | a >> 6 << 4;
    minimum[j + 4] = c >> 4 | b >> 6 << 4;
  }
}

void orcd_row_sub_scales(int32_t format, const uint8_t *block, int r, int scale[16], int minimum[16]) {
  for (int c = 0; c < 16; c++) {
    minimum[c] = 0;
    switch (format) {
      case Q2_K:
        scale[c] = block[64 + 16 * c + r] & 15;
        minimum[c] = block[64 + 16 * c + r] >> 4;
        break;
      case Q3_K:
        scale[c] = (block[32 + 16 * (c % 8) + r] >> c / 8 * 4 & 15) |
                   (block[32 + 16 * (8 + c % 4) + r] >> c / 4 * 2 & 3) << 4;
        scale[c] -= 32;
        break;
      default: scale[c] = (int8_t)block[32 + 16 * c + r]; /* Q6_K */
    }
  }
  if (format == Q4_K || format == Q5_K) six_bit_scales(block + 64 + r, scale, minimum);
}

/* 32 weights of row r: sub-block j of a block. */
static void row_weights(int32_t format, const orcd_format *f, const uint8_t *block, int j, int r, float out[32]) {
  const float d = orcd_row_scale(format, block, r), m = orcd_row_minimum(format, block, r);
  int8_t levels[32];
  orcd_row_levels(format, block + f->header + j * f->body, r, levels);
  if (f->block == 32) {
    const int has_minimum = format == Q4_1 || format == Q5_1;
    for (int k = 0; k < 32; k++) {
      const float product = d * (float)levels[k];
      out[k] = has_minimum ? product + m : product;
    }
    return;
  }
  int scale[16], minimum[16];
  orcd_row_sub_scales(format, block, r, scale, minimum);
  const int per_32 = format == Q4_K || format == Q5_K ? 1 : 2;
  const int has_minimum = format == Q2_K || per_32 == 1;
  for (int k = 0; k < 32; k++) {
    const int sub = per_32 * j + (per_32 == 2 ? k / 16 : 0);
    const float product = d * (float)scale[sub] * (float)levels[k];
    out[k] = has_minimum ? product - m * (float)minimum[sub] : product;
  }
}

static float float_weight(int32_t format, const uint8_t *at) {
  uint32_t bits = 0;
  float value;
  memcpy(&bits, at, format == F32 ? 4 : 2);
  if (format == F16) return orcd_half_to_float((uint16_t)bits);
  if (format == BF16) bits <<= 16;
  memcpy(&value, &bits, 4);
  return value;
}

static void row_range(int32_t format, const uint8_t *panel, int64_t k0, int count, int r, float out[32]) {
  const orcd_format *f = &formats[format];
  if (is_float_format(format)) {
    for (int i = 0; i < count; i++) out[i] = float_weight(format, panel + (k0 + i) * f->body + f->body / 16 * r);
  } else {
    row_weights(format, f, panel + k0 / f->block * 16 * f->bytes, (int)(k0 % f->block / 32), r, out);
  }
}

void orcd_panel_weights(int32_t format, const uint8_t *panel, int64_t k0, int count, float weights[][16]) {
  for (int r = 0; r < 16; r++) {
    float row[32];
    row_range(format, panel, k0, count, r, row);
    for (int i = 0; i < count; i++) weights[i][r] = row[i];
  }
}

int orcd_unpack_row(int32_t format, int64_t n, int64_t k, int64_t row, const void *packed, float *out) {
  if (orcd_packed_bytes(format, n, k) < 0 || row < 0 || row >= n) return -EINVAL;
  const uint8_t *panel = (const uint8_t *)packed + row / 16 * panel_bytes(&formats[format], k);
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    float piece[32];
    const int count = k - k0 < 32 ? (int)(k - k0) : 32;
    row_range(format, panel, k0, count, (int)(row % 16), piece);
    memcpy(out + k0, piece, sizeof(float) * (size_t)count);
  }
  return 0;
}
