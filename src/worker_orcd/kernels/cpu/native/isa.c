/* Which kernels this machine runs: chosen once, when the library is loaded. */
#include "linear.h"

#include <stdatomic.h>

static _Atomic(const orcd_kernels *) chosen = &orcd_scalar_kernels;

#ifdef __x86_64__
#include <cpuid.h>

enum { AVX2_FMA = 1, AVX512_VNNI = 2 };

/* Registers that the operating system saves and restores: bits 1, 2 for AVX, 5, 6, 7 for AVX-512. */
static unsigned saved_registers(void) {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

/* Asked of the processor itself: __builtin_cpu_supports needs a runtime that not every toolchain links in. */
static int features(void) {
  const unsigned fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
  const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11, avx2 = 1u << 5;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & fma_osxsave_avx_f16c) != fma_osxsave_avx_f16c) return 0;
  const unsigned saved = saved_registers();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (saved & 0x6) != 0x6 || !(b & avx2)) return 0;
  const int wide = (saved & 0xe6) == 0xe6 && (b & f_dq_bw_vl) == f_dq_bw_vl && (c & vnni);
  return wide ? AVX2_FMA | AVX512_VNNI : AVX2_FMA;
}
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & 1 << 20) != 0; } /* HWCAP_ASIMDDP */
#elif defined(__aarch64__)
static int has_dotprod(void) { return 1; } /* Apple's processors all have it */
#endif

static const orcd_kernels *available(const char *name) {
  if (strcmp(name, orcd_scalar_kernels.name) == 0) return &orcd_scalar_kernels;
#ifdef __x86_64__
  const int has = features();
  if (strcmp(name, orcd_avx2_kernels.name) == 0 && has & AVX2_FMA) return &orcd_avx2_kernels;
  if (strcmp(name, orcd_avx512_kernels.name) == 0 && has & AVX512_VNNI) return &orcd_avx512_kernels;
#elif defined(__aarch64__)
  if (strcmp(name, orcd_neon_kernels.name) == 0 && has_dotprod()) return &orcd_neon_kernels;
#endif
  return NULL;
}

__attribute__((constructor)) static void choose(void) {
  static const char *const best_first[] = {"avx512vnni", "avx2", "neon", "scalar"};
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
