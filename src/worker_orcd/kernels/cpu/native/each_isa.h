/*
 * Include KERNELS (a file name) once per instruction set, with vecmath.h's sixteen lanes for it. Its functions
 * are named V(name), which is name_avx512, name_avx2 or name_plain; ORCD_PICK(name) is the one for this machine.
 */
#include "orcd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define ISA avx512
#define ISA_AVX512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "vecmath.h"
#include KERNELS
#undef ISA
#undef ISA_AVX512
#undef TARGET
#undef INLINE
#undef v16
#undef V
#undef V_
#undef V__

#define ISA avx2
#define ISA_AVX2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "vecmath.h"
#include KERNELS
#undef ISA
#undef ISA_AVX2
#undef TARGET
#undef INLINE
#undef v16
#undef V
#undef V_
#undef V__

/* orcd_isa() is one of "avx512…", "avx2", "scalar" here. */
#define ORCD_PICK(name) \
  (orcd_isa()[0] != 'a' ? name##_plain : orcd_isa()[3] == '5' ? name##_avx512 : name##_avx2)
#else
#define ORCD_PICK(name) name##_plain
#endif

#define ISA plain
#define ISA_PLAIN
#define TARGET
#include "vecmath.h"
#include KERNELS
#undef ISA
#undef ISA_PLAIN
#undef TARGET
#undef INLINE
#undef v16
#undef V
#undef V_
#undef V__
