"""Mix'n'Match on a trained run: what `matformer search` finds, against the paper's heuristic.

    python -m benchmarks.frontier --train         half an hour: launch/configs/stdlib.yaml first
    python -m benchmarks.frontier runs/stdlib [--batches 12]

The search chooses on the first sequences of the validation data. What it chose, and the heuristic's
submodel of each budget, are measured again on as many that it has not seen: only these tell whether
a choice was luck. Gains are nats a token below the heuristic's submodel within the same budget,
with 95% intervals of pairs. Then every Mix'n'Match submodel measured is held against the uniform
ones: is it below the narrower neighbour, and below the line between its neighbours? Prints tables,
and writes them as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.demo import SCRIPTS, prepare_corpus, show
from matformer_dist.evaluation.loss import measure_sequences
from matformer_dist.evaluation.measured import Measured, gain
from matformer_dist.evaluation.validation import Tokens, Validation
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.nesting import Submodel
from matformer_dist.parallel.topology import cpu_environment
from matformer_dist.report.inputs import read_run
from matformer_dist.report.machine import training_seconds
from matformer_dist.search.search import Options, search
from matformer_dist.submodels.slices import MeasuredSubmodel, Slices

CONFIG = Path("launch/configs/stdlib.yaml")
RANKS = 2


def train() -> Path:
    """The run of CONFIG, from nothing, or from where it was."""
    config = as_language(load_config(CONFIG), "the benchmark")
    prepare_corpus(Path(config.data.train[0][1]))
    command = [SCRIPTS / "deepspeed", "--quiet", "--num_gpus", RANKS, "launch/train.py"]
    show([*command, "--config", CONFIG], cpu_environment(RANKS))
    return config.run.dir


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--train", action="store_true", help=f"the run of {CONFIG} first")
    parser.add_argument("--batches", type=int, default=12, help="to choose on, and to judge on")
    parser.add_argument("--output", type=Path, default=RESULTS / "frontier.json")
    args = parser.parse_args()
    run = train() if args.train else args.run
    if run is None:
        parser.error("name a run, or --train one")
    has_screen = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if has_screen:
            print(f"\r{done}/{total} submodels", end="", file=sys.stderr)

    found = search(str(run), options=Options(batches=args.batches), progress=progress)
    loaded = load_language_model(run)
    unseen = unseen_half(loaded, args.batches)
    uniform = loaded.submodel.nesting.names
    chosen = (name for one in found.slices for name in (one.submodel, one.heuristic))
    notations = dict.fromkeys([*uniform, *chosen])
    judged = measure(loaded, unseen, [loaded.parse(name) for name in notations])
    unseen_losses = {name: judged[loaded.parse(name)].loss for name in uniform}
    rows = [_row(one, loaded, judged) for one in found.slices]
    print_slices(rows)
    print("unseen:", ", ".join(f"{name} {loss:.4f}" for name, loss in unseen_losses.items()))
    neighbours = _against_neighbours(found.all, loaded)
    print_neighbours(neighbours)
    trained = read_run(run)
    settings = {
        "config": trained.config.model_dump(mode="json", exclude={"run"}),
        "step": found.all.step,
        "trained_tokens": trained.last.units,
        "training_seconds": round(training_seconds(trained)),
        "measured_submodels": len(found.all.measured),
        "tokens_chosen_on": found.all.units,
        "tokens_judged_on": next(iter(judged.values())).predictions,
    }
    measured = [one.model_dump(include=_KEPT) for one in found.all.measured]
    write_result(
        args.output, "cpu", ("torch", "deepspeed"), settings, slices=rows, neighbours=neighbours,
        unseen_losses=unseen_losses, measured=measured,
    )  # fmt: skip


_KEPT = {"submodel", "parameters", "loss", "agreement", "kl"}


def unseen_half(loaded: LoadedLanguageModel, batches: int) -> Tokens:
    """As many validation sequences as were chosen on, those behind them."""
    config = as_language(load_config(loaded.directory / "config.yaml"), "the benchmark")
    both = Tokens.of(config, loaded.tokenizer, 2 * batches)
    half = len(both.tokens) // 2
    return Tokens(both.tokens[half:], both.targets[half:], both.micro_batch_size, 0)


@torch.no_grad()
def measure(
    loaded: LoadedLanguageModel, validation: Validation, submodels: Sequence[Submodel]
) -> dict[Submodel, Measured]:
    found = measure_sequences(
        loaded.run_pass,
        validation.micro_batches(torch.device("cpu")),
        submodels,
        loaded.submodel,
        per_pass=8,
    )
    return {one: Measured(sequences, 0) for one, sequences in found.items()}


def _row(one: Any, loaded: LoadedLanguageModel, judged: dict[Submodel, Measured]) -> dict[str, Any]:
    ours, other = judged[loaded.parse(one.submodel)], judged[loaded.parse(one.heuristic)]
    gained, interval = gain(ours, other)
    return {
        "budget": one.budget,
        "slice": one.submodel,
        "parameters": one.parameters,
        "heuristic": one.heuristic,
        "loss": one.loss,
        "gain": one.gain,
        "gain_interval": one.gain_interval,
        "unseen_loss": ours.loss,
        "unseen_gain": gained,
        "unseen_gain_interval": interval,
    }


def print_slices(rows: Sequence[dict[str, Any]]) -> None:
    print("\n| budget | slice | heuristic | loss | gain | unseen: loss | gain | 95% |")
    print("|---:|---|---|---:|---:|---:|---:|---|")
    for row in rows:
        low, high = row["unseen_gain_interval"]
        print(
            f"| {row['budget']:,.0f} | {row['slice']} | {row['heuristic']} | {row['loss']:.4f} "
            f"| {row['gain']:+.4f} | {row['unseen_loss']:.4f} | {row['unseen_gain']:+.4f} "
            f"| {low:+.4f} to {high:+.4f} |"
        )
    others = [row for row in rows if row["slice"] != row["heuristic"]]
    better = sum(row["unseen_gain_interval"][0] > 0 for row in others)
    worse = sum(row["unseen_gain_interval"][1] < 0 for row in others)
    print(
        f"\n{len(others)} of {len(rows)} slices are not the heuristic's; on unseen sequences "
        f"{better} of them are better than it (95%), {worse} worse"
    )


def _against_neighbours(slices: Slices, loaded: LoadedLanguageModel) -> dict[str, Any]:
    """Of all measured Mix'n'Match submodels: how many lie below their neighbours by size."""
    uniform = [one for one in slices.measured if loaded.parse(one.submodel).is_uniform]
    mixed = [one for one in slices.measured if one not in uniform]
    found: dict[str, Any] = {"mixed": len(mixed), "below_narrower": 0, "below_line": 0, "above": []}
    for one in mixed:
        narrow, wide = _around(uniform, one.parameters)
        share = (one.parameters - narrow.parameters) / (wide.parameters - narrow.parameters)
        found["below_narrower"] += one.loss <= narrow.loss
        found["below_line"] += one.loss <= narrow.loss + share * (wide.loss - narrow.loss)
        if one.loss > narrow.loss:
            found["above"].append(one.submodel)
    return found


def _around(
    uniform: Sequence[MeasuredSubmodel], parameters: int
) -> tuple[MeasuredSubmodel, MeasuredSubmodel]:
    return next(pair for pair in pairwise(uniform) if parameters <= pair[1].parameters)


def print_neighbours(found: dict[str, Any]) -> None:
    print(
        f"{found['mixed']} Mix'n'Match submodels: {found['below_narrower']} at or below the "
        f"uniform submodel that is narrower, {found['below_line']} at or below the line between "
        f"neighbours; above the narrower one: {', '.join(found['above']) or 'none'}"
    )


if __name__ == "__main__":
    main()
