"""Write a checkpoint of any layout as a universal one, which DeepSpeed's own loader reads too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from matformer_dist.checkpoints.deepspeed_files import optimizer_order
from matformer_dist.checkpoints.files import (
    HashingStream,
    replace_file,
    write_file,
)
from matformer_dist.checkpoints.new_directory import NewDirectory, check_space
from matformer_dist.checkpoints.universal import UniversalModel, load_universal
from matformer_dist.checkpoints.universal_files import description, stored_value, value_path
from matformer_dist.checkpoints.verify import BackgroundCheck
from matformer_dist.errors import UserError
from matformer_dist.run_directory import (
    LABEL_FILES,
    MANIFEST,
    UNIVERSAL,
    SavedFile,
    find_checkpoint,
)


def convert(
    run: str, output: Path, advance: Callable[[int, int], None] = lambda _, __: None
) -> Path:
    """Write RUN[@STEP] into the new run directory `output`; returns the checkpoint's folder.

    `advance` is told how many weights are done, of how many. Memory: one weight. UserError for a
    damaged checkpoint, and for an output that exists.
    """
    checkpoint = find_checkpoint(run)
    new = NewDirectory(output)
    model = load_universal(checkpoint)
    check_space(output, 4 * len(_states(model)) * sum(p.numel() for p in model.whole.values()))
    folder = new.path / "checkpoints" / f"step-{checkpoint.step}"
    try:
        with new:
            folder.mkdir(parents=True)
            _copy_settings(checkpoint.path.parent.parent, new)
            with BackgroundCheck(checkpoint):
                files = _write(model, folder, advance)
            manifest = checkpoint.manifest.model_copy(
                update={"layout": UNIVERSAL, "random_states": [], "files": files}
            )
            replace_file(folder / MANIFEST, manifest.sealed().encode())
            replace_file(folder.parent / "latest_universal", folder.name.encode())
            new.publish()
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another output") from None
    return new.place / "checkpoints" / folder.name


def _copy_settings(run: Path, new: NewDirectory) -> None:
    """The configuration, which names the new run directory, and the tokenizer or class names."""
    copied = [name for name in LABEL_FILES if (run / name).exists()]
    for name in copied:
        shutil.copy(run / name, new.path)
    config = run / "config.yaml"
    if config.exists():
        tree = yaml.safe_load(config.read_text())
        tree["run"]["dir"] = str(new.place)
        if "tokenizer" in tree["data"] and copied:
            tree["data"]["tokenizer"] = str(new.place / copied[0])
        replace_file(new.path / "config.yaml", yaml.safe_dump(tree, sort_keys=False).encode())


def _states(model: UniversalModel) -> tuple[str, ...]:
    return ("fp32", *model.moments)


def _write(
    model: UniversalModel, folder: Path, advance: Callable[[int, int], None]
) -> dict[str, SavedFile]:
    files = {}

    def write(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

        def save(stream: HashingStream) -> None:
            torch.save(content, stream)  # type: ignore[arg-type]

        files[str(path.relative_to(folder))] = write_file(path, save)

    states = _states(model)
    for done, (name, parameter) in enumerate(model.whole.items(), 1):
        for state in states:
            content = stored_value(name, parameter, model.value(name, state))
            write(value_path(folder, name, state), content)
        if len(states) > 1:
            write(value_path(folder, name, "step"), torch.tensor(float(model.optimizer_steps)))
        advance(done, len(model.whole))
    groups = len([names for names in optimizer_order(model.whole) if names])
    manifest = model.checkpoint.manifest
    version = manifest.versions.get("deepspeed", "0.19.8")
    write(
        folder / "zero" / "optimizer_state.pt",
        {"param_groups": [{} for _ in range(groups)], "ds_version": version},
    )
    write(
        folder / "mp_rank_00_model_states.pt",
        {
            "module": {},
            "dp_world_size": 1,
            "mp_world_size": 1,
            "global_steps": manifest.step,
            "global_samples": manifest.samples,
            "skipped_steps": manifest.skipped_steps,
            "lr_scheduler": None,
            "ds_version": version,
            **description(model.whole, model.outputs),
        },
    )
    return files
