// Launchers of the nested activation (see operands.h), without torch's headers. Operands are
// contiguous device memory; dtypes are numbers of cuda/dtypes.h. They queue work on `stream`, wait
// for nothing, allocate nothing, and return a cudaError_t.
#pragma once

#include <cstdint>

extern "C" {

// h [neurons, k] -> act [neurons]; k is 2 for SwiGLU (gate, up), 1 for GELU.
int matformer_nested_activation(const void* h, int dtype, int64_t neurons, int64_t k, void* act,
                                void* stream);

// h [N, k], d_act [N] -> act [R, widest], d_h [R, k widest], where they are not null. rows and
// widths are host memory, one number a segment.
int matformer_nested_activation_backward(const void* h, const void* d_act, int dtype, int64_t k,
                                         const int64_t* rows, const int64_t* widths,
                                         int64_t segments, int64_t widest, void* act, void* d_h,
                                         void* stream);
}
