// The nested activation: act of all segments' pre-activations, and its gradient.
//
// Legend: segment i has R_i rows of m_i neurons, N = sum R_i m_i; R rows in all, W the widest m_i;
// k = 2 values a neuron for SwiGLU (gate, up), 1 for GELU.
//
//   forward    h [N, k] -> act [N]
//   backward   h, d_act [N] -> act [R, W] (made again, so that it need not be stored), d_h [R, kW]
//
// h, act and d_act are ragged: segment after segment, row after row, no gaps. What backward makes
// has one row stride, as the GEMMs of the weights' gradients need; what lies right of a narrower
// segment is not written.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"

namespace matformer {

struct ActivationSegment {
  int64_t first_row, rows, width;
  int64_t offset;  // of its first neuron in the ragged buffers
};

struct BackwardOperands {
  std::vector<ActivationSegment> segments;
  int64_t rows, widest;
  Tensor act, d_h;  // to be written; empty where not asked for
};

inline int64_t values_per_neuron(const Tensor& h) {
  STD_TORCH_CHECK(h.dim() == 2 && (h.size(1) == 1 || h.size(1) == 2) && h.is_contiguous(),
                  "h must be contiguous [N, 1] (GELU) or [N, 2] (SwiGLU)");
  return h.size(1);
}

inline BackwardOperands backward_operands(const Tensor& h, const std::optional<Tensor>& d_act,
                                          const std::vector<int64_t>& rows,
                                          const std::vector<int64_t>& widths, bool wants_act) {
  const int64_t k = values_per_neuron(h);
  STD_TORCH_CHECK(rows.size() == widths.size(), "rows and widths hold ", rows.size(), " and ",
                  widths.size(), " numbers; each needs one for each segment");
  BackwardOperands out{};
  int64_t first_row = 0, offset = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && widths[i] >= 1, "segment ", i, " has ", rows[i], " rows of ",
                    widths[i], " neurons; there must be at least 0 of at least 1");
    STD_TORCH_CHECK(rows[i] == 0 || widths[i] <= (h.size(0) - offset) / rows[i],
                    "rows and widths tell of more neurons than the ", h.size(0), " of h");
    out.segments.push_back({first_row, rows[i], widths[i], offset});
    out.widest = std::max(out.widest, widths[i]);
    first_row += rows[i];
    offset += rows[i] * widths[i];
  }
  STD_TORCH_CHECK(offset == h.size(0), "rows and widths tell of ", offset, " neurons; h holds ",
                  h.size(0));
  out.rows = first_row;
  if (d_act) check_operand(*d_act, "d_act", h.scalar_type(), {h.size(0)}, h);
  const auto make = [&](bool wanted, int64_t columns) {
    return torch::stable::new_empty(h, {wanted ? first_row : 0, columns});
  };
  out.act = make(wants_act, out.widest);
  out.d_h = make(d_act.has_value(), k * out.widest);
  return out;
}

}  // namespace matformer
