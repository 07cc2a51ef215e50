#!/usr/bin/env python3
"""Cost of SAMix: the MixBlock alone, and the whole training step in units of the vanilla step.

    python tests/bench/samix.py                                       # batch 100, 32×32, ResNet-18
    python tests/bench/samix.py --initial_channels 16 --rounds 5      # on a small machine
    python tests/bench/samix.py --device cuda --amp bf16 --channels_last
    python tests/bench/samix.py --cpu_time                            # on a busy machine

Everything measured takes turns, round by round, so that what else the machine does weighs on all
alike; printed are the smallest and the median times. The MixBlock is compared with its own
definition written out convolution by convolution, and with its bare matrix products.
--cpu_time counts the processor seconds of one thread, which other programs disturb little.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from common import models, runtime
from common.mixing import soft_targets
from samix.losses import head_loss
from samix.mixblock import MixBlock, mask_loss, mix, plain_near_ends, rescale_lambda
from samix.momentum import Branch, momentum_copy, momentum_update


def rounds_of(functions: dict, rounds: int, device, clock) -> dict:
    """Seconds of each function in each round but the first two."""
    times = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(clock() - start)
    return times


def bench_block(args, device) -> dict:
    """Forward and backward of the MixBlock for (100, 256, 8, 8) features, and its yardsticks."""
    block = MixBlock(256, lam_mul_k=0.25).to(device)
    features = torch.randn(100, 256, 8, 8, device=device)
    perm = torch.randperm(100).to(device)
    lam = torch.tensor(0.4)
    tokens, wide, narrow = (torch.randn(6400, n, device=device) for n in (512, 256, 128))

    def plain(lam, perm):
        share = rescale_lambda(lam, 0.25)
        first, second = features * (1 + share), features[perm] * (2 - share)
        both = torch.cat([first, second], 1)
        query, key = (layer(both).flatten(2) for layer in (block.query, block.key))
        attention = (query.transpose(1, 2) @ key / 128 ** 0.5).softmax(2)
        value = attention @ block.value(second).flatten(2).transpose(1, 2)
        logits = value.transpose(1, 2).unflatten(2, (8, 8)).float()
        share = F.interpolate(logits, scale_factor=4, mode="bilinear").sigmoid()
        return torch.cat([1 - share, share], 1)

    def lesson(masks):
        block.zero_grad()
        with runtime.autocast(args, device):
            mask = masks()
        (mask_loss(mask, lam) + mask[:, 1].mean()).backward()

    def products():                 # projections, values and attention, forward and backward
        with runtime.autocast(args, device):
            weight = tokens.T @ wide
            tokens @ weight
            weight = wide.T @ narrow
            wide @ weight
            heads = narrow.view(100, 64, 128)
            for _ in range(3):
                heads @ heads.transpose(1, 2)

    return {"MixBlock": lambda: lesson(lambda: block(features, lam, perm, 4)),
            "written out": lambda: lesson(lambda: plain(lam, perm)),
            "matrix products alone": products}


class Backbone(nn.Module):
    """The networks' third and last stages."""

    def __init__(self, network):
        super().__init__()
        self.before = nn.Sequential(network.stem, *network.stages[:3])
        self.last = nn.Sequential(network.stages[3], network.tail)

    def forward(self, images):
        middle = self.before(images)
        return middle, self.last(middle)


def bench_step(args, device) -> dict:
    """The step of one optimizer update: vanilla, Mixup's cost, and SAMix's."""
    def backbone():
        return Backbone(models.build(args.arch, 100, 32, initial_channels=args.initial_channels))

    def placed(module):
        return module.to(device, memory_format=torch.channels_last if args.channels_last
                         else torch.contiguous_format)

    width = args.initial_channels * 8 * (4 if args.arch.startswith(("resnet50", "resnext")) else 1)
    q = placed(Branch(backbone(), width, 100))
    k, block = momentum_copy(q), placed(MixBlock(width // 2, 0.25))
    optimizer = torch.optim.SGD([*q.parameters(), *block.parameters()], 1e-3, momentum=0.9)
    images = placed(torch.randn(args.batch_size, 3, 32, 32))
    labels = torch.randint(100, (args.batch_size,), device=device)
    perm, lam = torch.randperm(args.batch_size).to(device), torch.tensor(0.4)

    def vanilla():
        with runtime.autocast(args, device):
            loss = head_loss(q(images, "one"), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def samix():
        targets = soft_targets(labels, perm, lam, 100)
        with runtime.autocast(args, device):
            with torch.no_grad():
                features = k.features(images)
                mask_bb = plain_near_ends(block(features, lam, perm, 4), lam)
            mask_mb = block(features, lam, perm, 4)
            loss = 0.1 * mask_loss(mask_mb, lam) \
                + head_loss(k(mix(images, mask_mb, perm), "mix"), targets) \
                + head_loss(q(images, "one"), labels) \
                + head_loss(q(mix(images, mask_bb, perm), "mix"), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(k, q, 0.999)

    return {"vanilla step": vanilla, "SAMix step": samix}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--initial_channels", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu_time", action="store_true")
    runtime.add_flags(parser)
    args = parser.parse_args()
    device = runtime.setup(args)
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    for functions in (bench_block(args, device), bench_step(args, device)):
        times = rounds_of(functions, args.rounds, device, clock)
        reference = statistics.median(times.get("vanilla step", times.get("written out")))
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(f"{name:>22}: {1e3 * min(seconds):8.2f} ms, median {1e3 * median:8.2f} ms, "
                  f"ratio {median / reference:.2f}")


if __name__ == "__main__":
    runtime.launch(main)
