/* Row operations on sixteen lanes: rows [row0, row1) and, where columns are independent, [col0, col1). */

/* out = x * (1 / sqrt(mean(x^2) + eps)) * gain, for each run of op->width columns.
 * Lane i sums the squares of columns i, i + 16, … ; the lanes are added by V(sum). */
static TARGET void V(rms_norm)(const orcd_op *op, int64_t row0, int64_t row1) {
  const int64_t width = op->width;
  const int64_t whole = width & ~(int64_t)15;
  const int rest = (int)(width - whole);
  for (int64_t row = row0; row < row1; row++) {
    for (int64_t run = 0; run < op->n; run += width) {
      const float *x = op->x + row * op->ldx + run;
      float *out = op->out + row * op->ldout + run;
      v16 squares = V(set1)(0.0f);
      for (int64_t i = 0; i < whole; i += 16) squares = V(fma)(V(load)(x + i), V(load)(x + i), squares);
      if (rest) {
        v16 last = V(load_n)(x + whole, rest);
        squares = V(fma)(last, last, squares);
      }
      const v16 factor = V(set1)(1.0f / sqrtf(V(sum)(squares) / (float)width + op->f0));
      for (int64_t i = 0; i < whole; i += 16) {
        V(store)(out + i, V(mul)(V(mul)(V(load)(x + i), factor), V(load)(op->vector + i)));
      }
      if (rest) {
        v16 last = V(mul)(V(load_n)(x + whole, rest), factor);
        V(store_n)(out + whole, V(mul)(last, V(load_n)(op->vector + whole, rest)), rest);
      }
    }
  }
}

/* low' = low * cos - high * sin, high' = high * cos + low * sin; the second product is fused. */
INLINE void V(rotate)(v16 *low, v16 *high, v16 cosine, v16 sine) {
  v16 minus = V(sub)(V(set1)(0.0f), sine);
  v16 a = V(fma)(*high, minus, V(mul)(*low, cosine));
  *high = V(fma)(*low, sine, V(mul)(*high, cosine));
  *low = a;
}

static TARGET void V(rope)(const orcd_op *op, int64_t row0, int64_t row1) {
  const int half = (int)(op->width / 2), whole = half & ~15, rest = half - whole;
  for (int64_t row = row0; row < row1; row++) {
    const float *cosine = op->y + row * op->ldy, *sine = cosine + half;
    for (int head = 0; head < op->num_heads; head++) {
      const float *x = op->x + row * op->ldx + head * op->head_dim;
      float *out = op->out + row * op->ldout + head * op->head_dim;
      for (int i = 0; i < whole; i += 16) {
        v16 low = V(load)(x + i), high = V(load)(x + half + i);
        V(rotate)(&low, &high, V(load)(cosine + i), V(load)(sine + i));
        V(store)(out + i, low);
        V(store)(out + half + i, high);
      }
      if (rest) {
        v16 low = V(load_n)(x + whole, rest), high = V(load_n)(x + half + whole, rest);
        V(rotate)(&low, &high, V(load_n)(cosine + whole, rest), V(load_n)(sine + whole, rest));
        V(store_n)(out + whole, low, rest);
        V(store_n)(out + half + whole, high, rest);
      }
      for (int i = 2 * half; i < op->head_dim; i++) out[i] = x[i];
    }
  }
}

/* One of the operations whose columns are independent, on sixteen of them. */
INLINE v16 V(columns16)(int32_t kind, v16 x, v16 y, v16 factor) {
  if (kind == ORCD_ADD) return V(add)(x, y);
  if (kind == ORCD_SCALE) return V(mul)(x, factor);
  /* swiglu: x / (1 + e^-x) * y */
  v16 one = V(set1)(1.0f);
  v16 silu = V(div)(x, V(add)(one, V(exp)(V(sub)(V(set1)(0.0f), x))));
  return V(mul)(silu, y);
}

INLINE void V(columns_of)(int32_t kind, const orcd_op *op, int64_t row, int64_t col0, int64_t col1) {
  const float *x = op->x + row * op->ldx, *y = kind == ORCD_SCALE ? x : op->y + row * op->ldy;
  float *out = op->out + row * op->ldout;
  const v16 factor = V(set1)(op->f0);
  int64_t i = col0;
  for (; i + 16 <= col1; i += 16) {
    V(store)(out + i, V(columns16)(kind, V(load)(x + i), V(load)(y + i), factor));
  }
  if (i < col1) {
    const int rest = (int)(col1 - i);
    V(store_n)(out + i, V(columns16)(kind, V(load_n)(x + i, rest), V(load_n)(y + i, rest), factor), rest);
  }
}

static TARGET void V(columns)(const orcd_op *op, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
  for (int64_t row = row0; row < row1; row++) {
    if (op->kind == ORCD_ADD) {
      V(columns_of)(ORCD_ADD, op, row, col0, col1);
    } else if (op->kind == ORCD_SCALE) {
      V(columns_of)(ORCD_SCALE, op, row, col0, col1);
    } else {
      V(columns_of)(ORCD_SWIGLU, op, row, col0, col1);
    }
  }
}
