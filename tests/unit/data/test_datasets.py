from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matformer_dist.config_file import validate_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.data.checks import check_data
from matformer_dist.data.datasets import build_datasets, micro_batches, sizes_digest
from matformer_dist.data.prepare import prepare_data
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.unit.data.conftest import make_texts
from tests.unit.data.test_corpus import write
from tests.unit.data.test_indexed_files import make_documents, write_megatrons, write_ours

SEQ_LEN = 16


def make_config(
    folder: Path, tokenizer: Path, train: list[tuple[float, str]] | None = None, **data: Any
) -> LanguageConfig:
    data.setdefault("split", (90, 10))
    data["train"] = train or [(1.0, str(folder / "d"))]
    config = validate_config(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"d_model": 8, "n_layers": 1, "n_heads": 1, "d_ff": 8},
            "data": {"tokenizer": str(tokenizer), **data},
            "training": {
                "steps": 1,
                "seq_len": SEQ_LEN,
                "micro_batch_size": 2,
                "global_batch_size": 4,
            },
        },
        "test",
    )
    return as_language(config, "the test")


def batches(dataset: Any, consumed: int = 0, rank: int = 0, ranks: int = 1, **options: Any) -> Any:
    return micro_batches(
        dataset,
        consumed=consumed,
        micro_batch_size=2,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **options,
    )


def rows(found: Any) -> list[list[int]]:
    """Samples as lists of seq_len + 1 ids."""
    return [
        [*tokens.tolist(), int(targets[-1])]
        for batch in found
        for tokens, targets in zip(*batch, strict=True)
    ]


def contains(stream: list[int], sample: list[int]) -> bool:
    return any(stream[i : i + len(sample)] == sample for i in range(len(stream) - len(sample) + 1))


def build(config: LanguageConfig, train: int, validation: int) -> Any:
    return build_datasets(config, load_tokenizer(config.data.tokenizer), train, validation)


@pytest.fixture
def config(tmp_path: Path, tokenizer_path: Path) -> LanguageConfig:
    write_ours(tmp_path / "d", make_documents(200), np.uint16)
    (tmp_path / "d.json").unlink()
    return make_config(tmp_path, tokenizer_path)


def test_prepared_text_comes_back_as_samples(tmp_path: Path, tokenizer_path: Path) -> None:
    """Every training token once a pass, none of validation, and </s> between documents."""
    texts = make_texts(40)
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder, "a.jsonl", texts)
    prepare_data([folder], tmp_path / "d", tokenizer=tokenizer_path, workers=1)
    config = make_config(tmp_path, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    train, validation = build(config, 4, 2)
    encoded = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    for dataset, documents in ((train, encoded[:36]), (validation, encoded[36:])):
        tokens, targets = next(batches(dataset))
        assert tokens.shape == targets.shape == (2, SEQ_LEN)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        seen = Counter(itertools.chain(*(row[:-1] for row in rows(batches(dataset)))))
        there = Counter(itertools.chain(*documents))
        assert not seen - there and (there - seen).total() <= 3 * SEQ_LEN
        for row in rows(batches(dataset)):
            for part in split_at(row, tokenizer.eod):
                assert any(contains(document, part) for document in documents)


def split_at(row: list[int], eod: int) -> list[list[int]]:
    """Pieces of documents in a sample, </s> with the piece it ends."""
    parts: list[list[int]] = [[]]
    for token in row:
        parts[-1].append(token)
        if token == eod:
            parts.append([])
    return parts


def test_files_of_megatrons_preprocessing_give_the_same_samples(
    tmp_path: Path, config: LanguageConfig
) -> None:
    write_megatrons(tmp_path / "theirs", make_documents(200), np.uint16)
    theirs = make_config(tmp_path, config.data.tokenizer, [(1.0, str(tmp_path / "theirs"))])
    assert rows(batches(build(theirs, 20, 4)[0])) == rows(batches(build(config, 20, 4)[0]))


def test_resumed_batches_match_the_uninterrupted_ones(config: LanguageConfig) -> None:
    train, _ = build(config, 60, 4)
    whole = rows(batches(train))
    assert len(whole) >= 60 and len({tuple(row) for row in whole}) == len(whole)
    for consumed in (0, 2, 14, 58):
        assert rows(batches(build(config, 60, 4)[0], consumed)) == whole[consumed:]
    longer, _ = build(config, 80, 4)  # below one pass, asking for more changes nothing
    assert rows(batches(longer))[:60] == whole[:60]
    other = config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})})
    assert rows(batches(build(other, 60, 4)[0])) != whole


