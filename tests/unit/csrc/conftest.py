"""The emulated kernels, built once a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.csrc.emulated import Kernels, build


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    kernels = Kernels(build(tmp_path_factory.mktemp("emulated")))
    yield kernels
    kernels.close()
