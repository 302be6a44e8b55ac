"""The import rule: read from the syntax trees, so that no import of a heavy library is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "matformer_dist"

BOTTOM = (
    "errors", "units", "nesting", "config", "config_language", "config_images", "config_vision",
    "config_file", "counting", "chunks", "planning", "deepspeed_section", "run_directory",
)  # fmt: skip
COMMANDS = (
    "checkpoints",
    "data",
    "submodels",
    "importing",
    "inference",
    "evaluation",
    "search",
    "report",
)
MAY_IMPORT: dict[str, set[str]] = {  # a part of the package: the other parts that it may import
    "__init__": set(),
    **{part: set(BOTTOM[:i]) for i, part in enumerate(BOTTOM)},  # each those before it
    "ops": {*BOTTOM},
    "parallel": {*BOTTOM},
    "data": {*BOTTOM, "parallel"},
    "models": {*BOTTOM, "ops", "parallel"},
    "checkpoints": {*BOTTOM, "parallel", "models"},
    "submodels": {*BOTTOM, "parallel", "data", "models", "checkpoints"},
    "importing": {*BOTTOM, "parallel", "data", "models", "checkpoints"},
    "inference": {*BOTTOM, "parallel", "data", "models", "checkpoints", "submodels"},
    "evaluation": {*BOTTOM, "data", "models", "checkpoints", "submodels", "inference"},
    "search": {*BOTTOM, "data", "models", "checkpoints", "submodels", "inference", "evaluation"},
    "report": {*BOTTOM, "submodels"},
    "training": {*BOTTOM, "ops", "parallel", "data", "models", "checkpoints", "evaluation"},
    "doctor": {*BOTTOM, "ops", "parallel"},
    "cli": {*BOTTOM, *COMMANDS, "doctor"},
    "demo": {*BOTTOM, "parallel", "inference", "evaluation"},
    "demo_vision": {*BOTTOM, "parallel", "demo"},
}
ONLY_IN = {  # a library: the files or folders that alone may import it
    "deepspeed": ("training/engine.py", "deepspeed_section.py", "checkpoints/universal_files.py"),
    "megatron": ("parallel/", "data/"),
    "transformers": ("submodels/shipped_code/", "inference/transformers_model.py"),
    "gguf": ("submodels/gguf_files.py",),
    "faiss": ("evaluation/neighbours.py",),
    "tokenizers": ("data/huggingface_tokenizer.py",),
    "lm_eval": ("evaluation/downstream/",),
    "datasets": ("evaluation/downstream/",),
    "huggingface_hub": ("evaluation/downstream/",),
    "sklearn": ("data/images/digits.py",),
    "launch": (),
}
NOT_IN = {
    "torch": {*BOTTOM, "report"},
    "torch.distributed": {"ops"},
}  # a library: parts that do without it
READS_ENVIRONMENT = "parallel/topology.py"
ENVIRONMENT = {f"os.{name}" for name in ("environ", "environb", "getenv", "getenvb")}


def violations(package: Path) -> list[str]:
    """One line for every import or use that breaks the rule, as `file:line: what is wrong`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        part = file.removesuffix(".py").split("/")[0]
        if part not in MAY_IMPORT:
            found.append(f"{file}: {part} is new; give it a place in MAY_IMPORT")
            continue
        tree = ast.parse(path.read_text(), file)
        for line, name in [*_imports(tree, package.name, file), *_members_of_os(tree)]:
            fault = _fault(name, package.name, file, part)
            if fault:
                found.append(f"{file}:{line}: {fault}")
    return found


