#!/usr/bin/env python3
"""SAFuse's superpixels beside scikit-image's, cost of the mixing, and of the mixed training step.

    python tests/bench/safuse.py                                # photographs that ship with skimage
    python tests/bench/safuse.py --data s20.npz --threads 2     # 32×32 from an .npz of images
    python tests/bench/safuse.py --device cuda --arch224 resnet50 --no_skimage
    python tests/bench/safuse.py --picture superpixels.png      # both side by side

Prints, for 32×32 and 224×224: share of colour variance within superpixels, their mean number, share
of connected ones, milliseconds an image; then milliseconds of mixing a batch, superpixels included;
then the plain and the mixed step. What is compared takes turns; times are the median and the best.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data, measure, segmentation
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resize

from common import runtime
from safuse import losses, mixing, network, superpixels

# image size: batch, segments from, to
SETTINGS = {32: (32, 25, 30), 224: (8, 30, 40)}


def photographs(size: int, count: int, seed: int = 0) -> torch.Tensor:
    """Random square crops (count, 3, size, size) in [0, 1] of shipped photographs."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina(),
                data.stereo_motorcycle()[0], *load_sample_images().images]
    generator = np.random.default_rng(seed)
    crops = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(min(picture.shape[:2]) * generator.uniform(0.5, 1))
        top, left = (generator.integers(length - side + 1) for length in picture.shape[:2])
        crop = torch.from_numpy(picture[top:top + side, left:left + side].copy())
        crops.append(resize(crop.permute(2, 0, 1), [size, size]))
    return torch.stack(crops).float() / 255


def plain_grid(images: torch.Tensor, n_segments: torch.Tensor, compactness: float) -> torch.Tensor:
    """The cells of the grid that both start from, as the baseline of quality."""
    height, width = images.shape[2:]
    parts = superpixels.grid(n_segments, len(images), height, width)
    flat = torch.zeros(len(images), 3, height * width, device=images.device)
    return superpixels.kmeans(flat, *parts, height, width, 1)


