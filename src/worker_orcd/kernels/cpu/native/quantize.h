/* Quantising activations: see linear.h for the tile, quantize.c for the rules. */
#ifndef ORCD_QUANTIZE_H
#define ORCD_QUANTIZE_H

#include "linear.h"

void orcd_quantize_scalar(const float *x, int64_t blocks, uint8_t *tile, int lanes, int lane, int planes,
                          const orcd_correction *correction);
#ifdef __x86_64__
void orcd_quantize_avx2(const float *x, int64_t blocks, uint8_t *tile, int lanes, int lane, int planes,
                        const orcd_correction *correction);
#endif

#endif
