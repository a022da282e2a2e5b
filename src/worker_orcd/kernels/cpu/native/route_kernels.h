/* Softmax of a few values in place. The largest is the first, or one is NaN; e^(x - first), added up in order. */
static TARGET void V(softmax)(float *x, int64_t n) {
  const v16 peak = V(set1)(x[0]);
  float total = 0.0f;
  for (int64_t i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? (int)(n - i) : 16;
    V(store_n)(x + i, V(exp)(V(sub)(V(load_n)(x + i, count), peak)), count);
    for (int j = 0; j < count; j++) total += x[i + j];
  }
  for (int64_t i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? (int)(n - i) : 16;
    V(store_n)(x + i, V(div)(V(load_n)(x + i, count), V(set1)(total)), count);
  }
}
