"""The commands that the page tells its reader, quoted for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from matformer_dist.report.inputs import Run
from matformer_dist.submodels.formats import directory_name, usual_format


def extract_command(run: Run, submodel: str) -> str:
    """The command that writes this submodel as a model of its own."""
    kind = usual_format(run.config.model)
    words = ["matformer", "extract", str(run.directory), "--submodel", submodel]
    words += ["--format", kind, "--output", str(_extracted_to(run, submodel))]
    return shlex.join(words)


def _extracted_to(run: Run, submodel: str) -> Path:
    return run.directory / "submodels" / directory_name(submodel)


def commands(run: Run) -> dict[str, str]:
    """What to run where a section has nothing to show."""
    one = run.nesting.names[max(0, len(run.nesting) - 2)]
    model = run.extracted[0][0] if run.extracted else _extracted_to(run, one)
    directory = str(run.directory)
    of_task = (
        {"retrieval": ["retrieve", directory]}
        if run.is_vision
        else {
            "speculative": ["speculate", directory],
            "downstream": ["evaluate", directory, "--tasks", "stdlib"],
            "samples": ["generate", str(model)],
        }
    )
    words = {
        "evaluation": ["evaluate", directory],
        "search": ["search", directory],
        "report": ["report", directory],
        **of_task,
    }
    lines = {name: shlex.join(["matformer", *of]) for name, of in words.items()}
    return {**lines, "extracted": extract_command(run, one)}
