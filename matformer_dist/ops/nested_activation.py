"""The nested activation: SwiGLU or GELU over the pre-activations of all segments.

Legend: segment i has R_i rows of m_i neurons, N = sum R_i m_i; R rows in all, W the widest m_i;
k = 2 pre-activations a neuron for SwiGLU (gate, up), 1 for GELU.

h, act and d_act are ragged: segment after segment, row after row, no gaps. Both functions have a
compiled twin under the same arguments (csrc/nested_activation/), which takes all segments in one
launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.ops import native


def activate(h: Tensor, impl: native.Implementation) -> Tensor:
    """act [N] from pre-activations h [N, k], whatever the segments."""
    if native.is_native(impl, h.device, h.dtype):
        return torch.ops.matformer_dist.nested_activation(h)
    return _activate(h)


def activate_backward(
    h: Tensor,
    d_act: Tensor | None,
    rows: Sequence[int],
    widths: Sequence[int],
    wants_act: bool,
    impl: native.Implementation,
) -> tuple[Tensor, Tensor]:
    """act [R, W], if wanted, and d_h [R, k*W], if there is d_act [N]; of 0 rows otherwise.

    act is computed again, so that the forward pass need not keep it: 1 / (k + 1) of what the
    activations of an FFN would take. Both have one row stride, as the GEMMs of the weights'
    gradients need; what lies right of a segment narrower than W is not written.
    """
    if native.is_native(impl, h.device, h.dtype):
        return torch.ops.matformer_dist.nested_activation_backward(
            h, d_act, rows, widths, wants_act
        )
    n_rows, widest, inputs = sum(rows), max(widths, default=0), h.shape[1]
    act = h.new_empty(n_rows if wants_act else 0, widest)
    d_h = h.new_empty(0 if d_act is None else n_rows, inputs * widest)
    start = offset = 0
    for count, width in zip(rows, widths, strict=True):
        taken, part = slice(start, start + count), slice(offset, offset + count * width)
        act_s = act[taken, :width] if wants_act else None
        if d_act is not None:
            d_act_s = d_act[part].view(count, width)
            _activate_backward(h[part], d_act_s, d_h[taken, : inputs * width], act_s)
        elif act_s is not None:
            act_s.copy_(_activate(h[part]).view(count, width))
        start, offset = taken.stop, part.stop
    return act, d_h


# The reference. It takes gate and up apart into contiguous scratch where they are read more than
# once: stride-2 operands cost SIMD.


def _activate(h: Tensor) -> Tensor:
    if h.shape[1] == 1:
        return F.gelu(h[:, 0])
    gate, up = h.unbind(1)
    return F.silu(_contiguous_copy(gate), inplace=True).mul_(up)


def _activate_backward(h: Tensor, d_act: Tensor, d_h: Tensor, act: Tensor | None) -> None:
    """Write d_h [R_i, k*m] and act [R_i, m] of one segment, from h [R_i*m, k], d_act [R_i, m]."""
    if h.shape[1] == 1:
        h = h.view_as(d_act)
        d_h.copy_(torch.ops.aten.gelu_backward(d_act, h))
        if act is not None:
            act.copy_(F.gelu(h))
        return
    gate, up = map(_contiguous_copy, h.view(*d_act.shape, 2).unbind(-1))
    d_gate, d_up = d_h.view(*d_act.shape, 2).unbind(-1)
    silu = F.silu(gate)
    if act is not None:
        act.copy_(silu).mul_(up)
    d_up.copy_(silu.mul_(d_act))
    d_gate.copy_(torch.ops.aten.silu_backward(up.mul_(d_act), gate))


def _contiguous_copy(part: Tensor) -> Tensor:
    """Scratch to write to. Not .contiguous(): of a single pair that is the saved h itself."""
    return part.clone(memory_format=torch.contiguous_format)
