"""How important each neuron of an FFN is, and the neurons in that order.

Legend: F neurons, D d_model, k input vectors of a neuron, a_j(x) the activation of neuron j:
silu(gate_j x) up_j x (k = 2), or gelu(up_j x + b_j) (k = 1). x is a row: of a token, or of a
patch of an image.

Neuron j adds a_j(x) w_out_j to the residual stream, so

    activation   mean over rows of |a_j(x)|, times |w_out_j|: the mean length of what it adds
    magnitude    |gate_j| |up_j| |w_out_j|, or |up_j| |w_out_j|: that length where nothing is known
                 of x, but for a factor. With gates it does not change where up_j is doubled and
                 w_out_j halved, nor does what the neuron computes. Of b_j it knows nothing: a
                 neuron that a large negative one silences may stand far in front

Pruning by mean absolute activations over a small calibration set is Minitron's (Muralidharan et
al., arXiv 2407.14679); times the norm of the weights that read them, it is Wanda's
(Sun et al., arXiv 2306.11695) summed over a neuron, as for gated FFNs in DaSS (Guo et al.,
arXiv 2405.01943). The mean of |a|, not of a squared, because a few tokens of a Llama, the first
above all, have huge activations in a few neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(w_in: Tensor, w_out: Tensor) -> Tensor:
    """[F] from w_in [F, k * D] and w_out [F, D]."""
    inputs = w_in.unflatten(1, (-1, w_out.shape[1])).norm(dim=2)  # [F, k]
    return inputs.prod(dim=1) * w_out.norm(dim=1)


def activation_weighted(mean_activation: Tensor, w_out: Tensor) -> Tensor:
    """[F] from the means [F] of |a_j| over rows, and w_out [F, D]."""
    return mean_activation * w_out.norm(dim=1)


def falling(importance: Tensor) -> Tensor:
    """Neurons [F], the most important first; equal ones stay in their order."""
    return torch.argsort(importance, descending=True, stable=True)
