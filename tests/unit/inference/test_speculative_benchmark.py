"""benchmarks.speculative, on a run that learnt nothing: every way, and tokens that are plain's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speculative
from tests.unit.submodels.run_with_data import SEQ_LEN, write_run_with_data
from tests.unit.submodels.synthetic_run import model_config, random_model


def test_every_way_makes_the_tokens_of_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(speculative, "keep_freed_memory", lambda: None)
    run = write_run_with_data(tmp_path / "run", random_model(model_config(init_std=1.0)))
    output = tmp_path / "speculative.json"
    words = ["--slice", "S:1,L:2", "--draft-tokens", "3", "auto", "--prompt-count", "2"]
    words += ["--prompt-tokens", str(SEQ_LEN), "--new-tokens", "12", "--repetitions", "1"]
    monkeypatch.setattr(sys, "argv", ["speculative", str(run), *words, "--output", str(output)])
    speculative.main()
    written = json.loads(output.read_text())
    ways = {
        (one["engine"], one["draft"], one["cache"], one["draft_tokens"])
        for one in written["results"]
    }
    drafts = ("S", "M", "S:1,L:2")
    ours = {("ours", d, c, t) for d in drafts for c in ("own", "shared") for t in ("3", "auto")}
    theirs = {("transformers", d, "own", t) for d in drafts for t in ("3", "default")}
    assert ways == ours | theirs | {(engine, "none", "", "") for engine in ("ours", "transformers")}
    for one in written["results"]:
        assert one["same"] == 1
        assert one["tokens_per_second"] > 0 and one["speedup"] > 0
        drafts_here = one["engine"] == "ours" and one["draft"] != "none"
        assert (one["acceptance"] is not None) == drafts_here
    first = written["results"][0]
    assert first["speedup"] == first["over_our_plain"] == 1
