"""Runs SAGE's main() under torchrun and prints whether the ranks end with the same network."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from common import data
from common.distributed import log
from sage import main

net = main.main(sys.argv[1:])
weights = torch.cat([value.double().flatten() for value in net.state_dict().values()])
others = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(others, weights)
args = main.parse_args(sys.argv[1:])
train, _, _ = data.load(args.dataset, args.data_dir, batch_size=args.batch_size,
                        device=torch.device("cpu"), seed=args.seed, image_size=args.image_size,
                        labels_per_class=args.labels_per_class)
shards = [None, None]
dist.all_gather_object(shards, train.order.tolist())
log(f"ranks agree: {torch.equal(*others)}\nshards: {len(shards[0])} and {len(shards[1])}, "
            f"common: {len(set(shards[0]) & set(shards[1]))}")
dist.destroy_process_group()
