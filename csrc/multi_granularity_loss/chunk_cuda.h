// Launchers of the two passes over a chunk (see chunk.h), without torch's headers. Operands are
// contiguous device memory; dtypes are numbers of cuda/dtypes.h. They queue work on `stream`, wait
// for nothing, allocate nothing, and return a cudaError_t.
#pragma once

#include <cstdint>

extern "C" {

// logits [groups, tokens, vocab], targets [groups, tokens] -> numbers [groups, tokens, 7].
int matformer_chunk_statistics(const void* logits, int dtype, const int64_t* targets,
                               int64_t groups, int64_t tokens, int64_t vocab, int64_t offset,
                               float temperature, bool distills, bool find_best, float* numbers,
                               void* stream);

// ranks [n_ranks, groups, tokens, 7], ce, z and kl [groups, tokens] -> results [4, groups, tokens],
// best ids [groups, tokens]. Logits become their gradient, unless gradient_dtype is kNoGradient: in
// their own dtype, or of fp32 in a narrower one, packed into the first half of each row.
int matformer_chunk_gradient(void* logits, int dtype, const int64_t* targets, const float* ranks,
                             int64_t n_ranks, const float* ce, const float* z, const float* kl,
                             int64_t groups, int64_t tokens, int64_t vocab, int64_t offset,
                             int64_t ignore_index, float temperature, bool distills,
                             int gradient_dtype, float* results, int64_t* best, void* stream);
}