def _fault(name: str, package: str, file: str, part: str) -> str:
    """What is wrong with `file` of `part` using the dotted `name`; empty if nothing is."""
    if name in ENVIRONMENT and file != READS_ENVIRONMENT:
        return f"{name} is for {READS_ENVIRONMENT} and launch/ only"
    if _within(name, package) and name != package:
        other = name.split(".")[1]
        if other != part and other not in MAY_IMPORT[part]:
            return f"{part} may not import {other}"
    for library, places in ONLY_IN.items():
        if _within(name, library) and not file.startswith(places):
            return f"{library} is for {' and '.join(places) or 'nobody to import'}"
    for library, parts in NOT_IN.items():
        if _within(name, library) and part in parts:
            return f"{part} may not import {library}"
    return ""


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _imports(tree: ast.Module, package: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported, inside functions too."""
    folders = [package, *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def _members_of_os(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every attribute that is read of the module os."""
    aliases = {
        alias.asname or "os"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os" or (alias.name.startswith("os.") and not alias.asname)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
            yield node.lineno, f"os.{node.attr}"


def test_imports_of_the_package_match_the_rule() -> None:
    assert (PACKAGE / "training" / "engine.py").exists()
    assert violations(PACKAGE) == []


def test_the_rule_points_down() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError
    on_top = {part for part, below in MAY_IMPORT.items() if below & {"cli", "demo", "demo_vision"}}
    assert on_top == {"demo_vision"}  # which shares the demo's way to show commands


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("nesting.py", "import torch", "nesting may not import torch"),
        ("errors.py", "import torch.nn as nn", "errors may not import torch"),
        ("config.py", "from .ops import nested_ffn", "config may not import ops"),
        ("data/text.py", "from matformer_dist.models import matlm", "data may not import models"),
        ("parallel/x.py", "from ..data.datasets import x", "parallel may not import data"),
        ("nesting.py", "from matformer_dist.config import y", "nesting may not import config"),
        ("submodels/x.py", "from .. import inference", "submodels may not import inference"),
        ("submodels/x.py", "from ..report import page", "submodels may not import report"),
        ("importing/x.py", "from ..submodels import x", "importing may not import submodels"),
        ("submodels/x.py", "from transformers import LlamaConfig", "transformers is for submodels"),
        ("submodels/gguf_format.py", "def f():\n  import gguf", "gguf is for submodels/gguf_files"),
        ("inference/x.py", "import matformer_dist.evaluation", "inference may not import evalu"),
        ("evaluation/x.py", "from ..training import loop", "evaluation may not import training"),
        ("report/page.py", "from ..evaluation.run import x", "report may not import evaluation"),
        ("report/page.py", "import torch", "report may not import torch"),
        ("training/loop.py", "from ..report import page", "training may not import report"),
        ("cli.py", "from . import demo", "cli may not import demo"),
        ("ops/loss.py", "import torch.distributed as dist", "ops may not import torch.distributed"),
        ("ops/loss.py", "from torch import distributed", "ops may not import torch.distributed"),
        (
            "ops/loss.py",
            "def f():\n  import matformer_dist.parallel",
            "ops may not import parallel",
        ),
        ("ops/loss.py", "import megatron.core", "megatron is for parallel/ and data/"),
        ("parallel/x.py", "from matformer_dist.models import y", "parallel may not import models"),
        ("models/x.py", "import matformer_dist.training.loop", "models may not import training"),
        ("training/loop.py", "from matformer_dist import cli", "training may not import cli"),
        ("training/loop.py", "import deepspeed", "deepspeed is for training/engine.py"),
        ("training/loop.py", "import os\nos.getenv('A')", "os.getenv is for"),
        ("training/loop.py", "import os.path\nos.environ['A']", "os.environ is for"),
        ("training/loop.py", "import os as o\no.environ", "os.environ is for"),
        ("training/loop.py", "from os import environ", "os.environ is for"),
        ("cli.py", "from launch.train import main", "launch is for nobody"),
        ("cli.py", "import deepspeed.comm", "deepspeed is for training/engine.py"),
        ("evaluation/run.py", "def f():\n  import faiss", "faiss is for evaluation/neighbours.py"),
        ("utils.py", "", "utils is new"),
    ],
)
def test_a_break_of_the_rule_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    _write(tmp_path / PACKAGE.name / file, source)
    found = violations(tmp_path / PACKAGE.name)
    assert len(found) == 1
    assert found[0].startswith(file)
    assert fault in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", ""),
        ("counting.py", "from matformer_dist.config import ModelConfig"),
        ("ops/loss.py", "import torch\nfrom . import reference\nimport matformer_dist"),
        ("models/matlm.py", "from ..ops.loss import x\nfrom matformer_dist.parallel import y"),
        ("data/text.py", "from ..parallel.topology import x"),
        ("parallel/topology.py", "import os\nfrom megatron.core import z\nos.environ.get('RANK')"),
        ("training/engine.py", "import deepspeed\nimport torch.distributed"),
        ("report/page.py", "import os\nos.replace('a', 'b')\nfrom jinja2 import environment"),
        ("cli.py", "from matformer_dist.evaluation.run import evaluate"),
    ],
)
def test_what_keeps_the_rule_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    _write(tmp_path / PACKAGE.name / file, source)
    assert violations(tmp_path / PACKAGE.name) == []


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(source)
