// y = epilogue(x W^T + b) over packed weights.
//
// One output is one sequential chain over k: its bits depend on its row of x alone, not on the number of rows, the
// split into calls or the number of threads.
//
// What callers keep:
//   x     rows begin at x + row * ldx; ldx >= padded_k(k) (int8: k itself is enough). Values at [row][k] and beyond are
//         finite (zero them once; no stage writes them): they meet zero weights.
//   y     rows begin at y + row * ldy (in elements of y's type); exactly n columns (gated: n / 2) of each row are
//         written, padding never. y must not overlap x, except that AddResidual reads and writes y itself.
//   No alignment is asked for; 64-byte aligned rows are fastest.
//   threads   all threads of the pool call `linear` with the same arguments and their own index, inside a run. The work
//         is split over outputs; there is no barrier in it: put one before y is read, x is overwritten, or (if y is one
//         of the next stage's inputs) the next stage begins.
#pragma once

#include "epilogue.h"
#include "pack.h"
#include "threads.h"

namespace kvferry {

void linear(const Linear& weights, const bf16* x, int ldx, int rows, void* y, int ldy, Epilogue epilogue,
            Threads& threads, int thread);

}  // namespace kvferry
