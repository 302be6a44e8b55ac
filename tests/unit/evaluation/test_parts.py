"""Parts of an evaluation: all submodels once, joined by the last, whichever that is."""

from __future__ import annotations

import multiprocessing
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.errors import UserError
from matformer_dist.evaluation.parts import FOLDER, Part, join
from matformer_dist.nesting import Nesting, Submodel, mix_n_match

NESTING = Nesting.from_fractions(64, ["1/8", "1/4", "1/2", "1"], ["S", "M", "L", "XL"])
WHOLE = {"step": 5}


def chosen() -> dict[Submodel, str]:
    return dict.fromkeys(mix_n_match(NESTING, 2), "heuristic")


@pytest.mark.parametrize("of", [1, 2, 3])
def test_parts_match_the_whole(of: int) -> None:
    parts = [Part(number, of).take(chosen()) for number in range(1, of + 1)]
    assert sorted(str(s) for part in parts for s in part) == sorted(map(str, chosen()))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/2", "1/", "-1/2", "1/" + 5000 * "9"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N"):
        Part.parse(text)


def test_more_parts_than_submodels_are_refused() -> None:
    of = len(chosen()) + 1
    with pytest.raises(UserError, match=f"among {of - 1} parts at most"):
        Part.parse(f"1/{of}").take(chosen())


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_the_last_part_joins_all(tmp_path: Path, order: tuple[int, ...]) -> None:
    other = {"step": 6}
    assert join(tmp_path, Part(1, 2), other, [{"of": "another"}]) is None
    assert join(tmp_path, Part(order[0], 3), WHOLE, [{"n": -1}]) is None  # called twice
    found = [join(tmp_path, Part(n, 3), WHOLE, [{"n": n}]) for n in order]
    assert found == [None, None, [{"n": 1}, {"n": 2}, {"n": 3}]]
    assert [path.name.split("-", 1)[1] for path in (tmp_path / FOLDER).iterdir()] == ["1-of-2.json"]
    assert join(tmp_path, Part(2, 2), other, []) == [{"of": "another"}]
    assert not (tmp_path / FOLDER).exists()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    join(tmp_path, Part(1, 2), WHOLE, [{"n": 1}])
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_text(file.read_text()[:3])
    with pytest.raises(UserError, match=r"1-of-2\.json is damaged .*; delete it, and run the part"):
        join(tmp_path, Part(2, 2), WHOLE, [{"n": 2}])
    assert join(tmp_path, Part(1, 2), WHOLE, [{"n": 1}]) == [{"n": 1}, {"n": 2}]


def test_parts_that_end_together_are_joined_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        barrier = context.Barrier(4)
        found: Any = context.SimpleQueue()
        processes = [
            context.Process(target=_join_at, args=(barrier, found, tmp_path, Part(number, 4)))
            for number in range(1, 5)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        results = [found.get() for _ in processes]
        (joined,) = [result for result in results if result is not None]
        assert joined == [{"n": n} for n in range(1, 5)]


def _join_at(barrier: Any, found: Any, run: Path, part: Part) -> None:
    barrier.wait()
    found.put(join(run, part, WHOLE, [{"n": part.number}]))
