"""A run directory of random weights that has validation data: nothing in it was learnt."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from matformer_dist.data.prepare import prepare_data
from matformer_dist.models.matlm import MatLM
from tests.unit.submodels.synthetic_run import TEXT, write_run

SEQ_LEN = 12
SEQUENCES = 12  # of evaluation: 3 batches of 4


def write_run_with_data(directory: Path, lm: MatLM) -> Path:
    """As `write_run`; its validation data lie in DIRECTORY/validation.bin."""
    write_run(directory, lm)
    words = TEXT.split()
    texts = [" ".join(random.Random(i).choices(words, k=40)) for i in range(30)]
    (directory / "texts").mkdir()
    for i, text in enumerate(texts):
        (directory / "texts" / f"{i}.txt").write_text(f"{text}, ünd ein Ende\n")
    prefix = directory / "validation"
    prepare_data([directory / "texts"], prefix, tokenizer=directory / "tokenizer.model", workers=1)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["data"] |= {"train": [[1, str(prefix)]], "validation": [[1, str(prefix)]]}
    config["training"] |= {"seq_len": SEQ_LEN, "micro_batch_size": 2, "global_batch_size": 4}
    config["evaluation"] = {"batches": SEQUENCES // 4}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory
