"""How many tokens of the loss over the head are done at once. No torch here."""

from __future__ import annotations

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Logits of one segment in one chunk. Not of all segments: the number of chunks, hence of
collectives, is that of a step of XL alone, whatever the number of granularities. A CPU wants them
near its caches; a GPU wants chunks so long that adding them to the weight's gradient, which moves
all of it each time, is little beside the GEMM."""


def default_chunk_tokens(local_vocab: int, device: str, itemsize: int = 4) -> int:
    """Most tokens of a chunk, for a weight of `local_vocab` rows and logits of `itemsize` bytes.

    The same on all ranks, whose weights have the same number of rows, padding included. device: a
    type, such as cuda.
    """
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return max(1, budget // (max(1, local_vocab) * itemsize))


def even_chunk_tokens(tokens: int, most: int) -> int:
    """Tokens of a chunk, at most `most`, so that all chunks of `tokens` are of about one size."""
    chunks = max(1, -(-tokens // most))
    return -(-tokens // chunks) or 1


def chunk_parts(tokens: int, chunk_tokens: int, halves: bool) -> list[list[slice]]:
    """The parts in which each chunk is worked through: itself, or its halves, so that what one of
    them waits for runs beside the other's work.
    """
    chunks = []
    for start in range(0, tokens, chunk_tokens):
        stop = min(start + chunk_tokens, tokens)
        middle = (start + stop + 1) // 2
        if halves and middle < stop:
            chunks.append([slice(start, middle), slice(middle, stop)])
        else:
            chunks.append([slice(start, stop)])
    return chunks
