/* Attention on sixteen lanes; attention.h says in which order everything is summed. */

/* How many tiles' scores grow side by side for 1, 2, 3 or 4 queries, and how many times 16 columns of V: about what
 * the registers hold. */
#if defined(ISA_AVX512)
#define SCORES_1 8
#define SCORES_2 4
#define SCORES_3 4
#define SCORES_4 4
#define COLUMNS_1 4
#define COLUMNS_2 4
#define COLUMNS_3 4
#define COLUMNS_4 4
#else
#define SCORES_1 4
#define SCORES_2 2
#define SCORES_3 1
#define SCORES_4 1
#define COLUMNS_1 4
#define COLUMNS_2 2
#define COLUMNS_3 2
#define COLUMNS_4 1
#endif

INLINE v16 V(load_cache)(const void *p, int64_t index, int half) {
  return half ? V(load_half)((const uint16_t *)p + index) : V(load)((const float *)p + index);
}

/* Raw scores of R queries against N tiles. `ahead` is where the tiles to come lie, or NULL. */
INLINE void V(score)(int R, int N, int half, int head_dim, const attention_query *queries, const char *const *tiles,
                     const char *const *ahead, float *scores) {
  v16 sums[GROUP][8];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sums[r][n] = V(set1)(0.0f);
  }
  for (int d = 0; d < head_dim; d++) {
    v16 q[GROUP];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) q[r] = V(set1)(queries[r].q[d]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      if (ahead && (d % 2 == 0 || !half)) __builtin_prefetch(ahead[n] + (int64_t)d * TILE * (half ? 2 : 4), 0, 2);
      const v16 keys = V(load_cache)(tiles[n], (int64_t)d * TILE, half);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][n] = V(fma)(q[r], keys, sums[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) V(store)(scores + r * SPLIT + n * TILE, sums[r][n]);
  }
}

INLINE void V(score_range)(int R, int N, int half, int head_dim, const attention_query *queries,
                           const char *const *tiles, int first, int last, int fetch, float *scores) {
  const int distance = N < 4 ? 4 : N; /* of the tiles to fetch from memory */
  int tile = first;
  for (; tile + N <= last; tile += N) {
    if (fetch && tile + distance + N <= last) {
      V(score)(R, N, half, head_dim, queries, tiles + tile, tiles + tile + distance, scores + tile * TILE);
    } else {
      V(score)(R, N, half, head_dim, queries, tiles + tile, NULL, scores + tile * TILE);
    }
  }
  if (N > 2 && tile + 2 <= last) {
    V(score)(R, 2, half, head_dim, queries, tiles + tile, NULL, scores + tile * TILE);
    tile += 2;
  }
  for (; tile < last; tile++) V(score)(R, 1, half, head_dim, queries, tiles + tile, NULL, scores + tile * TILE);
}

static TARGET void V(score_group)(int R, int half, int head_dim, const attention_query *queries,
                                  const char *const *tiles, int first, int last, int fetch, float *scores) {
#define CASE(r, n, h) V(score_range)(r, n, h, head_dim, queries, tiles, first, last, fetch, scores)
  switch (R * 2 + (half != 0)) {
    case 2: CASE(1, SCORES_1, 0); break;
    case 3: CASE(1, SCORES_1, 1); break;
    case 4: CASE(2, SCORES_2, 0); break;
    case 5: CASE(2, SCORES_2, 1); break;
    case 6: CASE(3, SCORES_3, 0); break;
    case 7: CASE(3, SCORES_3, 1); break;
    case 8: CASE(4, SCORES_4, 0); break;
    default: CASE(4, SCORES_4, 1);
  }
#undef CASE
}

/* Turn positions [begin, end) of a split's raw scores into weights e^(score * scale - peak); other lanes of the
 * first and last tile become 0. */
static TARGET void V(weigh)(float *scores, int begin, int end, float scale, attention_state *state) {
  const v16 factor = V(set1)(scale);
  const int first = begin / TILE, last = (end + TILE - 1) / TILE;
  v16 largest = V(set1)(-__builtin_inff());
  for (int tile = first; tile < last; tile++) {
    float *s = scores + tile * TILE;
    v16 scaled = V(mul)(V(load)(s), factor);
    if (tile == first || tile == last - 1) {
      const int from = begin - tile * TILE, to = end - tile * TILE;
      scaled = V(keep)(scaled, from > 0 ? from : 0, to < TILE ? to : TILE, -__builtin_inff());
    }
    V(store)(s, scaled);
    largest = V(max)(scaled, largest);
  }
  state->peak = V(largest)(largest);
  const v16 peak = V(set1)(state->peak);
  v16 sums = V(set1)(0.0f);
  for (int tile = first; tile < last; tile++) {
    float *s = scores + tile * TILE;
    const v16 weight = V(exp)(V(sub)(V(load)(s), peak));
    V(store)(s, weight);
    sums = V(add)(sums, weight);
  }
  state->total = V(sum)(sums);
}

