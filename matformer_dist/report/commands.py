"""The commands that the page tells its reader, quoted for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from matformer_dist.report.inputs import Run
from matformer_dist.submodels.formats import directory_name, has_transformers_architecture


def extract_command(run: Run, submodel: str) -> str:
    """The command that writes this submodel as a model of its own."""
    kind = "hf" if has_transformers_architecture(run.config.model) else "native"
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
    return {
        "evaluation": shlex.join(["matformer", "evaluate", directory]),
        "search": shlex.join(["matformer", "search", directory]),
        "speculative": shlex.join(["matformer", "speculate", directory]),
        "downstream": shlex.join(["matformer", "evaluate", directory, "--tasks", "stdlib"]),
        "extracted": extract_command(run, one),
        "samples": shlex.join(["matformer", "generate", str(model)]),
        "report": shlex.join(["matformer", "report", directory]),
    }
