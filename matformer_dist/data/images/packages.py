"""What reading images needs beyond the package's own dependencies."""

from __future__ import annotations

import importlib

from matformer_dist.errors import UserError


def need_package(module: str, package: str, purpose: str) -> None:
    """UserError unless `module`, of `package`, can be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} need {package} ({error}); install it by `pip install "
            "'matformer-dist[vision]'`"
        ) from None


def need_pillow() -> None:
    need_package("PIL.Image", "Pillow", "images")
