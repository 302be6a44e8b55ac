"""lm-eval and what it stands on talk much; here they do so to nobody."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

_TALKATIVE = ("lm_eval", "datasets", "huggingface_hub", "evaluate", "transformers", "filelock")


@contextmanager
def quiet() -> Iterator[None]:
    """Without prints, bars, warnings and logs below errors. Exceptions come through."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    with ExitStack() as stack:
        sink = io.StringIO()
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.ERROR)
            stack.callback(logging.getLogger(name).setLevel, level)
        yield
