#!/usr/bin/env python3
"""Cost of SAGE's methods: mixing alone and the whole training step, in units of the vanilla step.

    python tests/bench/sage.py                                  # batch 100, 32×32, PreActResNet-18
    python tests/bench/sage.py --amp bf16 --batch_size 512 --device cuda
    python tests/bench/sage.py --loop                           # what the loop around a step costs

Methods take turns round by round, so that what else the machine does weighs on all alike; printed
are the median step and the mean mixing time (Puzzle Mix's depends on the drawn number of blocks).
Mixing alone is what the step does beside its forward and
backward passes: saliency from a gradient, search, graph cuts, blending, targets.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from common import data, distributed, models, runtime
from common.run import Run
from sage import main as sage


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device, function, *args) -> float:
    start = clock(device)
    function(*args)
    return clock(device) - start


def loop(rounds, step, train, net, optimizer, scaler, args, info, device):
    """Per step: the loaders alone, the bare step over and over, and main.py's epochs around it."""
    run = Run(args, device, info, ["loop"], model=net, optimizer=optimizer, scaler=scaler)
    run.start()
    batches = {"torch": train}
    with contextlib.suppress(ImportError):
        batches["dali"] = data.load(args.dataset, args.data_dir, batch_size=args.batch_size,
                                    device=device, loader="dali")[0]
    work = {f"loader {name}": lambda one=one: [None for _ in one] for name, one in batches.items()}
    work["bare step"] = lambda: [step(args, number) for number in range(len(train))]
    work["epoch"] = lambda: sage.train_one_epoch(net, net, train, optimizer, scaler, args, info,
                                                 run)
    for number in range(rounds + 1):
        run.step, run.sums = 0, None
        times = {name: 1e3 * timed(device, one) / len(train) for name, one in work.items()}
        if number:                              # the first round warms up
            print(", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
                  + f"; epoch / bare step {times['epoch'] / times['bare step']:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--arch", default="preactresnet18")
    parser.add_argument("--initial_channels", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--methods", nargs="+", default=sage.METHODS, choices=sage.METHODS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
    parser.add_argument("--solver", choices=["auto", "gco", "device"], default="auto")
    parser.add_argument("--loop", action="store_true")
    own = parser.parse_args()
    flags = ("--dataset", own.dataset, "--data_dir", own.data_dir, "--arch", own.arch, "--device",
             own.device, "--amp", own.amp, "--solver", own.solver, "--batch_size",
             str(own.batch_size), "--rand_pos", "0.01", "--upper_lambda", "0.5",
             "--update_ratio", "0.7")
    parsed = {method: sage.parse_args([*flags, "--method", method]) for method in own.methods}
    args = parsed.setdefault("vanilla", sage.parse_args([*flags, "--method", "vanilla"]))
    device = runtime.setup(args)

    train, _, info = data.load(args.dataset, args.data_dir, batch_size=args.batch_size,
                               device=device)
    images, labels = next(iter(train))
    net, _ = runtime.prepare(models.build(args.arch, info.num_classes, info.image_size,
                                          initial_channels=own.initial_channels), args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def step(args, number):
        optimizer.zero_grad(set_to_none=True)
        generator = distributed.step_generator(0, 0, number)
        sage.training_step(net, net, images, labels, args, info, 0, generator, scaler)
        scaler.step(optimizer)
        scaler.update()

    if own.loop:
        args.log_off = True
        return loop(own.rounds, step, train, net, optimizer, scaler, args, info, device)
    gradients = {}                              # real ones, of the network as it is at the start
    for method, args in parsed.items():
        gradients[method] = sage.saliency_gradient(net, images, labels, args, scaler, 1.0).detach()
    whole, mixing = ({method: [] for method in parsed} for _ in range(2))
    original = sage.saliency_gradient
    for number in range(own.rounds + 1):
        for method, args in parsed.items():
            seconds = timed(device, step, args, number)
            sage.saliency_gradient = lambda *_, method=method, **__: gradients[method]
            generator = distributed.step_generator(0, 0, number)
            alone = timed(device, lambda args=args, generator=generator: sage.mix_batch(
                net, images, labels, args, info, generator, scaler))
            sage.saliency_gradient = original
            if number:                          # the first round warms up
                whole[method].append(seconds)
                mixing[method].append(alone)
    vanilla = statistics.median(whole["vanilla"])
    print(f"batch {own.batch_size}, {info.image_size}×{info.image_size}, {own.arch} of "
          f"{own.initial_channels} channels, precision {own.amp}, "
          f"solver {own.solver}, {own.rounds} rounds; the vanilla step took {1e3 * vanilla:.1f} ms"
          "\n| method | mixing, ms | mixing / vanilla step | whole step / vanilla step |\n"
          "|---|---|---|---|")
    for method in parsed:
        alone, seconds = statistics.mean(mixing[method]), statistics.median(whole[method])
        print(f"| {method} | {1e3 * alone:.2f} | {alone / vanilla:.4f} | {seconds / vanilla:.2f} |")


if __name__ == "__main__":
    runtime.launch(main)
