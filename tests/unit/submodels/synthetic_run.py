"""Run directories with random weights, written without training and without DeepSpeed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import yaml

from matformer_dist.checkpoints.files import hash_file
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.data.labels import Labels
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.run_directory import Layout, Manifest

VOCAB = 307  # odd: tensor-parallel ranks hold padding
NESTING = Nesting.from_widths([8, 16, 40, 64])
TEXT = "def total(numbers):\n    return sum(numbers)  # a short comment, ümläut\n"


@functools.cache
def small_tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer([TEXT] * 3, VOCAB)


def model_config(**changes: Any) -> LanguageModelConfig:
    shape: dict[str, Any] = {
        "d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 64, "max_seq_len": 48, "init_std": 0.2,
    }  # fmt: skip
    return LanguageModelConfig.model_validate({**shape, **changes})


def random_model(model: LanguageModelConfig, seed: int = 3) -> MatLM:
    """Whole random weights; norms too, or an export that forgets them would go unnoticed."""
    lm = MatLM(model, [NESTING] * model.n_layers, VOCAB, Initializer(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return lm.eval()


def write_run(directory: Path, lm: MatLM, *, tensor: int = 1, step: int = 5) -> Path:
    """A run directory whose checkpoint holds `lm` as ZeRO 0 leaves it on `tensor` ranks."""
    tokenizer = small_tokenizer()
    config = {
        "run": {"dir": str(directory)},
        "model": lm.model.model_dump(mode="json"),
        "nesting": {"widths": list(NESTING.widths)},
        "data": {"train": [[1, "unused"]], "tokenizer": str(directory / tokenizer.file_name)},
        "training": {"steps": 5, "seq_len": 8, "micro_batch_size": 1, "global_batch_size": 1},
    }
    return write_files(directory, lm, NESTING, tokenizer, config, tensor=tensor, step=step, units=8)


def write_files(
    directory: Path,
    model: MatFormer,
    nesting: Nesting,
    labels: Labels,
    config: dict[str, Any],
    *,
    tensor: int,
    step: int,
    units: int,
) -> Path:
    """A run directory of a model of any task; `units` a step."""
    checkpoint = directory / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    for name, content in labels.files.items():
        (directory / name).write_bytes(content)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    for rank in range(tensor):
        module = {}
        for name, parameter in model.named_parameters():
            partition = getattr(parameter, "partition", None)
            whole = parameter.detach()
            module[name] = partition.deal(whole, rank, tensor) if partition else whole
        state = {"module": module, "optimizer": {"state": {}}}
        torch.save(state, checkpoint / f"mp_rank_{rank:02d}_model_states.pt")
    manifest = Manifest(
        step=step,
        samples=step,
        units=units * step,
        layout=Layout(tensor=tensor, data=1, zero_stage=0),
        model=model.model,  # type: ignore[arg-type]  # of one of the tasks
        outputs=model.outputs,
        nesting=nesting,
        precision="fp32",
        labels_sha256=labels.digest,
        config_sha256="",
        versions={},
        files={file.name: hash_file(file) for file in checkpoint.iterdir()},
    )
    (checkpoint / "manifest.json").write_text(manifest.sealed())
    return directory
