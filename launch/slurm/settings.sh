# Your cluster's software, network and logs: the one file to edit. All scripts here read it, on the
# first node of their job, in the checkout. What reads NAME=${NAME:-...} here may be exported before
# sbatch instead, for one job.
#
# What a job asks Slurm for (nodes, GPUs, time, memory) are options of sbatch: their defaults stand
# in each script, and the command line of sbatch beats them, so that no script need be edited:
#     sbatch --nodes=4 --time=12:00:00 launch/slurm/train.sbatch --config my.yaml
# What all your jobs need, put into ~/.bashrc: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...

# --- Software: what makes `python` and `matformer` those of this project ------------------------
# `make env` makes .venv, and compiles the operators: call it on a node like those of the jobs.
if [ -d .venv ]; then PATH=$PWD/.venv/bin:$PATH; fi
# module load cuda

# What every rank runs in; nothing by default. In a container:
#     CONTAINER=(apptainer exec --nv image.sif)
CONTAINER=()

# --- Network ------------------------------------------------------------------------------------
# The interface between nodes, as `ip -br addr` names it. NCCL and gloo choose one by themselves;
# name it where they choose wrongly.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The adapters of InfiniBand that NCCL may use, and what it does, when it will not start:
# export NCCL_IB_HCA=mlx5 NCCL_DEBUG=INFO
#
# Ranks meet at the first node, at a port made of the job's number; where both do not suit you:
# export MASTER_ADDR=... MASTER_PORT=...

# --- Ranks --------------------------------------------------------------------------------------
# How many a node; where nothing is said, one a GPU. Without GPUs: how many are to share its cores.
RANKS_PER_NODE=${RANKS_PER_NODE:-}

# --- Logs ---------------------------------------------------------------------------------------
# Folder for a file a rank: LOGS/train-JOB/start-N/rank-R.log. Rank 0's has the plan and the losses.
LOGS=${LOGS:-logs}

# --- Training that goes on ----------------------------------------------------------------------
# How often a job that ended behind a checkpoint (exit code 75) is put back into the queue. Starts
# after a node failed count too, but are Slurm's to make, and not limited by this.
MAX_REQUEUES=${MAX_REQUEUES:-100}

# How many seconds the other ranks have to end by themselves when one has; then they are killed. All
# end together, but where one crashed.
END_SECONDS=${END_SECONDS:-60}