def test_samples_of_a_global_batch_do_not_depend_on_the_ranks(config: LanguageConfig) -> None:
    train, _ = build(config, 60, 4)
    alone = rows(itertools.islice(batches(train, 8), 24))
    for ranks in (2, 4, 3):
        sources = [batches(train, 8, rank, ranks) for rank in range(ranks)]
        shared = [row for step in zip(*sources, strict=True) for row in rows(step)]
        assert shared[:48] == alone[: len(shared)]
        assert len(shared) == (len(train) - 8) // (2 * ranks) * 2 * ranks


def test_reading_ahead_in_processes_changes_nothing(config: LanguageConfig) -> None:
    train, _ = build(config, 60, 4)
    ahead = batches(train, 4, workers=2)
    assert rows(ahead) == rows(batches(train, 4))


def test_other_lengths_or_weights_have_another_digest(tmp_path: Path) -> None:
    sizes = {"a": 8, "b": 8, "c": 9}
    for name, size in sizes.items():
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
    prefixes = {name: str(tmp_path / name) for name in sizes}
    digests = [
        sizes_digest([(weight, prefixes[name]) for weight, name in blend])
        for blend in ([(1.0, "a")], [(1.0, "b")], [(1.0, "c")], [(2.0, "a")], [(1.0, "a")] * 2)
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 4


FAILING = """
import torch
from matformer_dist.data.datasets import micro_batches
samples = [{"tokens": torch.zeros(2), "labels": torch.zeros(2)}] * 64
batches = micro_batches(samples, consumed=0, micro_batch_size=2, data_parallel_rank=0,
                        data_parallel_size=1, workers=2)
next(batches)
raise RuntimeError("as a run may fail")
"""


def test_a_process_that_fails_does_not_wait_for_its_workers() -> None:
    """Deaf to SIGTERM, they would have kept it: a launcher would see no rank fail."""
    failed = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60, check=False
    )
    assert failed.returncode == 1 and failed.stderr.endswith("as a run may fail\n")


def test_batches_leave_the_global_generator_alone(config: LanguageConfig) -> None:
    train, _ = build(config, 60, 4)
    state = torch.get_rng_state()
    next(batches(train))
    assert torch.equal(torch.get_rng_state(), state)


def test_more_samples_than_there_are_pass_over_the_data_again(config: LanguageConfig) -> None:
    once = len(build(config, 1, 4)[0])
    train, _ = build(config, 3 * once, 4)
    assert len(train) >= 3 * once
    seen = Counter(itertools.chain(*(row[:-1] for row in rows(batches(train)))))
    assert seen.total() > 2.9 * once * SEQ_LEN


@pytest.mark.parametrize("has_its_own", [True, False])
def test_validation_is_the_same_for_every_seed(
    tmp_path: Path, tokenizer_path: Path, has_its_own: bool
) -> None:
    blend = blend_case(tmp_path)
    parts = {"train": blend[:1], "validation": blend[1:]} if has_its_own else {"train": blend}
    config = make_config(tmp_path, tokenizer_path, **parts)
    other = config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})})
    train, validation = (rows(batches(one)) for one in build(config, 40, 20))
    other_train, other_validation = (rows(batches(one)) for one in build(other, 40, 20))
    assert other_train != train and other_validation == validation


