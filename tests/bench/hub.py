#!/usr/bin/env python3
"""Whether a loop with a torch.hub mixer trains the network that the program itself trains.

    python tests/bench/hub.py --data s20.npz

Both take --steps steps with the same draws, from the same weights; printed is the largest
difference of a weight. The loop's loss is cross-entropy with soft targets, but of SoftCrop the
program's divergence: equal but for rounding, which 200 steps would enlarge.
"""
import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from common import data, models
from common.distributed import step_generator
from common.mixing import soft_cross_entropy, softmax_bce
from safuse import network
from soft_aug.losses import soft_target_loss

ROOT = str(Path(__file__).resolve().parents[2])
METHODS = {                             # the program, and its flags for the same losses
    **{name: ("sage", f"--method {name}") for name in ("input", "cutmix", "saliencymix", "sage")},
    **{name: ("sage", f"--method {name} --clean_lam 0") for name in ("puzzle", "comix")},
    "cutout": ("resizemix", "--resizemix False --cutout 16"),
    "resizemix": ("resizemix", "--resizemix True"),
    "softcrop": ("soft_aug", "--da 2 --loss st --rw off"),
    "occamix": ("safuse", "--method occamix"),
}


def program_step(room, args, net, info, images, labels, generator):
    """Leave the gradients of the program's own step."""
    step, scaler = importlib.import_module(f"{room}.main").training_step, torch.amp.GradScaler(
        enabled=False)
    if room == "sage":
        step(net, net, images, labels, args, info, 0, generator, scaler)
    elif room == "safuse":
        step(net, net, images, labels, args, info, True, generator, scaler)
    elif room == "soft_aug":
        step(net, images, labels, args, info, 0, generator, scaler)
    else:
        step(net, images, labels, args, info, generator, scaler)


def difference(method, words) -> float:
    """Return the largest difference of a weight after --steps steps of both."""
    room, flags = METHODS[method]
    args = importlib.import_module(f"{room}.main").parse_args(flags.split())
    source = ("digits", "") if words.data == "digits" else ("npz", words.data)
    loader, _, info = data.load(*source, batch_size=words.batch_size, device=torch.device("cpu"),
                                seed=1)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        more = {"initial_channels": words.initial_channels}
        nets.append(network.build("resnet18", info.num_classes, 32, decoder="none", **more)
                    if room == "safuse" else
                    models.build("preactresnet18", info.num_classes, 32, **more))
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in nets]
    mixer = torch.hub.load(ROOT, "mixer", source="local", method=method, mean=info.mean,
                           std=info.std, num_classes=info.num_classes)
    loss = softmax_bce if room == "sage" else soft_cross_entropy
    for step in range(words.steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        images, labels = next(batches)
        for optimizer in optimizers:
            optimizer.zero_grad()
        program_step(room, args, nets[0], info, images, labels, step_generator(1, 0, step))
        generator = step_generator(1, 0, step)
        mixed, targets = mixer(images, labels, nets[1], generator=generator)
        if method == "softcrop":
            confidence = targets.gather(1, labels[:, None])[:, 0]
            soft_target_loss(nets[1](mixed), labels, confidence, reweight=None).backward()
        else:
            loss(nets[1](mixed), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
    return max((a - b).abs().max().item() for a, b in zip(
        nets[0].parameters(), nets[1].parameters(), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="s20.npz", help="an .npz, or digits")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--initial_channels", type=int, default=16)
    words = parser.parse_args()
    for method in words.methods:
        start = time.perf_counter()
        gap = difference(method, words)
        print(f"{method:12} {words.steps} steps: {'the same weights' if gap == 0 else ''}"
              f"{f'at most {gap:.1e} apart' if gap else ''} "
              f"({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
