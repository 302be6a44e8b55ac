"""Submodels measured on validation data, each once: what is known lies in RUN/measurements/.

A file there is of one checkpoint and one set of sequences, which its name is a digest of. A line is
a submodel's sums over each sequence. It is written as soon as it is known, so a search that was
broken off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from matformer_dist.errors import UserError
from matformer_dist.evaluation.loss import measure_sequences, sparing
from matformer_dist.evaluation.measured import Measured
from matformer_dist.evaluation.validation import Validation
from matformer_dist.inference.held import LoadedModel
from matformer_dist.nesting import Submodel

FOLDER = "measurements"
_AT_ONCE = 8  # submodels of a pass beside XL, and of what a kill loses
_COLUMNS = ("nll", "agreed", "kl", "tokens", "correct")


class Measurements(Mapping[Submodel, Measured]):
    """Of one model on one set of sequences; `measure` adds to them."""

    def __init__(self, loaded: LoadedModel, validation: Validation, checkpoint_sha256: str) -> None:
        self.loaded = loaded
        self.validation = validation
        self.checkpoint_sha256 = checkpoint_sha256
        decides = f"{checkpoint_sha256} {validation.digest}"
        name = hashlib.sha256(decides.encode()).hexdigest()[:16]
        self.path = loaded.directory / FOLDER / f"{name}.jsonl"
        self._found = dict(self._read())
        self._run_pass = sparing(loaded.run_pass)
        self.new = 0  # measured here, not read

    def __getitem__(self, submodel: Submodel) -> Measured:
        return self._found[submodel]

    def __iter__(self) -> Iterator[Submodel]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def losses(self) -> dict[Submodel, float]:
        return {submodel: measured.loss for submodel, measured in self._found.items()}

    def missing(self, wanted: Iterable[Submodel]) -> list[Submodel]:
        return [one for one in dict.fromkeys(wanted) if one not in self._found]

    def measure(self, wanted: Iterable[Submodel], advance: Callable[[int], object]) -> None:
        """Measure those that are not known yet; `advance` is told how many became known."""
        wanted = list(dict.fromkeys(wanted))
        missing = self.missing(wanted)
        advance(len(wanted) - len(missing))
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            self._add(part)
            advance(len(part))

    @torch.no_grad()
    def _add(self, submodels: list[Submodel]) -> None:
        found = measure_sequences(
            self._run_pass,
            self.validation.micro_batches(self.loaded.model.device),
            submodels,
            self.loaded.submodel,
            per_pass=_AT_ONCE + 1,
        )
        for submodel, sequences in found.items():
            if not sequences.isfinite().all():
                raise UserError(
                    f"the validation loss of {submodel} is not finite, and a search compares "
                    f"losses; search an earlier step, as {self.loaded.directory}@STEP"
                )
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            for submodel, sequences in found.items():
                columns = sequences.cpu().T.tolist()
                line = {"submodel": str(submodel), **dict(zip(_COLUMNS, columns, strict=True))}
                file.write(f"\n{json.dumps(line)}")  # a line that a kill cut short stays alone
                self._found[submodel] = Measured(sequences.cpu(), self.validation.text_bytes)
        self.new += len(submodels)

    def _read(self) -> Iterator[tuple[Submodel, Measured]]:
        """A damaged line, such as one that a kill cut short, is passed over, and measured again; so
        is one of an earlier version, which lacks a column.
        """
        if not self.path.exists():
            return
        nesting, layers = self.loaded.submodel.nesting, self.loaded.model.model.n_layers
        for text in self.path.read_bytes().splitlines():
            try:
                line = json.loads(text)
                submodel = nesting.parse(str(line["submodel"]), layers)
                sums = torch.tensor([line[name] for name in _COLUMNS], dtype=torch.float64).T
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            shape = (self.validation.samples, len(_COLUMNS))
            if sums.shape == shape and sums.isfinite().all():
                yield submodel, Measured(sums.contiguous(), self.validation.text_bytes)
