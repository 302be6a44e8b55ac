// The nested activation on CUDA, for torch; the kernels are in activation_cuda.cu.
#include "activation_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/binding.h"
#include "operands.h"

namespace matformer {
namespace {

Tensor nested_activation(Tensor h) {
  const int64_t k = values_per_neuron(h);
  const int dtype = dtype_of(h.scalar_type(), "h");
  Tensor act = torch::stable::new_empty(h, {h.size(0)});
  launch_on_device_of(h, "nested_activation", [&](void* stream) {
    return matformer_nested_activation(h.const_data_ptr(), dtype, h.size(0), k,
                                       act.mutable_data_ptr(), stream);
  });
  return act;
}

std::tuple<Tensor, Tensor> nested_activation_backward(Tensor h, std::optional<Tensor> d_act,
                                                      std::vector<int64_t> rows,
                                                      std::vector<int64_t> widths,
                                                      bool wants_act) {
  const BackwardOperands out = backward_operands(h, d_act, rows, widths, wants_act);
  const int dtype = dtype_of(h.scalar_type(), "h");
  launch_on_device_of(h, "nested_activation_backward", [&](void* stream) {
    return matformer_nested_activation_backward(
        h.const_data_ptr(), d_act ? d_act->const_data_ptr() : nullptr, dtype, h.size(1),
        rows.data(), widths.data(), int64_t(rows.size()), out.widest,
        wants_act ? out.act.mutable_data_ptr() : nullptr,
        d_act ? out.d_h.mutable_data_ptr() : nullptr, stream);
  });
  return {out.act, out.d_h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matformer_dist, CUDA, m) {
  m.impl("nested_activation", TORCH_BOX(&nested_activation));
  m.impl("nested_activation_backward", TORCH_BOX(&nested_activation_backward));
}

}  // namespace matformer
