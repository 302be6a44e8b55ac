"""Models in memory, and which submodels they can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from matformer_dist.data.labels import Labels, load_labels
from matformer_dist.errors import UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matformer import MatFormer
from matformer_dist.nesting import Submodel, SubmodelKind, mix_n_match
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

    def selection(
        self, notations: Sequence[str] = (), heuristic: bool = False
    ) -> dict[Submodel, SubmodelKind]:
        """What is looked at, and why: the usual ones, those asked for, and if `heuristic` those of
        the paper's Mix'n'Match that it holds.

        UserError for a notation as in `parse`, or where it holds one submodel alone.
        """
        chosen: dict[Submodel, SubmodelKind] = {
            one: "uniform" if one.is_uniform else "mix" for one in self.usual()
        }
        for notation in notations:
            chosen.setdefault(self.parse(notation), "mix")
        if heuristic:
            if not self.nested:
                raise UserError(
                    f"{self.directory} is {self.submodel} alone; leave --heuristic out, or "
                    "evaluate the run, a native model or one of format hf --nested"
                )
            for submodel in mix_n_match(self.submodel.nesting, len(self.submodel)):
                if self.holds(submodel):
                    chosen.setdefault(submodel, "heuristic")
        return chosen

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


@dataclass(frozen=True)
class LoadedModel(HoldsSubmodels):
    """Of any task, our own; loading.py makes them."""

    model: MatFormer
    submodel: Submodel
    directory: Path
    step: int | None = None  # of the run
    checkpoint_sha256: str | None = None

    @cached_property
    def labels(self) -> Labels:
        """UserError where their files are gone."""
        return load_labels(self.directory, self.model.model)

    def run_pass(self, inputs: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        """Statistics of a pass over inputs [b, ...], targets; see MatFormer.forward."""
        statistics: Tensor = self.model(inputs, targets, plan)[1]
        return statistics
