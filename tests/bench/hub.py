#!/usr/bin/env python3
"""Whether a loop with a torch.hub mixer trains the network that the program itself trains.

    python tests/bench/hub.py --data s20.npz

Both take --steps steps with the same draws, from the same weights; printed is the largest
difference of a weight. The loop's loss is cross-entropy with soft targets, but of SoftCrop the
program's divergence: equal but for rounding, which 200 steps would enlarge. superpixels: SAFuse's
own mixture, its label by area on both sides (attention needs SAFuse's network). samix: the module
with `update()` beside samix/main.py's step.
"""
import argparse
import copy
import importlib
import itertools
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from common import data, models
from common.distributed import step_generator
from common.mixing import softmax_bce
from safuse import main as safuse
from safuse import network
from safuse.mixing import area_ratio
from samix import main as samix
from soft_aug.losses import soft_target_loss

ROOT = str(Path(__file__).resolve().parents[2])
METHODS = {                             # the program, and its flags for the same losses
    **{name: ("sage", f"--method {name}") for name in ("input", "cutmix", "saliencymix", "sage")},
    **{name: ("sage", f"--method {name} --clean_lam 0") for name in ("puzzle", "comix")},
    "cutout": ("resizemix", "--resizemix False --cutout 16"),
    "resizemix": ("resizemix", "--resizemix True"),
    "softcrop": ("soft_aug", "--da 2 --loss st --rw off"),
    "occamix": ("safuse", "--method occamix"),
    "superpixels": ("safuse", "--method safuse"),
    "samix": ("samix", "--method samix --epochs 10"),
}


def program_step(room, args, net, info, images, labels, generator):
    """Leave the gradients of the program's own step."""
    if room == "safuse" and args.method == "safuse":
        mixed = safuse.mix_batch(None, images, args, info, generator)
        counts = network.superpixel_pool(images, mixed.fused, mixed.from_b.shape[1])[1]
        targets = safuse.soft_targets(labels, mixed.perm, 1 - area_ratio(counts, mixed.from_b),
                                      info.num_classes)
        return torch.nn.functional.cross_entropy(net(mixed.images), targets).backward()
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


def load(words):
    source = ("digits", "") if words.data == "digits" else ("npz", words.data)
    return data.load(*source, batch_size=words.batch_size, device=torch.device("cpu"), seed=1)


def endless(loader):
    """Yield the batches of epoch after epoch."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def largest(first, second) -> float:
    """Return the largest difference of a parameter of two networks."""
    return max((a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(),
                                                          strict=True))


def difference(method, words) -> float:
    """Return the largest difference of a weight after --steps steps of both."""
    room, flags = METHODS[method]
    args = importlib.import_module(f"{room}.main").parse_args(flags.split())
    loader, _, info = load(words)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        more = {"initial_channels": words.initial_channels}
        nets.append(network.Network("resnet18", info.num_classes, 32, decoder="none", **more)
                    if room == "safuse" else
                    models.build("preactresnet18", info.num_classes, 32, **more))
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in nets]
    mixer = torch.hub.load(ROOT, "mixer", source="local", method=method, mean=info.mean,
                           std=info.std, num_classes=info.num_classes)
    loss = softmax_bce if room == "sage" else torch.nn.functional.cross_entropy
    for step, (images, labels) in zip(range(words.steps), endless(loader), strict=False):
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
    return largest(*nets)


def difference_of_samix(words) -> float:
    """Return the largest difference of a weight between samix/main.py's loop and the module's."""
    args = samix.parse_args(f"{METHODS['samix'][1]} --dataset digits --initial_channels "
                            f"{words.initial_channels}".split())
    loader, _, info = load(words)
    torch.manual_seed(0)
    net = samix.build(args, info).train()
    backbone, total = copy.deepcopy(net.q.backbone), args.epochs * len(loader)
    module = torch.hub.load(ROOT, "samix", backbone, info.num_classes, source="local",
                            image_size=info.image_size, total_steps=total).train()
    module.net.load_state_dict(net.state_dict())
    optimizers = [torch.optim.SGD([p for p in part.parameters() if p.requires_grad], 0.05,
                                  momentum=0.9) for part in (net, module)]
    scaler = torch.amp.GradScaler(enabled=False)
    for step, (images, labels) in zip(range(words.steps), endless(loader), strict=False):
        for optimizer in optimizers:
            optimizer.zero_grad()
        samix.training_step(net, images, labels, args, info, step_generator(1, 0, step), scaler,
                            samix.cosine(step, total))
        module.draws = partial(step_generator, 1, 0, step)
        module(images, labels)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
        samix.momentum_update(net.k, net.q, samix.ema_momentum(step, total, args.ema_base,
                                                               args.ema_end, args.ema_start))
        module.update()
    return largest(net, module.net)


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
        gap = difference_of_samix(words) if method == "samix" else difference(method, words)
        print(f"{method:12} {words.steps} steps: {'the same weights' if gap == 0 else ''}"
              f"{f'at most {gap:.1e} apart' if gap else ''} "
              f"({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
