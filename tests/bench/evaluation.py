#!/usr/bin/env python3
"""What the evaluation of all programs costs beside the network's passes that it needs.

    python tests/bench/evaluation.py --arch wrn28_10 --images 64 --batch_size 32 --threads 1

Timed in turns: `measure` of clean, occluded and attacked images, and the bare passes (one with the
images' gradient, and a forward pass for every other condition) of the same batches. On a CPU in
processor time, which other processes hardly change; smallest of the rounds.
"""
import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from common import evaluation, models, runtime


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=models.ALL, default="wrn28_10")
    parser.add_argument("--initial_channels", type=int, default=64)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = SimpleNamespace(amp="off", max_steps=None, channels_last=True, compile=False)
    net = models.build(args.arch, 100, initial_channels=args.initial_channels)
    net, _ = runtime.prepare(net, flags, device)
    net.eval()
    info = SimpleNamespace(num_classes=100, image_size=32, width=32, mean=(0.5,) * 3,
                           std=(0.25,) * 3)
    batches = [(torch.randn(len(part), 3, 32, 32, device=device), part.to(device) % 100)
               for part in torch.arange(args.images).split(args.batch_size)]
    names, outputs = evaluation.conditions(net, info)

    def bare(batches):
        for images, labels in batches:
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(net(leaf), labels), leaf)
            with torch.no_grad():
                for _ in names[1:]:
                    net(images)

    def clock():
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def measured(batches):
        evaluation.measure(net, batches, flags, info, names, outputs)

    seconds = {bare: [], measured: []}
    for number in range(args.rounds + 1):
        for run in seconds:
            start = clock()
            run(batches if number else batches[:1])         # the first round warms up
            if number:
                seconds[run].append(clock() - start)
    bare_time, whole = (min(times) for times in seconds.values())
    print(f"{args.arch}, {args.images} images, {len(names)} conditions, {device}: passes "
          f"{bare_time:.1f} s, evaluation {whole:.1f} s: {whole / bare_time:.3f} times")


if __name__ == "__main__":
    runtime.launch(main)
