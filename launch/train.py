"""Train a nested model, of text or of images.

    python launch/train.py --config launch/configs/NAME.yaml [section.key=value ...]   (one process)
    deepspeed launch/train.py --config ...                     (every GPU here)
    deepspeed --hostfile hosts launch/train.py --config ...    (of several hosts: hosts.example)
    sbatch launch/slurm/train.sbatch --config ...              (Slurm: slurm/settings.sh)
    deepspeed launch/train.py --config ... --profile 10-12     (trace these steps)

Exit codes: 0 done, 2 the input is wrong (one message says how), 75 SIGTERM or SIGUSR1 ended the run
behind a checkpoint (start it again), anything else a failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LocalError,
    PreemptedError,
    UserError,
)
from matformer_dist.parallel.topology import (
    check_ranks,
    initialize,
    launched_world,
    quiet_libraries,
    shut_down,
)

# A launcher ends all ranks when the first one does: the silent ones wait for the one that speaks.
_OTHERS_SPEAK_S = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a nested model.")
    parser.add_argument("--config", required=True, help="YAML file, see launch/configs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--profile", metavar="STEPS", help="trace steps such as 10-12 or 10,20-22: RUN/profile"
    )
    parser.add_argument(
        "--profile-ranks", metavar="RANKS", help="that trace, such as 0,8-9; else 0"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def train(config: Config, profile: str | None, profile_ranks: str | None) -> None:
    _, world_size, _ = launched_world()
    training = config.training
    check_ranks(
        world_size,
        config.parallel.tensor,
        training.micro_batch_size,
        training.global_batch_size,
    )
    quiet_libraries()
    from matformer_dist.training.control import Control
    from matformer_dist.training.profiling import Wanted

    profiled = Wanted.parse(profile, profile_ranks, training.total_steps, world_size)
    from matformer_dist.training.loop import Run  # imports DeepSpeed, which takes seconds

    # A collective's own limit, which names nobody, comes after the watchdog's.
    timeout = timedelta(seconds=config.training.hang_timeout + 300)
    topology = initialize(config.parallel.tensor, timeout)
    try:
        with Control(topology, config.training.hang_timeout) as control:
            Run(config, topology, control, profiled).train()
    except PreemptedError:
        shut_down()
        raise
    shut_down()  # not after a failure: a rank must not wait for the others then


def main() -> int:
    arguments = parse_arguments()
    rank = local_rank = 0
    try:
        rank, _, local_rank = launched_world()
        config = load_config(arguments.config, arguments.overrides)
        train(config, arguments.profile, arguments.profile_ranks)
    except UserError as error:
        # Ranks that have joined agree; before, a node may be alone with its trouble.
        first_here = local_rank == 0 and not dist.is_initialized()
        if rank == 0 or first_here or isinstance(error, LocalError):
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(_OTHERS_SPEAK_S)
        if dist.is_initialized():  # threads of the process groups would abort an orderly end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except PreemptedError as end:
        if rank == 0:
            print(end, file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
