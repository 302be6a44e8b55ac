// What the operators over a chunk take and give on every device: checked, and as plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "chunk.h"

namespace matformer {

inline Chunk chunk_of(const Tensor& logits, const Tensor& targets, int64_t offset,
                      int64_t ignore_index, double temperature, bool distills) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous(),
                  "logits must be contiguous [G, c, V]");
  STD_TORCH_CHECK(temperature > 0, "temperature is ", temperature, "; it must be above 0");
  const Chunk chunk{logits.size(0), logits.size(1),     logits.size(2), offset,
                    ignore_index,   float(temperature), distills};
  check_operand(targets, "targets", ScalarType::Long, {chunk.groups, chunk.tokens}, logits);
  return chunk;
}

struct GradientOperands {
  const float* ranks;
  int64_t n_ranks;
  Weights weights;
  Tensor results, best;  // to be written
};

inline GradientOperands gradient_operands(const Chunk& chunk, const Tensor& logits,
                                          const Tensor& ranks, const Tensor& ce, const Tensor& z,
                                          const Tensor& kl) {
  check_operand(ce, "ce", ScalarType::Float, {chunk.groups, chunk.tokens}, logits);
  check_operand(z, "z", ScalarType::Float, {chunk.groups, chunk.tokens}, logits);
  check_operand(kl, "kl", ScalarType::Float, {chunk.groups, chunk.tokens}, logits);
  STD_TORCH_CHECK(ranks.dim() == 4 && ranks.size(0) > 0, "ranks must be [T, G, c, ", int(kNumbers),
                  "] of at least one rank");
  check_operand(ranks, "ranks", ScalarType::Float,
                {ranks.size(0), chunk.groups, chunk.tokens, kNumbers}, logits);
  return {data_of<float>(ranks), ranks.size(0),
          {data_of<float>(ce), data_of<float>(z), data_of<float>(kl)},
          torch::stable::new_empty(ce, {kResults, chunk.groups, chunk.tokens}),
          torch::stable::new_empty(ce, {chunk.groups, chunk.tokens}, ScalarType::Long)};
}

}  // namespace matformer
