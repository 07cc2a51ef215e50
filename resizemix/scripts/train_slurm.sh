#!/bin/sh
# Trains ResizeMix under slurm, a process a GPU. From the project's root:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --export=ALL,DATA=/data/imagenet \
#       resizemix/scripts/train_slurm.sh --amp bf16
#
# DATA, OUT, CONFIG, MASTER_PORT, PYTHON and further arguments as in train_dist.sh. Two minutes
# before the time is up the run saves itself; the same command goes on.
#SBATCH --job-name=resizemix
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
set -eu
: "${DATA:?set DATA to the folder of the data set}"
root=${SLURM_SUBMIT_DIR:-.}                 # slurm runs a copy of this script, elsewhere
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-23333}
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}   # srun no longer takes over sbatch's own
export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK
exec srun --kill-on-bad-exit=1 "${PYTHON:-$python}" "$root/resizemix/main.py" --launcher slurm \
    --config "${CONFIG:-imagenet_res}" --data_dir "$DATA" --root_dir "${OUT:-experiments}" \
    --resume auto "$@"
