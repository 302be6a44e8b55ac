"""Which submodels a model in memory can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matformer_dist.errors import UserError
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.slices import find_submodel


class HoldsSubmodels:
    """`submodel` is all of a model's weights; if `nested`, those that are nowhere wider run too."""

    submodel: Submodel
    directory: Path  # of the run or the extracted model
    checkpoint_sha256: str | None = None  # of the manifest; None: extracted
    nested: bool = True

    def holds(self, submodel: Submodel) -> bool:
        """Whether it can run. Of the same nesting, or of one that was cut out of it."""
        pairs = list(zip(submodel.widths, self.submodel.widths, strict=True))
        return all(a <= b if self.nested else a == b for a, b in pairs)

    def usual(self) -> list[Submodel]:
        """What is looked at where nothing is named: uniform submodels and all of it, smallest
        first.
        """
        uniforms = self.submodel.nesting.uniforms(len(self.submodel))[::-1]
        return list(dict.fromkeys([*filter(self.holds, uniforms), self.submodel]))

    def parse(self, notation: str | Sequence[str]) -> Submodel:
        """The submodel of that notation, or of that name in the run's slices.json; or of a list of
        granularities, one a layer.

        UserError where there is none, or the model does not hold it.
        """
        if not isinstance(notation, str):
            notation = ",".join(notation)
        nesting, layers = self.submodel.nesting, len(self.submodel)
        found = find_submodel(notation, nesting, layers, self.directory, self.checkpoint_sha256)
        if self.holds(found):
            return found
        if self.nested:
            raise UserError(
                f"submodel {notation!r} is wider than {self.directory}, which holds "
                f"{self.submodel}; choose one that is nowhere wider, or load the run"
            )
        raise UserError(
            f"submodel {notation!r} is not in {self.directory}, which is {self.submodel} alone; "
            "leave it out, or give the run, a native model or one of format hf --nested"
        )