def timed(device, rounds: int, functions: dict) -> dict[str, str]:
    """'median (best)' milliseconds of each function, taking turns; two rounds do not count."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(1000 * (time.perf_counter() - start))
    return {name: (statistics.median(values[2:]), min(values[2:]))
            for name, values in seconds.items()}


def quality(images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    """Means over images: unexplained colour variance, superpixels, share of them connected."""
    rows = []
    for image, one in zip(images.flatten(2).cpu().numpy(), labels.cpu().numpy(), strict=True):
        flat = one.ravel()
        sizes = np.bincount(flat)
        means = np.stack([np.bincount(flat, channel) / sizes.clip(1) for channel in image])
        rest = ((image - means[:, flat]) ** 2).sum()
        count = len(np.unique(flat))
        pieces = measure.label(one, connectivity=1, background=-1).max()
        rows.append((rest / ((image - image.mean(1, keepdims=True)) ** 2).sum(), count,
                     count / pieces))
    return tuple(np.mean(rows, 0))


def superpixel_table(images: torch.Tensor, size: int, args, device):
    """One line a method."""
    batch, low, high = SETTINGS[size]
    n = mixing.draw_segments(len(images), low, high, torch.Generator().manual_seed(0))
    methods = {"ours": superpixels.slic, "scikit-image": superpixels.slic_skimage,
               "grid": plain_grid}
    if args.no_skimage:
        del methods["scikit-image"]
    few, images = images[:batch].to(device), images.to(device)
    times = timed(device, args.rounds,
                  {name: lambda slic=slic: slic(few, n[:batch], 8.0)
                   for name, slic in methods.items()})
    print(f"\n{size}×{size}, {len(images)} images, {low} to {high} segments, compactness 8\n"
          "| superpixels | within-variance | number | connected | ms/image median (best) |\n"
          "|---|---|---|---|---|")
    for name, slic in methods.items():
        share, count, connected = quality(images, slic(images, n, 8.0))
        middle, best = (t / len(few) for t in times[name])
        print(f"| {name} | {share:.4f} | {count:.2f} | {connected:.3f} | "
              f"{middle:.3f} ({best:.3f}) |", flush=True)


def mix(images: torch.Tensor, size: int, slic, generator: torch.Generator):
    """A batch mixed as in training: one segmentation of each image serves in both roles."""
    batch, low, high = SETTINGS[size]
    perm = torch.randperm(batch, generator=generator)
    most = superpixels.most_superpixels(torch.arange(low, high + 1), size, size)
    labels = slic(images, mixing.draw_segments(batch, low, high, generator), 8.0)
    chosen = mixing.draw_chosen(batch, most, 0.5, generator)
    place = perm.to(images.device)
    return perm, mixing.superpixel_mix(images, perm, labels, labels[place], chosen, num_a=most)


def mixed_loss(net, images, labels, perm, mixed, fused, from_b):
    """SAFuse's total loss of a mixed batch (spec of the paper's CIFAR-100 ResNet-18)."""
    logits, local, scores, counts = net(mixed, fused, from_b.shape[1])
    weights = scores.sigmoid()
    index, kept = mixing.top_superpixels(scores, counts, 0.7, at_least_one=False)
    ratio = (mixing.area_ratio(counts, from_b)
             + mixing.attention_ratio(weights, counts, from_b)) / 2
    local = local.gather(1, index[..., None].expand(-1, -1, local.shape[2]))
    classes = losses.superpixel_labels(labels, perm, from_b).gather(1, index)
    weights = weights.gather(1, index)
    other = labels[perm.to(labels.device)]
    whole = ((1 - ratio) * F.cross_entropy(logits, labels, reduction="none")
             + ratio * F.cross_entropy(logits, other, reduction="none")).mean()
    return whole + 0.03 * losses.local_cross_entropy(local, classes, kept, weights) \
        + 0.05 * losses.superpixel_contrastive(local, classes, kept, weights)


def steps(images: torch.Tensor, size: int, args, device):
    """Mixing alone, the plain step and the mixed step, of the network the methods train."""
    batch = SETTINGS[size][0]
    images, labels = images[:batch].to(device), torch.randint(0, 100, (batch,)).to(device)
    generator = torch.Generator().manual_seed(1)
    mixers = {"mixing": lambda: mix(images, size, superpixels.slic, generator)}
    if not args.no_skimage:
        mixers["mixing, scikit-image"] = \
            lambda: mix(images, size, superpixels.slic_skimage, generator)
    arch = args.arch32 if size == 32 else args.arch224
    net = network.build(arch, 100, size, initial_channels=args.initial_channels).to(device)

    def plain():
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()

    def mixed():
        net.zero_grad()
        perm, parts = mix(images, size, superpixels.slic, generator)
        mixed_loss(net, images, labels, perm, *parts).backward()

    times = timed(device, args.rounds, mixers)
    if args.rounds_step:
        times |= timed(device, args.rounds_step, {"plain step": plain, "mixed step": mixed})
    print(f"\nbatch {batch} at {size}×{size}, {arch} with {args.initial_channels} channels")
    for name, (middle, best) in times.items():
        print(f"{name:24s} {middle:9.2f} ms (best {best:.2f})")
    if args.rounds_step:
        ratio = [m / p for m, p in zip(times["mixed step"], times["plain step"], strict=True)]
        print(f"mixed / plain step {ratio[0]:.3f} (best {ratio[1]:.3f})", flush=True)


def picture(path: str):
    """Photographs with the borders of our superpixels above those of scikit-image's."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    images = photographs(224, 6, seed=3)
    figure, axes = plt.subplots(2, 6, figsize=(10, 3.6), layout="constrained")
    for line, name, slic in zip(axes, ("ours", "scikit-image"),
                                (superpixels.slic, superpixels.slic_skimage), strict=True):
        labels = slic(images, 35, 8.0).numpy()
        for axis, image, one in zip(line, images, labels, strict=True):
            axis.imshow(segmentation.mark_boundaries(image.permute(1, 2, 0).numpy(), one,
                                                     color=(1, 1, 0), mode="inner"))
            axis.set(xticks=[], yticks=[], xlabel=f"{one.max() + 1} superpixels")
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help=".npz with train_images (N, 32, 32, 3) uint8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rounds_step", type=int, default=3, help="0: no training steps")
    parser.add_argument("--arch32", default="resnet18", choices=network.ARCHS)
    parser.add_argument("--arch224", default="resnet18", choices=network.ARCHS)
    parser.add_argument("--initial_channels", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], choices=SETTINGS)
    parser.add_argument("--no_skimage", action="store_true")
    parser.add_argument("--picture", help="PNG to draw, and no measurements")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        runtime.tune_cpu_memory()
    name = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    for size in args.sizes:
        images = photographs(size, 64 if size == 32 else 24)
        if size == 32 and args.data:
            with np.load(args.data) as arrays:
                chosen = arrays["train_images"][::len(arrays["train_images"]) // 128]
            images = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255
        superpixel_table(images, size, args, device)
        steps(images, size, args, device)


if __name__ == "__main__":
    main()
