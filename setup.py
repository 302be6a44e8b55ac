"""Build of what is not Python; name, version and requirements stand in pyproject.toml."""

from __future__ import annotations

from setuptools import setup

setup()
