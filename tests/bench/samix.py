#!/usr/bin/env python3
"""Cost of SAMix: the MixBlock alone, and the whole training step in units of the vanilla step.

    python tests/bench/samix.py                                       # batch 100, 32×32, ResNet-18
    python tests/bench/samix.py --initial_channels 16 --rounds 5      # on a small machine
    python tests/bench/samix.py --device cuda --amp bf16
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

from common import flags, models, runtime
from samix import main as samix
from samix.mixblock import MixBlock, mask_loss, rescale_lambda
from samix.momentum import momentum_update


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
        value = block.value[0](second)
        value = block.value[3](F.elu(block.value[1](value)))
        value = attention @ value.flatten(2).transpose(1, 2)
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


def bench_step(args, device) -> dict:
    """main.py's step of each method, optimizer and momentum update included."""
    class Info:
        num_classes, image_size, width = 100, 32, 32
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(100, (args.batch_size,), device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def step_of(method):
        flags = samix.parse_args([
            "--config", "cifar100_r18", "--arch", args.arch, "--method", method, "--amp", args.amp,
            "--initial_channels", str(args.initial_channels), "--compile", str(args.compile)])
        net, model = runtime.prepare(samix.build(flags, Info), flags, device)
        optimizer = torch.optim.SGD(samix.parameter_groups(net, flags), 1e-3, 0.9)

        def step():
            generator = torch.Generator().manual_seed(0)
            optimizer.zero_grad(set_to_none=True)
            samix.training_step(model, images, labels, flags, Info, generator, scaler, 0.5)
            scaler.step(optimizer)
            scaler.update()
            if method in ("samix", "automix"):
                momentum_update(net.k, net.q, 0.999)
        return step
    methods = ("vanilla", "mixup", "automix", "samix")
    return {f"{method} step": step_of(method) for method in methods}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu_time", action="store_true")
    flags.add_flags(parser, ["digits"], models.ALL, {}, arch="resnet18", batch_size=100)
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