def test_validation_is_not_passed_over_again(config: LanguageConfig) -> None:
    """All samples it holds are given once each; who asks for more is told how many there are."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    held = len(build(config, 4, 2)[1])
    batch = config.training.global_batch_size
    most = held // batch
    validation = build(config, 4, most * batch)[1]
    found = {tuple(sample["tokens"].tolist()) for sample in validation}
    assert len(found) == len(validation) == held
    with pytest.raises(UserError, match=rf"hold {held} of .* at most {most} batches"):
        check_data(config, tokenizer, (most + 1) * batch)
    large = config.training.model_copy(update={"global_batch_size": 1000})
    large_batch = config.model_copy(update={"training": large})
    with pytest.raises(UserError, match=rf"hold {held} of .* tokens; give validation"):
        check_data(large_batch, tokenizer, 1000)


def test_each_part_of_a_blended_validation_must_last(tmp_path: Path, tokenizer_path: Path) -> None:
    blend = blend_case(tmp_path)
    config = make_config(tmp_path, tokenizer_path, blend)
    tokenizer = load_tokenizer(tokenizer_path)
    batch = config.training.global_batch_size
    samples = 0
    while True:
        try:
            check_data(config, tokenizer, samples + batch)
        except UserError:
            break
        samples += batch
    found = [tuple(row) for row in rows(batches(build(config, 4, samples)[1]))][:samples]
    assert samples > 0 and len(set(found)) == len(found)


def blend_case(tmp_path: Path) -> list[tuple[float, str]]:
    """Three data sets whose ids tell them apart."""
    blend = []
    for i, weight in enumerate((6.0, 3.0, 1.0)):
        documents = [ids % 100 + 3 + 100 * i for ids in make_documents(100, seed=i)]
        write_megatrons(tmp_path / f"b{i}", documents, np.uint16)
        blend.append((weight, str(tmp_path / f"b{i}")))
    return blend


def shares(found: list[list[int]]) -> list[float]:
    counts = Counter((row[0] - 3) // 100 for row in found)
    assert all(len({(token - 3) // 100 for token in row}) == 1 for row in found)
    return [counts[i] / len(found) for i in range(3)]


def test_blend_matches_its_weights_from_the_start(tmp_path: Path, tokenizer_path: Path) -> None:
    blend = blend_case(tmp_path)
    config = make_config(tmp_path, tokenizer_path, blend, split=(60, 40))
    train, validation = build(config, 200, 40)
    found = rows(batches(train))
    assert len(found) == 200
    assert shares(found) == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert shares(found[:40]) == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    assert shares(rows(batches(validation))) == pytest.approx([0.6, 0.3, 0.1], abs=0.05)


def test_validation_of_its_own_is_used_alone(tmp_path: Path, tokenizer_path: Path) -> None:
    blend = blend_case(tmp_path)
    config = make_config(tmp_path, tokenizer_path, blend[:1], validation=blend[1:])
    train, validation = build(config, 40, 40)
    assert shares(rows(batches(train))) == [1.0, 0.0, 0.0]
    assert shares(rows(batches(validation))) == pytest.approx([0.0, 0.75, 0.25], abs=0.05)
    assert build(config, 40, 0)[1] is None


def test_training_keeps_to_its_share_without_validation(config: LanguageConfig) -> None:
    with_validation, _ = build(config, 20, 4)
    without, nothing = build(config, 20, 0)
    assert nothing is None
    assert rows(batches(without)) == rows(batches(with_validation))


def failing(config: LanguageConfig, message: str, validation: int = 4) -> None:
    with pytest.raises(UserError, match=message):
        build(config, 20, validation)


def test_data_that_cannot_be_trained_on_are_named(
    tmp_path: Path, config: LanguageConfig, tokenizer_path: Path
) -> None:
    def changed(**data: Any) -> LanguageConfig:
        return make_config(tmp_path, tokenizer_path, **data)

    failing(changed(train=[(1.0, str(tmp_path / "none"))]), r"no data file .*none\.idx")
    failing(changed(validation=[(1.0, str(tmp_path / "none"))]), r"no data file .*none\.idx")
    failing(changed(split=(99.9, 0.1)), r"too small for validation: 0 of its 200 documents")
    write_ours(tmp_path / "small", [np.arange(3, 19, dtype=np.int32)], np.uint16)
    (tmp_path / "small.json").unlink()
    small = [(1.0, str(tmp_path / "small"))]
    long = config.training.model_copy(update={"seq_len": 4096})
    failing(
        config.model_copy(update={"training": long}),
        r"too small for training: 180 of its 200 documents, with \d+ tokens, fall to it, and one "
        r"sample takes 4097",
    )
    failing(changed(validation=small), r"small is too small for validation: 1 of its 1 .* with 16 ")
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"d{suffix}"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        failing(config, rf"the data set .*d is damaged: .*d{suffix} has \d+ bytes")
        path.write_bytes(whole)


def test_ids_of_another_vocabulary_are_found(
    tmp_path: Path, config: LanguageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(200)
    documents[150][0] = 400
    write_megatrons(tmp_path / "d", documents, np.uint16)
    failing(config, r"d holds token id 400, but the tokenizer .* has ids 0 to 399")
    documents[150][0] = -1
    write_megatrons(tmp_path / "d", documents, np.int32)
    failing(config, r"d holds token id -1")
    # Of large data only runs are read: one of them must meet the many bad ids.
    monkeypatch.setattr("matformer_dist.data.checks._READ_IDS", 64)
    monkeypatch.setattr("matformer_dist.data.checks._RUN_IDS", 8)
    write_megatrons(tmp_path / "d", make_documents(200, high=800), np.uint16)
    failing(config, r"d holds token id [4-7]\d\d")
    write_megatrons(tmp_path / "d", make_documents(200), np.float32)
    failing(config, r"d holds float32, not token ids")


def test_data_of_another_tokenizer_are_found_though_their_ids_fit(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    write(tmp_path, "a.jsonl", make_texts(40))
    prepare_data([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=tokenizer_path, workers=1)
    build(make_config(tmp_path, tokenizer_path), 4, 2)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x9a\x06\x01x")  # an unknown field
    assert load_tokenizer(other).vocab_size == 400
    message = r"d was made with another tokenizer \(SHA-256 \w{12}\.\.\.\) than data\.tokenizer"
    failing(make_config(tmp_path, other), message)
    write_megatrons(tmp_path / "d", make_documents(60), np.uint16)
    failing(make_config(tmp_path, tokenizer_path), r"d\.json describes 40 documents of \d+ tokens")
    (tmp_path / "d.json").write_text('{"not": "ours"}')
    build(make_config(tmp_path, tokenizer_path), 4, 2)


def first_rows(
    config: LanguageConfig, tokenizer: SentencePieceTokenizer, samples: int
) -> tuple[Any, ...]:
    """On every rank: what it would train on, or the message of its UserError."""
    try:
        train, validation = build_datasets(config, tokenizer, samples, 4)
    except UserError as error:
        return (str(error),)
    return rows(batches(train)), rows(batches(validation))


def cut_cache_short(config: LanguageConfig) -> None:
    """As if rank 0 had been killed while it wrote."""
    (cache,) = (config.run.dir / "index_cache").iterdir()
    (cache / "complete").unlink()
    for file in cache.glob("*shuffle_index.npy"):
        file.write_bytes(file.read_bytes()[:-8])


def ask_often(config: LanguageConfig, tokenizer: SentencePieceTokenizer, prefix: str) -> list[Any]:
    """What a rank gets at first, again, from a cut cache, of replaced data, of missing data."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    answers = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: cut_cache_short(config),
        lambda: write_megatrons(Path(prefix), make_documents(200, seed=7), np.uint16),
        lambda: Path(f"{prefix}.bin").unlink(),
    ):
        dist.barrier()
        if dist.get_rank() == 0:
            change()
        dist.barrier()
        answers.append(first_rows(config, tokenizer, 60))
    dist.destroy_process_group()
    return answers