/* Add weight * V of positions [begin, end) of the split to columns [d, d + 16 C) of R queries. */
INLINE void V(value_columns)(int R, int C, int half, int64_t d, int64_t stride, int64_t skip,
                             const attention_query *queries, const char *const *tiles, const float *weights,
                             int begin, int end, int last, int fetch) {
  v16 sums[GROUP][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sums[r][c] = V(load)(queries[r].part.values + d + c * 16);
  }
  for (int position = begin; position < end;) {
    const int tile = position / TILE;
    const int stop = (tile + 1) * TILE < end ? (tile + 1) * TILE : end;
    const char *ahead = fetch && (tile + 2) * TILE < last ? tiles[tile + 2] : NULL;
    int64_t row = skip + (position % TILE) * stride + d;
    for (; position < stop; position++, row += stride) {
      if (ahead) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c += half ? 2 : 1) {
          __builtin_prefetch(ahead + (row + c * 16) * (half ? 2 : 4), 0, 2);
        }
      }
      v16 weight[GROUP];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) weight[r] = V(set1)(weights[r * SPLIT + position]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        const v16 values = V(load_cache)(tiles[tile], row + c * 16, half);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[r][c] = V(fma)(weight[r], values, sums[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) V(store)(queries[r].part.values + d + c * 16, sums[r][c]);
  }
}

INLINE void V(value_range)(int R, int C, int half, int64_t stride, int64_t skip, const attention_query *queries,
                           const char *const *tiles, const float *weights, int begin, int end, int fetch) {
  enum { STRIP = 8 * TILE }; /* positions whose V stays in the nearest cache while the columns pass */
  for (int from = begin; from < end;) {
    const int to = from / STRIP * STRIP + STRIP < end ? from / STRIP * STRIP + STRIP : end;
    int64_t d = 0;
    for (; d + 16 * C <= stride; d += 16 * C) {
      V(value_columns)(R, C, half, d, stride, skip, queries, tiles, weights, from, to, end, fetch);
    }
    for (; d < stride; d += 16) {
      V(value_columns)(R, 1, half, d, stride, skip, queries, tiles, weights, from, to, end, fetch);
    }
    from = to;
  }
}

static TARGET void V(value_group)(int R, int half, int64_t stride, int64_t skip, const attention_query *queries,
                                  const char *const *tiles, const float *weights, int begin, int end, int fetch) {
#define CASE(r, c, h) V(value_range)(r, c, h, stride, skip, queries, tiles, weights, begin, end, fetch)
  switch (R * 2 + (half != 0)) {
    case 2: CASE(1, COLUMNS_1, 0); break;
    case 3: CASE(1, COLUMNS_1, 1); break;
    case 4: CASE(2, COLUMNS_2, 0); break;
    case 5: CASE(2, COLUMNS_2, 1); break;
    case 6: CASE(3, COLUMNS_3, 0); break;
    case 7: CASE(3, COLUMNS_3, 1); break;
    case 8: CASE(4, COLUMNS_4, 0); break;
    default: CASE(4, COLUMNS_4, 1);
  }
#undef CASE
}

/* The part of `query` in the split that begins at `start`, as begin <= position < end within the split. */
INLINE int V(clip)(const attention_query *query, int32_t start, int *begin, int *end) {
  *begin = query->begin > start ? query->begin - start : 0;
  *end = query->end - start < SPLIT ? query->end - start : SPLIT;
  return *begin < *end;
}

/* All of `part` for up to GROUP queries that each see something of the split. */
static TARGET void V(split_group)(const attention_work *work, attention_query *queries, int R, int32_t start,
                                  const char *const *tiles, int fetch) {
  const orcd_op *op = work->op;
  const int half = op->cache_dtype == 1;
  const int64_t stride = attention_value_stride(op), skip = (int64_t)TILE * op->head_dim;
  int begin[GROUP], end[GROUP], first = SPLIT, last = 0, from = 0, to = SPLIT;
  for (int r = 0; r < R; r++) {
    V(clip)(&queries[r], start, &begin[r], &end[r]);
    first = begin[r] < first ? begin[r] : first;
    last = end[r] > last ? end[r] : last;
    from = begin[r] > from ? begin[r] : from;
    to = end[r] < to ? end[r] : to;
    for (int64_t d = 0; d < stride; d += 16) V(store)(queries[r].part.values + d, V(set1)(0.0f));
  }
  V(score_group)(R, half, op->head_dim, queries, tiles, first / TILE, (last + TILE - 1) / TILE, fetch,
                 work->scores);
  for (int r = 0; r < R; r++) {
    V(weigh)(work->scores + r * SPLIT, begin[r], end[r], op->f0, &queries[r].part);
  }
  if (from >= to) from = to = last; /* no position that all of them see */
  for (int r = 0; r < R; r++) {
    const int stop = end[r] < from ? end[r] : from;
    V(value_group)(1, half, stride, skip, &queries[r], tiles, work->scores + r * SPLIT, begin[r], stop, 0);
  }
  V(value_group)(R, half, stride, skip, queries, tiles, work->scores, from, to, fetch);
  for (int r = 0; r < R; r++) {
    const int resume = begin[r] > to ? begin[r] : to;
    V(value_group)(1, half, stride, skip, &queries[r], tiles, work->scores + r * SPLIT, resume, end[r], 0);
  }
}

