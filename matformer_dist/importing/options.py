"""What a user may choose of an import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matformer_dist.errors import UserError

ORDERS = ("importance", "none")
_TEXT_KEY = "text"


@dataclass(frozen=True)
class ImportOptions:
    """`fractions`, `widths` and `names` are the nesting's.

    order        importance: neurons by falling importance; none: as they are in the checkpoint
    calibration  files or folders, of text or images, to measure importance on; without, weights
                 alone count

    Of a language model:

    calibration_tokens  of the text
    text_key     the key or column of calibration that holds the text
    tokenizer    another than the one beside the checkpoint, see load_tokenizer
    seq_len      training.seq_len, and the length of calibration's sequences

    Of a vision encoder:

    calibration_images  of the images
    classes      a classes.json, or the folder of one: names of the classes that the head has, or
                 that a checkpoint without one gets a fresh head for
    """

    fractions: Sequence[str] | None = None
    widths: Sequence[int] | None = None
    names: Sequence[str] | None = None
    order: str = "importance"
    calibration: Sequence[Path] = ()
    calibration_tokens: int | None = None  # 8192, where there is text
    text_key: str = _TEXT_KEY
    tokenizer: Path | None = None
    seq_len: int | None = None
    calibration_images: int | None = None  # 128, where there are images
    classes: Path | None = None

    def check(self) -> None:
        """UserError for what excludes each other, whatever the checkpoint."""
        if self.order not in ORDERS:
            raise UserError(f"--order {self.order!r} must be one of {', '.join(ORDERS)}")
        if self.order == "none" and self.calibration:
            raise UserError(
                "--order none keeps the checkpoint's order of neurons, so --calibration would "
                "change nothing; leave one of the two out"
            )
        for option, count, what in (
            ("--calibration-tokens", self.calibration_tokens, "text to take them from"),
            ("--calibration-images", self.calibration_images, "images to take them from"),
        ):
            if count is not None and not self.calibration:
                raise UserError(
                    f"{option} {count} needs {what}; give it by --calibration, or leave both out"
                )
        if self.fractions is not None and self.widths is not None:
            raise UserError("--fractions and --widths are both given; keep one")

    def check_task(self, directory: Path, task: str) -> None:
        """UserError where an option is for checkpoints of the other task."""
        of_text = {
            "--calibration-tokens": self.calibration_tokens,
            "--text-key": None if self.text_key == _TEXT_KEY else self.text_key,
            "--tokenizer": self.tokenizer,
            "--seq-len": self.seq_len,
        }
        of_images = {"--calibration-images": self.calibration_images, "--classes": self.classes}
        for option, value in (of_images if task == "language" else of_text).items():
            if value is not None:
                what = "a language model" if task == "language" else "a vision encoder"
                other = "vision encoders" if task == "language" else "language models"
                raise UserError(
                    f"{option} {value} is for {other}, and {directory} holds {what}; leave it out"
                )

    def nesting(self) -> Mapping[str, Any]:
        """The section of a run's settings."""
        chosen: dict[str, Any] = {
            "fractions": self.fractions if self.fractions is None else [*self.fractions],
            "widths": self.widths if self.widths is None else [*self.widths],
            "names": self.names if self.names is None else [*self.names],
        }
        if self.fractions is None and self.widths is None:
            chosen["fractions"] = ["1/8", "1/4", "1/2", 1]
        return chosen
