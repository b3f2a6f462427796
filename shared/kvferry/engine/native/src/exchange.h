/* What ranks that exchange rows through shared memory pay for it, for benchmarks. Plain C. */
#ifndef KVFERRY_EXCHANGE_H
#define KVFERRY_EXCHANGE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds of one round, the mean over `rounds`: write this rank's bytes [begin, end) of each of `rows` rows of `width`
   bytes, from `own` [rows, end - begin], wait for all ranks, read all bytes into `whole` [rows, width]. Without rows a
   round is the bare barrier; of one rank it is the two copies. All ranks call it at the same time, with numbers that
   differ in the columns alone. `memory`: KVF_BARRIER_BYTES, zero before the first call, and 2 * rows * width; aligned
   to 64. */
__attribute__((visibility("default"))) double kvf_exchange_seconds(void *memory, int32_t ranks, const void *own,
                                                                   void *whole, int32_t rows, int32_t width,
                                                                   int32_t begin, int32_t end, int32_t rounds);

#ifdef __cplusplus
}
#endif

#endif
