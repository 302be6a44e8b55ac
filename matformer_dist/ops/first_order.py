"""Gradients that are made by hand have no derivatives of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a backward function raise RuntimeError where autograd would differentiate it again.

    torch's once_differentiable raises only where the upstream gradient needs a gradient itself;
    else a second derivative would lack this operator's part without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradients of matformer_dist's operators have no derivatives; call backward "
                "without create_graph"
            )
        return backward(ctx, *gradients)

    return checked
