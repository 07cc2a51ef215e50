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
from skimage import data, measure
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resize

from common import plots, runtime
from safuse import main as safuse
from safuse import network, superpixels

CLOCK = [time.perf_counter]
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
            start = CLOCK[0]()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(1000 * (CLOCK[0]() - start))
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
    n = torch.randint(low, high + 1, (len(images),), generator=torch.Generator().manual_seed(0))
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


def steps(images: torch.Tensor, size: int, args, device):
    """Mixing alone, the plain step and the mixed step of safuse/main.py's own functions."""
    batch = args.batch or SETTINGS[size][0]
    images, labels = images[:batch].to(device), torch.randint(0, 100, (batch,)).to(device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    flags = ["--method", args.method, "--image_size", str(size), "--arch",
             args.arch32 if size == 32 else args.arch224, "--amp", args.amp]
    flags += ["--dataset", "cub200"] if size == 224 else []
    ours, theirs = (safuse.parse_args([*flags, "--superpixels", kind])
                    for kind in ("slic", "skimage"))
    info = argparse.Namespace(num_classes=100, mean=(0, 0, 0), std=(1, 1, 1))
    net = network.Network(ours.arch, 100, size, initial_channels=args.initial_channels,
                        decoder=safuse.DECODERS.get(args.method, "none")).to(device)
    net = net.to(memory_format=torch.channels_last) if args.channels_last else net
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step(mixed: bool):
        net.zero_grad()
        safuse.training_step(net, net, images, labels, ours, info, mixed, generator, scaler)

    mixers = {}
    if args.method != "baseline":
        mixers["mixing"] = lambda: safuse.mix_batch(net, images, ours, info, generator)
    if args.method != "baseline" and not args.no_skimage:
        mixers["mixing, scikit-image"] = \
            lambda: safuse.mix_batch(net, images, theirs, info, generator)
    times = timed(device, args.rounds, mixers)
    if args.rounds_step:
        times |= timed(device, args.rounds_step, {
            "plain step": lambda: step(False),
            "mixed step": lambda: step(args.method != "baseline")})
    print(f"\n{args.method}: batch {batch} at {size}×{size}, {ours.arch} with "
          f"{args.initial_channels} channels, {ours.amp}")
    for name, (middle, best) in times.items():
        print(f"{name:24s} {middle:9.2f} ms (best {best:.2f})")
    if args.rounds_step:
        ratio = [m / p for m, p in zip(times["mixed step"], times["plain step"], strict=True)]
        print(f"mixed / plain step {ratio[0]:.3f} (best {ratio[1]:.3f})", flush=True)


def picture(path: str):
    """Photographs with the borders of our superpixels above those of scikit-image's."""
    images = photographs(224, 6, seed=3)
    rows, counts = {}, []
    for name, slic in (("ours", superpixels.slic), ("scikit-image", superpixels.slic_skimage)):
        labels = slic(images, 35, 8.0)
        rows[name] = superpixels.borders(images, labels).permute(0, 2, 3, 1).numpy()
        counts.append(labels.flatten(1).amax(1) + 1)
    captions = [f"{ours} and {theirs} superpixels" for ours, theirs in zip(*counts, strict=True)]
    plots.grid(path, "35 superpixels wanted, compactness 8", rows, captions, side=1.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help=".npz with train_images (N, 32, 32, 3) uint8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu_time", action="store_true", help="processor time, of all threads")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--method", default="safuse", choices=safuse.METHODS)
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--channels_last", type=int, choices=[0, 1], default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rounds_step", type=int, default=3, help="0: no training steps")
    parser.add_argument("--arch32", default="resnet18", choices=network.ARCHS)
    parser.add_argument("--arch224", default="resnet18", choices=network.ARCHS)
    parser.add_argument("--initial_channels", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], choices=SETTINGS)
    parser.add_argument("--no_skimage", action="store_true")
    parser.add_argument("--batch", type=int, help="images of a step (default: the papers')")
    parser.add_argument("--no_table", action="store_true", help="steps alone")
    parser.add_argument("--picture", help="PNG to draw, and no measurements")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture)
    device = torch.device(args.device)
    if args.cpu_time:
        CLOCK[0] = time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        runtime.tune_cpu_memory()
    name = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    for size in args.sizes:
        images = photographs(size, max(64 if size == 32 else 24, args.batch or 0))
        if size == 32 and args.data:
            with np.load(args.data) as arrays:
                chosen = arrays["train_images"][::len(arrays["train_images"]) // 128]
            images = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255
        if not args.no_table:
            superpixel_table(images, size, args, device)
        steps(images, size, args, device)


if __name__ == "__main__":
    main()
