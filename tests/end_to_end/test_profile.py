"""--profile writes traces of the steps it names, and of no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from matformer_dist.training.timing import PARTS
from tests.end_to_end.conftest import refuse, train, write_config
from tests.end_to_end.jobs import Job


def labels(path: Path) -> dict[str, int]:
    """Names that the run itself has put into a trace, and how often each."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    ours = [name for name in names if name in PARTS or name.startswith("step ")]
    return {name: ours.count(name) for name in ours}


def test_traces_hold_the_chosen_steps_and_name_their_parts(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, tmp_path / "run")
    job = Job(config, "--profile", "1,3-4", "--profile-ranks", "0-1", "parallel.tensor=2", ranks=2)
    assert job.wait() == [0, 0], job.printed()
    folder = tmp_path / "run/profile"
    assert {path.name for path in folder.iterdir()} == {
        f"step-{steps}-rank{rank}.json.gz" for steps in ("1", "3-4") for rank in (0, 1)
    }
    assert f"profile    {folder / 'step-3-4-rank0.json.gz'}: open it in" in job.printed()
    parts = ("data", "forward", "loss", "backward", "optimizer")
    for rank in (0, 1):  # two micro-batches a step
        assert labels(folder / f"step-1-rank{rank}.json.gz") == {
            "step 1": 1, **dict.fromkeys(parts, 2)
        }  # fmt: skip
        assert labels(folder / f"step-3-4-rank{rank}.json.gz") == {
            "step 3": 1, "step 4": 1, **dict.fromkeys(parts, 4)
        }  # fmt: skip
    assert b"gloo:all_reduce" in gzip.decompress((folder / "step-1-rank1.json.gz").read_bytes())

    refuse(train(config, "--profile", "7", "parallel.tensor=1"), "the run has steps 1 to 6")
    refuse(train(config, "--profile", "ten"), "--profile 'ten' must be steps such as 10")
    refuse(train(config, "--profile", "5-8", "training.steps=8"), "the run goes on behind step 6")
    assert len(list(folder.iterdir())) == 4
