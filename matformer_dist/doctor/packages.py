"""What is installed, against the versions that the tests are run with."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from matformer_dist.doctor.finding import Finding, failure, note

# What the tests are run with. constraints.txt installs these; a test compares the two.
TESTED: dict[str, tuple[str, ...]] = {
    "torch": ("2.13.0",),
    "deepspeed": ("0.19.8",),
    "megatron-core": ("0.16.1",),
    "transformers": ("5.20.2", "5.23.0"),  # of Python 3.10, of later ones
    "numpy": ("2.2.6", "2.4.6"),  # likewise
}
TESTED_PYTHON = ("3.10", "3.11", "3.12", "3.13")
_OPTIONAL = ("transformers", "triton", "wandb")  # commands that need one say so


def packages() -> Iterator[Finding]:
    """Each against the versions that the tests have been run with, and those that are allowed."""
    python = platform.python_version()
    if python.rpartition(".")[0] not in TESTED_PYTHON:
        yield note(
            "Python",
            f"{python}, not tested",
            f"Python {python} is not tested; tested are {', '.join(TESTED_PYTHON)}",
        )
    yield Finding("matformer-dist", _version("matformer-dist") or "not installed, run from source")
    for package in (*TESTED, "triton", "wandb"):
        yield package_finding(package, _version(package), _allowed(package))


def package_finding(package: str, found: str, allowed: str) -> Finding:
    """allowed: the range of pyproject.toml, such as `<2.16,>=2.11`; empty if it has none."""
    tested = TESTED.get(package, ())
    wanted = f"{package}=={tested[-1]}" if tested else package
    if not found:
        if package in _OPTIONAL:
            return Finding(package, "not installed (optional)")
        return failure(package, "not installed", f"{package} is missing: pip install {wanted}")
    if not tested:
        return Finding(package, found)
    public = Version(found).public  # 2.13.0 of 2.13.0+cu130
    if public in tested:
        return Finding(package, f"{found}, tested")
    text = f"{found}, not tested; tested: {', '.join(tested)}"
    if allowed and not Requirement(f"{package}{allowed}").specifier.contains(public, True):
        return failure(
            package,
            text,
            f"{package} {found} is outside of {allowed}, which is what works: pip install {wanted}",
        )
    return note(
        package,
        text,
        f"{package} {found} is not a version that the tests are run with "
        f"({', '.join(tested)}): if something fails, try pip install {wanted}",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _allowed(package: str) -> str:
    try:
        needs = [Requirement(text) for text in requires("matformer-dist") or ()]
    except PackageNotFoundError:
        return ""
    return next((str(need.specifier) for need in needs if need.name == package), "")
