#!/bin/sh
# Trains SAMix, AutoMix or a baseline on ImageNet, on any number of GPUs and machines, from any folder:
#
#   CONFIG=imagenet_r18 NPROC=4 DATA=/data/imagenet sh samix/scripts/train_imagenet_dist.sh
#   METHOD=automix EPOCHS=300 NPROC=8 DATA=/data/imagenet sh samix/scripts/train_imagenet_dist.sh --amp bf16
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 NPROC=8 DATA=/data/imagenet sh samix/scripts/train_imagenet_dist.sh
#
# The last line on every machine, with its own NODE_RANK. The same command goes on after a stop.
# Further arguments go to main.py and win over the configuration. DALI decodes where it is installed.
#
#   DATA         folder of the data set: train and val, each .rec and .idx or class folders
#   CONFIG       imagenet_r18, imagenet_r34, imagenet_r50, imagenet_r101, imagenet_rx101 or any
#                other of configs.py (imagenet_r50); METHOD: samix, automix, mixup, cutmix, vanilla
#   EPOCHS       length of the schedule (the configuration's)
#   OUT          where the run's folder is made (experiments)
#   NPROC        processes on this machine (its GPUs, or 1)
#   NNODES       machines (1); NODE_RANK: number of this one (0); MASTER_ADDR: the first one's
#                address; MASTER_PORT (23333)
#   PYTHON       the interpreter (the project's .venv, or python3)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${DATA:?set DATA to the folder of the data set}"
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3
python=${PYTHON:-$python} NNODES=${NNODES:-1}
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
set -- "$root/samix/main.py" --config "${CONFIG:-imagenet_r50}" --method "${METHOD:-samix}" \
    ${EPOCHS:+--epochs "$EPOCHS"} --data_dir "$DATA" --root_dir "${OUT:-experiments}" --resume auto "$@"

if [ "$NNODES" -gt 1 ]; then
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
    exec "$python" -m torch.distributed.run --nnodes="$NNODES" --node_rank="${NODE_RANK:-0}" \
        --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-23333}" \
        --nproc_per_node="$NPROC" "$@"
elif [ "$NPROC" -gt 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
else
    exec "$python" "$@"
fi
