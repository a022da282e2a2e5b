/* Which kernels this machine runs: chosen once, when the library is loaded. */
#include "linear.h"

#include <stdatomic.h>

static _Atomic(const orcd_kernels *) chosen = &orcd_scalar_kernels;

#ifdef __x86_64__
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

static const orcd_kernels *available(const char *name) {
  if (strcmp(name, orcd_scalar_kernels.name) == 0) return &orcd_scalar_kernels;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (strcmp(name, orcd_avx2_kernels.name) == 0 && has_avx2()) return &orcd_avx2_kernels;
  if (strcmp(name, orcd_avx512_kernels.name) == 0 && has_avx512()) return &orcd_avx512_kernels;
#endif
  return NULL;
}

__attribute__((constructor)) static void choose(void) {
  static const char *const best_first[] = {"avx512vnni", "avx2", "scalar"};
  for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
    const orcd_kernels *kernels = available(best_first[i]);
    if (kernels == NULL) continue;
    atomic_store(&chosen, kernels);
    return;
  }
}

const orcd_kernels *orcd_kernels_in_use(void) { return atomic_load_explicit(&chosen, memory_order_relaxed); }

int orcd_abi_version(void) { return ORCD_ABI_VERSION; }

const char *orcd_isa(void) { return orcd_kernels_in_use()->name; }

int orcd_force_isa(const char *name) {
  const orcd_kernels *kernels = available(name);
  if (kernels == NULL) return -1;
  atomic_store(&chosen, kernels);
  return 0;
}
