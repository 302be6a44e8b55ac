"""What the commands share: the application, its screen, and lists in options."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from matformer_dist.errors import UserError

app = typer.Typer(
    help="Train nested Transformers and take submodels out of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)


def print_wide(part: RenderableType, width: int = 160) -> None:
    """As wide as its tables are: a number is never cut, in a pipe or a narrow window."""
    Console(highlight=False, soft_wrap=True, width=max(out.width, width)).print(part)


def number(value: float, format: str) -> str:
    """ "–" where there is none."""
    return "–" if isnan(value) else f"{value:{format}}"


def interval_text(ends: tuple[float, float]) -> str:
    """ "2.3101 to 2.3344"; "–" where one sequence alone was measured."""
    return "–" if isnan(ends[0]) else f"{ends[0]:.4f} to {ends[1]:.4f}"


DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; else the GPU, if there is one.")
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN[@STEP]", help="Run directory; its newest step if none is named."),
]


def items(option: str, text: str | None) -> list[str] | None:
    """The items of a list such as S,M,L; None where the option is not given."""
    if text is None:
        return None
    found = [item.strip() for item in text.split(",")]
    if not all(found):
        raise UserError(f"{option} {text!r} must be items with commas between them")
    return found


def whole_numbers(option: str, text: str | None) -> list[int] | None:
    found = items(option, text)
    if found is None:
        return None
    try:
        return [int(item) for item in found]
    except ValueError:
        raise UserError(
            f"{option} {text!r} must be whole numbers with commas between them, such as 256,1024"
        ) from None


def leave_out(options: Mapping[str, object], why: str) -> None:
    """UserError for the first of them that is given."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"{name} {why}")
