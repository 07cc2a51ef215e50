#!/bin/sh
# Trains ResizeMix on CIFAR or ImageNet, on any number of GPUs and machines, from any folder:
#
#   sh resizemix/scripts/train_dist.sh                                  # CIFAR-100, WRN-28-10
#   CONFIG=cifar10_ss DATA=/data sh resizemix/scripts/train_dist.sh
#   NPROC=8 DATA=/data/imagenet sh resizemix/scripts/train_dist.sh --amp bf16
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 NPROC=8 DATA=/data/imagenet sh resizemix/scripts/train_dist.sh
#
# The last line on every machine, with its own NODE_RANK. The same command continues a stopped run.
# Further arguments go to main.py and win over the configuration.
#
#   DATA         folder of the data set (data; CIFAR is downloaded to it where absent)
#   CONFIG       a configuration of configs.py (imagenet_res if DATA holds train and val, as folders
#                or .rec files, else cifar100_wrs)
#   OUT          where the run's folder is made (experiments)
#   NPROC        processes on this machine (for ImageNet its GPUs, else 1)
#   NNODES       machines (1); NODE_RANK: number of this one (0); MASTER_ADDR: the first one's
#                address; MASTER_PORT (23333)
#   PYTHON       the interpreter (the project's .venv, or python3)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
DATA=${DATA:-data} config=cifar100_wrs
if { [ -d "$DATA/train" ] && [ -d "$DATA/val" ]; } || \
        { [ -e "$DATA/train.rec" ] && [ -e "$DATA/val.rec" ]; }; then
    config=imagenet_res
fi
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3
python=${PYTHON:-$python} NNODES=${NNODES:-1}
case " --config ${CONFIG:-$config} $* " in
    *" --config imagenet"*|*" --config=imagenet"*|*" --dataset imagenet "*|*" --dataset=imagenet "*) ;;
    *) NPROC=${NPROC:-1} ;;
esac
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
set -- "$root/resizemix/main.py" --config "${CONFIG:-$config}" --data_dir "$DATA" \
    --root_dir "${OUT:-experiments}" --resume auto "$@"

if [ "$NNODES" -gt 1 ]; then
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
    exec "$python" -m torch.distributed.run --nnodes="$NNODES" --node_rank="${NODE_RANK:-0}" \
        --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-23333}" \
        --nproc_per_node="$NPROC" "$@" --launcher pytorch
elif [ "$NPROC" -gt 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@" \
        --launcher pytorch
else
    exec "$python" "$@"
fi
