/* The machine's own limits, for benchmarks: what one thread can do at best, per second that it has a core. Plain C. */
#ifndef KVFERRY_PEAKS_H
#define KVFERRY_PEAKS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* FLOP/s of multiply-adds on bf16 pairs (where the instruction set has none: on fp32) that stay in registers, over
   about `seconds`. */
__attribute__((visibility("default"))) double kvf_peak_dot(double seconds);

/* Bytes/s at which `memory` is read from begin to end, once. Make it far larger than the caches. */
__attribute__((visibility("default"))) double kvf_peak_read(const void* memory, uint64_t bytes);

#ifdef __cplusplus
}
#endif

#endif
