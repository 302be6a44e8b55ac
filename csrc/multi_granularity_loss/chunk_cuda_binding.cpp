// The two passes over a chunk on CUDA, for torch; the kernels are in chunk_cuda.cu.
#include "chunk_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/binding.h"
#include "operands.h"

namespace matformer {
namespace {

Tensor chunk_statistics(Tensor logits, Tensor targets, int64_t offset, double temperature,
                        bool distills, bool find_best) {
  const Chunk chunk = chunk_of(logits, targets, offset, 0, temperature, distills);
  const int dtype = dtype_of(logits.scalar_type(), "logits");
  Tensor numbers = torch::stable::new_empty(logits, {chunk.groups, chunk.tokens, kNumbers},
                                            ScalarType::Float);
  launch_on_device_of(logits, "chunk_statistics", [&](void* stream) {
    return matformer_chunk_statistics(logits.const_data_ptr(), dtype, data_of<int64_t>(targets),
                                      chunk.groups, chunk.tokens, chunk.vocab, offset,
                                      chunk.temperature, distills, find_best,
                                      mutable_data_of<float>(numbers), stream);
  });
  return numbers;
}

std::tuple<Tensor, Tensor> chunk_gradient_(Tensor logits, Tensor targets, Tensor ranks, Tensor ce,
                                           Tensor z, Tensor kl, int64_t offset,
                                           int64_t ignore_index, double temperature, bool distills,
                                           std::optional<ScalarType> gradient) {
  const Chunk chunk = chunk_of(logits, targets, offset, ignore_index, temperature, distills);
  const GradientOperands operands = gradient_operands(chunk, logits, ranks, ce, z, kl);
  const int dtype = dtype_of(logits.scalar_type(), "logits");
  const int gradient_dtype = gradient ? dtype_of(*gradient, "gradient") : kNoGradient;
  STD_TORCH_CHECK(!gradient || gradient_dtype == dtype || dtype == kFloat32, "a gradient in ",
                  name_of(*gradient), " does not fit logits in ", name_of(logits.scalar_type()));
  launch_on_device_of(logits, "chunk_gradient_", [&](void* stream) {
    const Weights& w = operands.weights;
    return matformer_chunk_gradient(
        logits.mutable_data_ptr(), dtype, data_of<int64_t>(targets), operands.ranks,
        operands.n_ranks, w.ce, w.z, w.kl, chunk.groups, chunk.tokens, chunk.vocab, offset,
        ignore_index, chunk.temperature, distills, gradient_dtype,
        mutable_data_of<float>(operands.results), mutable_data_of<int64_t>(operands.best), stream);
  });
  return {operands.results, operands.best};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matformer_dist, CUDA, m) {
  m.impl("chunk_statistics", TORCH_BOX(&chunk_statistics));
  m.impl("chunk_gradient_", TORCH_BOX(&chunk_gradient_));
}

}  // namespace matformer
