from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from matformer_dist.config_file import load_config
from matformer_dist.deepspeed_section import check_deepspeed_section
from matformer_dist.errors import UserError
from matformer_dist.planning.plan import IF_OPEN

SHIPPED = Path(__file__).parents[2] / "launch/configs/llama/2.6b-8gpu.yaml"
ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([f"{ZERO}.stage=0"], "stage 0 with training.precision bf16"),
        ([f"{ZERO}.offload_optimizer=cpu"], "offload_optimizer is 'cpu'"),
        ([f"{ZERO}.offload_optimizer.device=disk"], "device is 'disk': Input should be 'none'"),
        ([f"{ZERO}.offload_param.device=cpu"], "offload_param needs stage 3, and stage is 1"),
        (
            [f"{ZERO}.stage=0", "training.precision=fp32", f"{ZERO}.offload_optimizer.device=cpu"],
            "offload_optimizer needs a stage from 1",
        ),
        ([f"{ZERO}.reduce_bucket_size=0"], "reduce_bucket_size is 0; it must be 1 element or more"),
        ([f"{ZERO}.reduce_bucket_size=-1"], "reduce_bucket_size is -1"),
        ([f"{ZERO}.reduce_bucket_size=auto"], "is 'auto', which nothing fills in here"),
        ([f"{ZERO}.stage3_max_live_parameters=-5"], "stage3_max_live_parameters is -5"),
        ([f"{ZERO}.stages=1"], f"unknown key {ZERO}.stages"),
        (["deepspeed.zero_optimisation.stage=1"], "did you mean zero_optimization?"),
        (["deepspeed.bf16.enabled=true"], "derived from training.precision"),
        (["deepspeed.tensorboard.enabled=true"], "derived from logging.tensorboard"),
    ],
)
def test_what_deepspeed_would_not_take_is_named(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        check_deepspeed_section(load_config(SHIPPED, overrides, if_open=IF_OPEN), 8)
    assert says in str(error.value)


def test_deepspeed_is_asked_only_where_there_is_something_to_ask() -> None:
    look = f"""
import sys
from pathlib import Path
from matformer_dist.config_file import load_config
from matformer_dist.deepspeed_section import check_deepspeed_section
for overrides in [], ["{ZERO}.stage=3"], ["{ZERO}.overlap_comm=true"]:
    config = load_config({str(SHIPPED)!r}, overrides, if_open={IF_OPEN!r})
    check_deepspeed_section(config, 8)
    print("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line in ("True", "False")]
    assert told == ["False", "False", "True"]
