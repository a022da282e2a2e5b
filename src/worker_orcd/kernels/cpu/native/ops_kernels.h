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

/* (x - mean) / sqrt(variance + eps) * gain + bias over the row; gain is op->vector, bias op->weight. Both sums are
 * formed as rms_norm's: of x, then of the squares of what is left when the mean is taken off. */
static TARGET void V(layer_norm)(const orcd_op *op, int64_t row0, int64_t row1) {
  const int64_t whole = op->n & ~(int64_t)15;
  const int rest = (int)(op->n - whole);
  const float *gain = op->vector, *bias = op->weight;
  for (int64_t row = row0; row < row1; row++) {
    const float *x = op->x + row * op->ldx;
    float *out = op->out + row * op->ldout;
    v16 sums = V(set1)(0.0f), squares = V(set1)(0.0f);
    for (int64_t i = 0; i < whole; i += 16) sums = V(add)(sums, V(load)(x + i));
    if (rest) sums = V(add)(sums, V(load_n)(x + whole, rest));
    const v16 mean = V(set1)(V(sum)(sums) / (float)op->n);
    for (int64_t i = 0; i < whole; i += 16) {
      const v16 centred = V(sub)(V(load)(x + i), mean);
      squares = V(fma)(centred, centred, squares);
    }
    if (rest) {
      const v16 last = V(keep)(V(sub)(V(load_n)(x + whole, rest), mean), 0, rest, 0.0f);
      squares = V(fma)(last, last, squares);
    }
    const v16 factor = V(set1)(1.0f / sqrtf(V(sum)(squares) / (float)op->n + op->f0));
    for (int64_t i = 0; i < whole; i += 16) {
      const v16 scaled = V(mul)(V(sub)(V(load)(x + i), mean), factor);
      V(store)(out + i, V(fma)(scaled, V(load)(gain + i), V(load)(bias + i)));
    }
    if (rest) {
      const v16 scaled = V(mul)(V(sub)(V(load_n)(x + whole, rest), mean), factor);
      V(store_n)(out + whole, V(fma)(scaled, V(load_n)(gain + whole, rest), V(load_n)(bias + whole, rest)), rest);
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

/* x / (1 + e^-y): silu where y is x. */
INLINE v16 V(times_sigmoid)(v16 x, v16 minus_y) { return V(div)(x, V(add)(V(set1)(1.0f), V(exp)(minus_y))); }

/* x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + e^-2u): the same, and without the
 * cancellation of 1 + tanh where x is negative. */
INLINE v16 V(gelu)(v16 x) {
  const v16 cubic = V(fma)(V(mul)(x, x), V(set1)(0.044715f), V(set1)(1.0f));
  return V(times_sigmoid)(x, V(mul)(V(mul)(x, cubic), V(set1)(-1.5957691216f)));
}

/* g * sigmoid(alpha * g) * (u + 1). Clamped in this order a NaN stays. */
INLINE v16 V(clamped_swiglu)(v16 gate, v16 up, float limit, float alpha) {
  const v16 g = V(min)(V(set1)(limit), gate);
  const v16 u = V(max)(V(set1)(-limit), V(min)(V(set1)(limit), up));
  return V(mul)(V(times_sigmoid)(g, V(mul)(g, V(set1)(-alpha))), V(add)(u, V(set1)(1.0f)));
}

/* One of the operations whose columns are independent, on sixteen of them. */
INLINE v16 V(columns16)(int32_t kind, v16 x, v16 y, const orcd_op *op) {
  switch (kind) {
    case ORCD_ADD: return V(add)(x, y);
    case ORCD_SCALE: return V(mul)(x, V(set1)(op->f0));
    case ORCD_GELU: return V(gelu)(x);
    case ORCD_GEGLU: return V(mul)(V(gelu)(x), y);
    case ORCD_CLAMPED_SWIGLU: return V(clamped_swiglu)(x, y, op->f0, op->f1);
    default: return V(mul)(V(times_sigmoid)(x, V(sub)(V(set1)(0.0f), x)), y); /* swiglu */
  }
}

INLINE void V(columns_of)(int32_t kind, const orcd_op *op, int64_t row, int64_t col0, int64_t col1) {
  const float *x = op->x + row * op->ldx, *y = kind == ORCD_SCALE || kind == ORCD_GELU ? x : op->y + row * op->ldy;
  float *out = op->out + row * op->ldout;
  int64_t i = col0;
  for (; i + 16 <= col1; i += 16) V(store)(out + i, V(columns16)(kind, V(load)(x + i), V(load)(y + i), op));
  if (i < col1) {
    const int rest = (int)(col1 - i);
    V(store_n)(out + i, V(columns16)(kind, V(load_n)(x + i, rest), V(load_n)(y + i, rest), op), rest);
  }
}

/* Slots in ascending order: weight * x of the first, then a fused multiply-add of each. */
INLINE void V(combine)(const orcd_op *op, int64_t row, int64_t col0, int64_t col1) {
  const float *x = op->x + row * op->ldx, *weights = op->y + row * op->ldy + op->top_k;
  float *out = op->out + row * op->ldout;
  for (int64_t i = col0; i < col1; i += 16) {
    const int count = col1 - i < 16 ? (int)(col1 - i) : 16;
    v16 sum = V(mul)(V(load_n)(x + i, count), V(set1)(weights[0]));
    for (int64_t slot = 1; slot < op->top_k; slot++)
      sum = V(fma)(V(load_n)(x + slot * op->n + i, count), V(set1)(weights[slot]), sum);
    V(store_n)(out + i, sum, count);
  }
}

static TARGET void V(columns)(const orcd_op *op, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
#define CASE(kind) \
  case kind: V(columns_of)(kind, op, row, col0, col1); break
  for (int64_t row = row0; row < row1; row++) switch (op->kind) {
      CASE(ORCD_ADD);
      CASE(ORCD_SCALE);
      CASE(ORCD_GELU);
      CASE(ORCD_GEGLU);
      CASE(ORCD_CLAMPED_SWIGLU);
      case ORCD_COMBINE: V(combine)(op, row, col0, col1); break;
      default: V(columns_of)(ORCD_SWIGLU, op, row, col0, col1);
    }
#undef CASE
}