def test_ranks_share_indices_that_match_a_single_process(
    tmp_path: Path, config: LanguageConfig, tokenizer: SentencePieceTokenizer
) -> None:
    alone = first_rows(config, tokenizer, 60)
    prefix = str(tmp_path / "d")
    answers = run_ranks(2, ask_often, config, tokenizer, prefix, timeout_s=300)
    assert answers[0] == answers[1]
    assert answers[0][:3] == [alone] * 3
    write_megatrons(tmp_path / "d", make_documents(200, seed=7), np.uint16)
    assert answers[0][3] == first_rows(config, tokenizer, 60) != alone
    assert answers[0][4][0].startswith(f"there is no data file {prefix}.bin")
    (folder,) = (tmp_path / "run" / "index_cache").iterdir()
    assert (folder / "complete").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "run"]


def test_building_prints_nothing(tmp_path: Path, config: LanguageConfig) -> None:
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    script = (
        "import sys\n"
        "from matformer_dist.config_file import load_config\n"
        "from matformer_dist.data.datasets import build_datasets\n"
        "from matformer_dist.data.tokenizer_files import load_tokenizer\n"
        "config = load_config(sys.argv[1])\n"
        "build_datasets(config, load_tokenizer(config.data.tokenizer), 20, 4)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert run.stdout + run.stderr == ""
