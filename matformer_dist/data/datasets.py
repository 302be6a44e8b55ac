"""Training data: Megatron-Core's GPTDataset over indexed files, checked before it is built.

A sample is seq_len + 1 neighbouring tokens; documents follow one another, each ended by </s>.
Which samples make up global batch n depends on data.seed and n alone, not on the ranks. It also
depends on how many samples are asked for, in one way: below one pass over the data it does not,
but Megatron shuffles all passes of a longer run together. So a run of more than one pass that is
resumed with other training.steps goes on in another order, and may meet a sample once more, or
once less, than the rest. Validation samples are the same whatever the seed, so that losses of
runs with different seeds can be compared.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.checks import Blend, check_data, split_share
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.parallel.agreement import on_main
from matformer_dist.parallel.topology import MEGATRON_LOGGERS

_COMPLETE = "complete"
_VALIDATION_SEED = 1234
_OF_THE_CLUSTER = (signal.SIGTERM, signal.SIGUSR1)


def build_datasets(
    config: LanguageConfig, tokenizer: Tokenizer, train_samples: int, validation_samples: int
) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training data of at least `train_samples` samples, and validation data likewise.

    Where training data hold less, they are passed over again. Validation comes from
    data.validation, else from the last documents of data.train by data.split; None where
    `validation_samples` is 0. To be called on every rank if torch.distributed is initialised:
    rank 0 checks and builds the indices of samples, under run.dir, and the others read them.
    UserError, on all of them, for files that are missing, damaged, of another tokenizer, or too
    small.
    """
    samples = (train_samples, validation_samples)
    on_main(lambda: check_data(config, tokenizer, validation_samples))
    if not dist.is_initialized():
        return _build(config, tokenizer, samples, cache=None)
    cache = on_main(lambda: _index_cache(config, tokenizer, samples))
    datasets = _build(config, tokenizer, samples, cache)
    dist.barrier()
    on_main((cache / _COMPLETE).touch)
    return datasets


def sizes_digest(blend: Blend) -> str:
    """Of the data sets' weights and lengths: another one means another order of samples."""
    sizes = [(weight, Path(f"{prefix}.bin").stat().st_size) for weight, prefix in blend]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def micro_batches(
    dataset: Dataset[Any],
    *,
    consumed: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    workers: int = 0,
    collate: Callable[[Iterable[Any]], Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets), int64 [micro_batch_size, seq_len] each, targets one token further.
    With `collate`, what that makes of the samples of a micro-batch.

    `consumed` samples of the dataset are skipped: those that earlier micro-batches of all ranks
    took together. Ends when not enough for a micro-batch of every rank are left. `workers`
    processes read ahead; the order is the same with any number of them. They are started here and
    not by whoever takes the first one.
    """
    stride = micro_batch_size * data_parallel_size
    first = consumed + data_parallel_rank * micro_batch_size
    last = len(dataset) - (data_parallel_size - data_parallel_rank) * micro_batch_size  # type: ignore[arg-type,misc]
    starts = range(first, last + 1, stride)
    loader = DataLoader(
        dataset,
        batch_sampler=(range(start, start + micro_batch_size) for start in starts),  # type: ignore[arg-type,misc]
        num_workers=workers,
        collate_fn=collate or _tokens_and_targets,
        worker_init_fn=_leave_signals_to_the_rank,
        generator=torch.Generator(),  # or it would draw from the global one, and shift dropout
    )
    return iter(loader)


def _leave_signals_to_the_rank(_: int) -> None:
    """A cluster signals all processes of a job; the rank still needs its workers to end well."""
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_CLUSTER)
    threading.Thread(target=_end_for_the_rank, args=[os.getppid()], daemon=True).start()


def _end_for_the_rank(rank: int) -> None:
    """By its SIGTERM: torch and multiprocessing send one, and wait, where a worker is left over."""
    while True:
        received = signal.sigwaitinfo(_OF_THE_CLUSTER)
        if received.si_signo == signal.SIGTERM and received.si_pid == rank:
            os._exit(0)


def _tokens_and_targets(samples: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    samples = list(samples)
    return (
        torch.stack([sample["tokens"] for sample in samples]),
        torch.stack([sample["labels"] for sample in samples]),
    )


def _build(
    config: LanguageConfig, tokenizer: Tokenizer, samples: tuple[int, int], cache: Path | None
) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The datasets by Megatron-Core's builder, which lets rank 0 write `cache` first."""
    data, train_share = config.data, split_share(config)
    train_samples, validation_samples = samples
    builder, dataset, settings = _megatron()

    def build(blend: Blend, part: tuple[float, float], count: int, seed: int) -> Dataset[Any]:
        built = settings(
            blend=_blend(blend),
            split="1",
            random_seed=seed,
            sequence_length=config.training.seq_len,
            tokenizer=tokenizer,
            path_to_cache=str(cache) if cache else "",  # "": keep the indices in memory
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        # Set here, so that it is what was checked, to the last bit.
        built.split_matrix = [part, None, None]
        found: Dataset[Any] = builder(dataset, [count, 0, 0], lambda: True, built).build()[0]
        return found

    train = build(data.train, (0.0, train_share), train_samples, data.seed)
    if validation_samples == 0:
        return train, None
    if data.validation is None:
        held_out, part = data.train, (train_share, 1.0)
    else:
        held_out, part = data.validation, (0.0, 1.0)
    return train, build(held_out, part, validation_samples, _VALIDATION_SEED)


def _megatron() -> tuple[Any, Any, Any]:
    """Megatron-Core's builder, dataset and its settings, without their notices.

    On import they tell of parts that we do not use; later, that no cache folder is set.
    """
    for name in MEGATRON_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    return BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig


def _blend(blend: Blend) -> tuple[list[str], list[float] | None]:
    """As Megatron-Core takes it; one data set alone needs no blending, and has no weight."""
    prefixes = [prefix for _, prefix in blend]
    return prefixes, [weight for weight, _ in blend] if len(blend) > 1 else None


def _index_cache(config: LanguageConfig, tokenizer: Tokenizer, samples: tuple[int, int]) -> Path:
    """The folder of this build's indices; on rank 0 only.

    Its name covers all that decides them, data files included: Megatron-Core's own names do not,
    and it would take indices of replaced data, or half written ones, for good. Folders of other
    or unfinished builds are removed.
    """
    data = config.data
    blends = [*data.train, *(data.validation or [])]
    files = [Path(f"{prefix}{suffix}") for _, prefix in blends for suffix in (".idx", ".bin")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    decides = (data, config.training.seq_len, tokenizer.digest, samples, stats)
    root = config.run.dir / "index_cache"
    cache = root / hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.iterdir():
            if folder != cache or not (folder / _COMPLETE).exists():
                shutil.rmtree(folder)
        cache.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {config.run.dir}: {error.strerror}; set run.dir to a "
            "folder that every rank can read and rank 0 can write"
        ) from None
    return cache
