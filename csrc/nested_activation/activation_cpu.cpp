// The nested activation on a CPU: neighbouring neurons, or rows, by several threads.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/operators.h"
#include "operands.h"

namespace matformer {
namespace {

constexpr int64_t kNeuronsPerTask = 8192;

Tensor nested_activation(Tensor h) {
  const int64_t k = values_per_neuron(h);
  Tensor act = torch::stable::new_empty(h, {h.size(0)});
  with_storage_type(h, "h", [&](auto type) {
    using T = decltype(type);
    const T* from = data_of<T>(h);
    T* to = mutable_data_of<T>(act);
    const auto& loops = activation_loops<T>();
    const auto run = k == 2 ? loops.swiglu : loops.gelu;
    torch::stable::parallel_for(0, h.size(0), kNeuronsPerTask, [&](int64_t begin, int64_t end) {
      run(from + k * begin, end - begin, to + begin);
    });
  });
  return act;
}

std::tuple<Tensor, Tensor> nested_activation_backward(Tensor h, std::optional<Tensor> d_act,
                                                      std::vector<int64_t> rows,
                                                      std::vector<int64_t> widths,
                                                      bool wants_act) {
  const BackwardOperands out = backward_operands(h, d_act, rows, widths, wants_act);
  const int64_t k = h.size(1), widest = out.widest;
  with_storage_type(h, "h", [&](auto type) {
    using T = decltype(type);
    const auto& loops = activation_loops<T>();
    const auto forward = k == 2 ? loops.swiglu : loops.gelu;
    const auto backward = k == 2 ? loops.swiglu_backward : loops.gelu_backward;
    const T* from = data_of<T>(h);
    const T* d_from = d_act ? data_of<T>(*d_act) : nullptr;
    T* act = wants_act ? mutable_data_of<T>(out.act) : nullptr;
    T* d_h = d_act ? mutable_data_of<T>(out.d_h) : nullptr;
    const int64_t grain = std::max<int64_t>(1, kNeuronsPerTask / std::max<int64_t>(1, widest));
    torch::stable::parallel_for(0, out.rows, grain, [&](int64_t begin, int64_t end) {
      auto s = out.segments.begin();
      for (int64_t row = begin; row < end; ++row) {
        while (row >= s->first_row + s->rows) ++s;
        const int64_t neuron = s->offset + (row - s->first_row) * s->width;
        T* act_row = act ? act + row * widest : nullptr;
        if (d_h)
          backward(from + k * neuron, d_from + neuron, s->width, act_row, d_h + k * row * widest);
        else if (act)
          forward(from + k * neuron, s->width, act_row);
      }
    });
  });
  return {out.act, out.d_h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matformer_dist, CPU, m) {
  m.impl("nested_activation", TORCH_BOX(&nested_activation));
  m.impl("nested_activation_backward", TORCH_BOX(&nested_activation_backward));
}

}  // namespace matformer
