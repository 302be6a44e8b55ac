// The two passes over a chunk on a CPU: tokens in parallel, a row by one thread, so deterministic.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../cpu/operators.h"
#include "operands.h"

namespace matformer {
namespace {

// Numbers [G, c, kNumbers] of the rows of one token.
template <class T>
void token_statistics(const Chunk& chunk, const T* logits, const int64_t* targets, int64_t token,
                      bool find_best, float* scratch, float* numbers) {
  const LossLoops<T>& loops = loss_loops<T>();
  const float tau = chunk.distills ? chunk.temperature : 1;  // nobody else reads sums at tau
  const T* teacher = logits + token * chunk.vocab;
  for (int64_t row = token; row < chunk.groups * chunk.tokens; row += chunk.tokens) {
    const T* z = logits + row * chunk.vocab;
    float* out = numbers + row * kNumbers;
    for (int k = 0; k < kNumbers; ++k) out[k] = 0;
    out[kTop] = out[kTarget] = -INFINITY;
    if (chunk.vocab == 0) continue;  // a rank whose share is padding alone
    const RowStatistics found = chunk.learns(row)
                                    ? loops.statistics(z, chunk.vocab, tau, teacher, scratch)
                                    : loops.statistics(z, chunk.vocab, tau, nullptr, nullptr);
    if (chunk.distills && row == token)
      loops.exponentials(z, chunk.vocab, found.top, tau, scratch);
    const int64_t column = targets[row] - chunk.offset, best = found.best + chunk.offset;
    out[kTop] = found.top;
    out[kSum] = found.sum;
    out[kSumTau] = found.sum_tau;
    out[kDifference] = found.difference;
    if (column >= 0 && column < chunk.vocab) out[kTarget] = loops.at(z, column);
    if (!find_best) continue;
    out[kBestHigh] = float(best / kIdBase);
    out[kBestLow] = float(best % kIdBase);
  }
}

// n logits become their gradient, but for the part of the target. teacher: its softmax there.
template <class T>
void write_gradient_of(const LossLoops<T>& loops, T* z, int64_t n, const RowGradient& g, float tau,
                       const float* teacher) {
  if (g.pull != 0)
    loops.student_gradient(z, n, g.lse, g.strength, g.lse_tau, g.pull, tau, teacher);
  else
    loops.gradient(z, n, g.lse, g.strength);
}

// Results of the rows of one token; its logits become their gradient if asked.
template <class T>
void token_gradient(const Chunk& chunk, const GradientOperands& operands, T* logits,
                    const int64_t* targets, int64_t token, bool write_gradient, float* scratch,
                    float* results, int64_t* best) {
  const LossLoops<T>& loops = loss_loops<T>();
  const int64_t rows = chunk.groups * chunk.tokens, vocab = chunk.vocab;
  const float tau = chunk.temperature;
  const RowNumbers teacher = join(operands.ranks, operands.n_ranks, rows, token, tau);
  bool taught = false;  // whether scratch holds the teacher's softmax
  // The teacher's row comes last: the students read its logits.
  for (int64_t row = rows - chunk.tokens + token; row >= 0; row -= chunk.tokens) {
    const RowNumbers numbers =
        row == token ? teacher : join(operands.ranks, operands.n_ranks, rows, row, tau);
    const RowOutcome out = conclude(chunk, operands.weights, operands.ranks, operands.n_ranks, row,
                                    targets[row], numbers, teacher);
    for (int k = 0; k < kResults; ++k) results[k * rows + row] = out.results[k];
    best[row] = out.best;
    if (!write_gradient) continue;
    const RowGradient& g = out.gradient;
    if (g.pull != 0 && !taught) {
      loops.softmax(logits + token * vocab, vocab, tau, teacher.lse_tau, scratch);
      taught = true;
    }
    T* z = logits + row * vocab;
    const bool owns_target = g.column >= 0 && g.column < vocab;
    const float at_target = owns_target ? loops.at(z, g.column) : 0.f;
    write_gradient_of(loops, z, vocab, g, tau, scratch);
    if (!owns_target) continue;
    // Made again in fp32: what was stored is rounded, and little may be left of it.
    float value = at_target;
    write_gradient_of(loss_loops<float>(), &value, 1, g, tau,
                      g.pull != 0 ? scratch + g.column : nullptr);
    loops.set(z, g.column, value - g.ce);
  }
}

// Calls body(token, scratch) for every token, by several threads. scratch: V floats for what
// distillation reads of the teacher; none without it.
template <class Body>
void for_each_token(const Chunk& chunk, Body body) {
  torch::stable::parallel_for(0, chunk.tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(chunk.distills ? chunk.vocab : 0);
    for (int64_t token = begin; token < end; ++token) body(token, scratch.data());
  });
}

Tensor chunk_statistics(Tensor logits, Tensor targets, int64_t offset, double temperature,
                        bool distills, bool find_best) {
  const Chunk chunk = chunk_of(logits, targets, offset, 0, temperature, distills);
  Tensor numbers = torch::stable::new_empty(logits, {chunk.groups, chunk.tokens, kNumbers},
                                            ScalarType::Float);
  with_storage_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    for_each_token(chunk, [&](int64_t token, float* scratch) {
      token_statistics(chunk, data_of<T>(logits), data_of<int64_t>(targets), token, find_best,
                       scratch, mutable_data_of<float>(numbers));
    });
  });
  return numbers;
}

std::tuple<Tensor, Tensor> chunk_gradient_(Tensor logits, Tensor targets, Tensor ranks, Tensor ce,
                                           Tensor z, Tensor kl, int64_t offset,
                                           int64_t ignore_index, double temperature, bool distills,
                                           std::optional<ScalarType> gradient) {
  const Chunk chunk = chunk_of(logits, targets, offset, ignore_index, temperature, distills);
  const GradientOperands operands = gradient_operands(chunk, logits, ranks, ce, z, kl);
  STD_TORCH_CHECK(!gradient || *gradient == logits.scalar_type(),
                  "on a CPU the gradient must have the dtype of the logits");
  with_storage_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    for_each_token(chunk, [&](int64_t token, float* scratch) {
      token_gradient(chunk, operands, mutable_data_of<T>(logits), data_of<int64_t>(targets), token,
                     gradient.has_value(), scratch, mutable_data_of<float>(operands.results),
                     mutable_data_of<int64_t>(operands.best));
    });
  });
  return {operands.results, operands.best};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matformer_dist, CPU, m) {
  m.impl("chunk_statistics", TORCH_BOX(&chunk_statistics));
  m.impl("chunk_gradient_", TORCH_BOX(&chunk_gradient_));
}

}  // namespace matformer
