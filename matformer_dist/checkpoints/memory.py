"""Memory for one large tensor after the other.

Fresh memory comes from the system page by page, at several times the cost of what is copied into
it, where tensors are as large as a model's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FreshMemory:
    """Tensors of their own, which stay."""

    def take(
        self,
        use: str,  # noqa: ARG002
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """[*shape] of any content."""
        return torch.empty(*shape, dtype=dtype)


class ReusedMemory(FreshMemory):
    """Tensors that stay until the next is taken for the same use."""

    def __init__(self) -> None:
        self._bytes: dict[str, Tensor] = {}

    def take(self, use: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > len(self._bytes.get(use, ())):
            self.release(use)  # the old goes before the new comes
            self._bytes[use] = torch.empty(size, dtype=torch.uint8)
        return self._bytes[use][:size].view(dtype).view(*shape)

    def release(self, use: str, keep_bytes: int = 0) -> None:
        """Give memory of more than `keep_bytes` back."""
        if len(self._bytes.get(use, ())) > keep_bytes:
            del self._bytes[use]


FRESH = FreshMemory()