/* Add `part` to `sum`. */
static TARGET void V(merge)(attention_state *sum, const attention_state *part, int64_t stride, int seen) {
  if (!seen) {
    sum->peak = part->peak;
    sum->total = part->total;
    for (int64_t d = 0; d < stride; d += 16) V(store)(sum->values + d, V(load)(part->values + d));
    return;
  }
  const float peak = sum->peak > part->peak ? sum->peak : part->peak;
  const float old = V(exp_1)(sum->peak - peak), new = V(exp_1)(part->peak - peak);
  const v16 a = V(set1)(old), b = V(set1)(new);
  sum->peak = peak;
  sum->total = __builtin_fmaf(sum->total, old, part->total * new);
  for (int64_t d = 0; d < stride; d += 16) {
    v16 x = V(mul)(V(load)(part->values + d), b);
    V(store)(sum->values + d, V(fma)(V(load)(sum->values + d), a, x));
  }
}

/* A sink is one more score, without a value: it joins the total, the peak being the larger of both. */
static TARGET void V(finish)(const attention_state *sum, const float *sink, float *out, int head_dim) {
  float scale = 1.0f, total = sum->total;
  if (sink) {
    const float peak = sum->peak > *sink ? sum->peak : *sink;
    scale = V(exp_1)(sum->peak - peak);
    total = __builtin_fmaf(total, scale, V(exp_1)(*sink - peak));
  }
  const v16 factor = V(set1)(scale / total);
  int d = 0;
  for (; d + 16 <= head_dim; d += 16) V(store)(out + d, V(mul)(V(load)(sum->values + d), factor));
  if (d < head_dim) V(store_n)(out + d, V(mul)(V(load)(sum->values + d), factor), head_dim - d);
}

/* Compute `part` of every query that sees something of the split at `start`; the others' total becomes 0. */
static TARGET void V(split)(const attention_work *work, int32_t start) {
  const char *tiles[SPLIT_TILES] = {0};
  int32_t first = INT32_MAX, last = 0;
  for (int i = 0; i < work->num_queries; i++) {
    first = work->queries[i].begin < first ? work->queries[i].begin : first;
    last = work->queries[i].end > last ? work->queries[i].end : last;
  }
  const int32_t block_size = work->op->block_size;
  for (int tile = 0; tile < SPLIT_TILES; tile++) {
    const int32_t position = start + tile * TILE;
    if (position + TILE <= first || position >= last) continue;
    tiles[tile] = attention_tile(work->op, work->blocks[position / block_size], work->kv_head, position % block_size);
  }
  for (int i = 0; i < work->num_queries;) {
    int begin, end, R = 0;
    while (i + R < work->num_queries && R < GROUP && V(clip)(&work->queries[i + R], start, &begin, &end)) R++;
    if (R == 0) {
      work->queries[i++].part.total = 0.0f;
      continue;
    }
    V(split_group)(work, work->queries + i, R, start, tiles, i == 0);
    i += R;
  }
}

static TARGET void V(store_token)(const orcd_op *op, int64_t token, int32_t slot) {
  const int half = op->cache_dtype == 1, lane = slot % TILE;
  const int64_t stride = attention_value_stride(op);
  for (int64_t head = 0; head < op->num_kv_heads; head++) {
    char *tile = attention_tile(op, slot / op->block_size, head, slot % op->block_size);
    const float *k = op->x + token * op->ldx + head * op->head_dim;
    const float *v = op->y + token * op->ldy + head * op->head_dim;
    const int64_t value = (int64_t)TILE * op->head_dim + lane * stride;
    for (int64_t d = 0; d < op->head_dim; d += 16) {
      const int rest = op->head_dim - d < 16 ? (int)(op->head_dim - d) : 16;
      const v16 keys = rest == 16 ? V(load)(k + d) : V(load_n)(k + d, rest);
      const v16 values = rest == 16 ? V(load)(v + d) : V(load_n)(v + d, rest);
      if (half) {
        uint16_t halves[16];
        V(store_half)(halves, keys);
        for (int i = 0; i < rest; i++) ((uint16_t *)tile)[(d + i) * TILE + lane] = halves[i];
        V(store_half)((uint16_t *)tile + value + d, values);
      } else {
        for (int i = 0; i < rest; i++) ((float *)tile)[(d + i) * TILE + lane] = k[d + i];
        V(store)((float *)tile + value + d, values);
      }
    }
  }
}

#undef SCORES_1
#undef SCORES_2
#undef SCORES_3
#undef SCORES_4
#undef COLUMNS_1
#undef COLUMNS_2
#undef COLUMNS_3
#undef COLUMNS_4
