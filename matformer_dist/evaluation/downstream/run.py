"""`matformer evaluate --tasks`: lm-eval's tasks at submodels of one model, loaded once."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matformer_dist.checkpoints.files import check_output, replace_json
from matformer_dist.errors import UserError
from matformer_dist.evaluation.downstream.quiet import quiet
from matformer_dist.inference.device import choose_device
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.entry import is_extracted, read_entry

if TYPE_CHECKING:
    from matformer_dist.evaluation.downstream.task_loading import LoadedTasks

FILE = "downstream.json"
AVERAGE = "average"
_SEED = 1234  # lm-eval's own, of the examples that few-shot prompts show
_LIBRARIES = ("lm_eval", "datasets", "torch")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DownstreamEvaluation:
    """What downstream.json holds; see `evaluate_tasks`."""

    content: dict[str, Any]
    file: Path | None  # where it was written

    @property
    def submodels(self) -> list[str]:
        return list(self.content["submodels"])

    def rows(self) -> list[tuple[str, str, list[str]]]:
        """Task or group, metric, and its values at each submodel, as people read them."""
        rows = []
        for name, one in [*self.content["tasks"].items(), *self.content["groups"].items()]:
            results = one["results"]
            for metric in results[self.submodels[0]]:
                values = [_shown(**results[submodel][metric]) for submodel in self.submodels]
                rows.append((name, metric, values))
        return rows

    def notes(self) -> list[str]:
        """What there is to know beside the numbers, a line each."""
        missing, cut = self.content["missing"], self.content["truncated_requests"]
        listed = "; ".join(f"{name} ({why})" for name, why in missing.items())
        lines = [f"no data, so no mean over its group either: {listed}"] if listed else []
        if cut:
            lines.append(
                f"{cut:,} of {self.content['requests']:,} requests were longer than the model's "
                "context, and cut on the left"
            )
        lines.append(f"written to {self.file}" if self.file else "not written: give --output")
        return lines


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    notations: Sequence[str] = (),
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include: Path | None = None,
    batch_size: int | None = None,
    skip_missing: bool = False,
    storycloze: Path | None = None,
    output: Path | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> DownstreamEvaluation:
    """Tasks of lm-eval at each submodel of RUN[@STEP] or of an extracted `native` model.

    Without `notations` at every granularity that the model holds throughout, and at all of it.
    `limit` documents of each task; `num_fewshot` examples, where a task does not insist on none.
    Writes `output`, for a run RUN/downstream.json if it is left out. `progress` is called with what
    is being done, and requests done and in all. UserError for a model, submodels or tasks that do
    not fit, tasks whose data cannot be had (see load_tasks), and where lm-eval is missing.
    """
    try:
        with quiet():
            import lm_eval  # noqa: F401

            from matformer_dist.evaluation.downstream import adapter, task_loading
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval ({error}); install it by `pip install matformer-dist[eval]`"
        ) from None
    check_output(output)
    kind = read_entry(Path(source))["format"] if is_extracted(Path(source)) else "run"
    if kind not in ("run", "native"):
        raise UserError(
            f"{source} is in format {kind}; give --tasks the run or a native model"
            + (", or run lm-eval's own model hf on it" if kind == "hf" else "")
        )
    where = choose_device(device)
    loaded = load_language_model(source, torch.float32 if where.type == "cpu" else None, where)
    submodels = [loaded.parse(text) for text in notations] or loaded.usual()
    progress("loading tasks", 0, 0)
    with quiet():
        chosen = task_loading.load_tasks(
            tasks,
            include=include,
            metadata={"storycloze_dir": str(storycloze)} if storycloze else None,
            skip_missing=skip_missing,
        )
        _set_fewshot(chosen, num_fewshot)
        _check_generation(chosen, loaded.model.model.max_seq_len)
        content = _begin(loaded, chosen, submodels, limit)
        for submodel in submodels:
            lm = adapter.MatformerLM(
                loaded,
                submodel,
                batch_size or adapter.BATCH_SIZE,
                on_progress=partial(_report, progress, submodel),
            )
            _add(content, chosen, str(submodel), _run(lm, chosen, limit))
            content["requests"], content["truncated_requests"] = lm.requests, lm.truncated
    file = output or (loaded.directory / FILE if loaded.step is not None else None)
    if file:
        replace_json(file, content)
    return DownstreamEvaluation(content, file)


def _report(progress: Progress, submodel: Submodel, kind: str, done: int, total: int) -> None:
    progress(f"{submodel}: {kind}", done, total)


def _set_fewshot(chosen: LoadedTasks, num_fewshot: int | None) -> None:
    """As lm-eval does it: a task that says 0 keeps it, one that says nothing has 0."""
    for task in chosen.tasks.values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif own is None:
            task.set_config("num_fewshot", 0)


def _check_generation(chosen: LoadedTasks, context: int) -> None:
    """What cannot be generated is said before anything runs."""
    from matformer_dist.evaluation.downstream.continuation import Continuation

    for name, task in chosen.tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                Continuation.of(task.get_config("generation_kwargs"), context)
            except UserError as error:
                raise UserError(f"task {name}: {error}") from None


def _run(lm: Any, chosen: LoadedTasks, limit: int | None) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    from matformer_dist.evaluation.downstream import bootstrap

    for task in chosen.tasks.values():
        task.set_fewshot_seed(_SEED)  # the same examples at every submodel
    with bootstrap.in_this_process():
        results = evaluate(
            lm,
            {"tasks": chosen.tasks, "groups": chosen.groups},
            limit=limit,
            bootstrap_iters=bootstrap.RESAMPLES,
            log_samples=False,
        )
    assert results is not None
    return results


def _begin(
    loaded: LoadedLanguageModel,
    chosen: LoadedTasks,
    submodels: Sequence[Submodel],
    limit: int | None,
) -> dict[str, Any]:
    return {
        "step": loaded.step,
        "submodels": list(map(str, submodels)),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "limit": limit,
        "fewshot_seed": _SEED,
        "tasks": {},
        "groups": {},
        "missing": chosen.missing,
    }


def _add(
    content: dict[str, Any], chosen: LoadedTasks, submodel: str, results: Mapping[str, Any]
) -> None:
    for name, task in chosen.tasks.items():
        entry = content["tasks"].setdefault(
            name,
            {
                "version": results["versions"].get(name),
                "num_fewshot": results["n-shot"].get(name),
                "documents": results["n-samples"][name]["effective"],
                "requests_sha256": _digest(task),
                "results": {},
            },
        )
        entry["results"][submodel] = _metrics(results["results"][name])
    for name, group in chosen.groups.items():
        metrics = _metrics(results["results"].get(name, {}))
        if wanted := (group.metadata or {}).get("metrics"):
            of = {task: content["tasks"][task]["results"][submodel] for task in wanted}
            metrics[AVERAGE] = _mean([of[task][key] for task, key in wanted.items()])
        if metrics:
            content["groups"].setdefault(name, {"results": {}})["results"][submodel] = metrics


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one entry; other filters stay in the name."""
    found = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, float | int) else None,
        }
    return found


def _mean(entries: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of independent values, each counting alike."""
    values = [entry["value"] or 0.0 for entry in entries]
    errors = [entry["stderr"] for entry in entries]
    known = [error for error in errors if error is not None]
    complete = len(known) == len(errors)
    return {
        "value": sum(values) / len(values),
        "stderr": math.hypot(*known) / len(known) if complete else None,
    }


def _digest(task: Any) -> str:
    """Of all that was asked: data, prompts and examples in one number."""
    asked = [[one.request_type, one.args] for one in task.instances]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


def _shown(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" if stderr is None else f"{value:.4g} ± {stderr:.2g}"
