"""Milliseconds of ResizeMix's mixing, and images per second of the ImageNet loaders.

    python tests/bench/resizemix.py mixing [--device cpu|cuda]
    python tests/bench/resizemix.py loader [--data DIR] [--device cpu|cuda] [--workers 2]

mixing: `resize_mix` beside the loop over images that it replaces, for small, middle and large
scales. loader: DALI's training pipeline and the DataLoader of `--loader torch` beside the usual
torchvision recipe (ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize, DataLoader), on the
same JPEGs: those of DIR/train, or 256 made for the purpose (500×375 pixels).
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from test_imagenet import photographs

from common import runtime
from common.data import imagenet
from resizemix.mixing import draw_corners, resize_mix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loop(images, perm, scale, corners):
    """What resize_mix does, one image after the other."""
    small, mixed = F.interpolate(images, scale_factor=scale), images.clone()
    h, w = small.shape[2:]
    for i, (y, x) in enumerate(corners.tolist()):
        mixed[i, :, y:y + h, x:x + w] = small[perm[i]]
    return mixed


def seconds(call, device, repeats):
    """Median time of a call."""
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[3:])[repeats // 2]


def mixing(args, device):
    generator = torch.Generator().manual_seed(0)
    print(f"{'images':>18} {'scale':>6} {'resize_mix':>11} {'loop':>9}  ratio")
    for n, side, repeats in ((256, 32, 60), (64, 224, 12)):
        images = torch.randn(n, 3, side, side, generator=generator).to(device)
        perm = torch.randperm(n, generator=generator).to(device)
        for scale in (0.1, 0.45, 0.8):
            corners = draw_corners(n, (side, side), scale, generator)
            assert torch.equal(resize_mix(images, perm, scale, corners)[0],
                               loop(images, perm, scale, corners))
            ours, theirs = (1000 * seconds(lambda f=f, s=scale, c=corners, x=images, p=perm:
                                           f(x, p, s, c), device, repeats)
                            for f in (resize_mix, loop))
            print(f"{n:>8} × 3×{side:>3}² {scale:>6} {ours:>8.2f} ms {theirs:>6.2f} ms  "
                  f"{ours / theirs:.2f}")


def make_images(root: Path, per_class: int = 32):
    """JPEGs of 500×375 pixels, cut from photographs, in class folders below root/train."""
    generator = torch.Generator().manual_seed(0)
    for label, photo in enumerate(photographs()):
        place = root / "train" / f"class {label}"
        place.mkdir(parents=True)
        photo = photo.resize((700, 525), Image.Resampling.LANCZOS)
        for number in range(per_class):
            x, y = (int(torch.randint(limit, (), generator=generator)) for limit in (200, 150))
            photo.crop((x, y, x + 500, y + 375)).save(place / f"{number}.jpg", quality=92)


def recipe(root: Path, args, device):
    """The usual torchvision training loader."""
    transform = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return DataLoader(datasets.ImageFolder(root / "train", transform), args.batch_size,
                      shuffle=True, num_workers=args.workers, pin_memory=device.type == "cuda")


def images_per_second(loader, device, epochs=2) -> float:
    """Over whole epochs, workers' or pipelines' start included."""
    count, start = 0, time.perf_counter()
    for epoch in range(epochs):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for images, labels in loader:
            count += len(images.to(device, non_blocking=True))
            labels.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def loaders(args, device):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.data or folder)
        if not args.data:
            make_images(root)

        def ours(loader):
            return imagenet.streaming(root, split="train", image_size=224, train=True, mean=MEAN,
                                      std=STD, batch_size=args.batch_size, device=device, seed=0,
                                      loader=loader, workers=args.workers)

        candidates = {"torchvision recipe": recipe(root, args, device),
                      "ours, torch": ours("torch"), "ours, DALI": ours("dali")}
        rates = {name: [] for name in candidates}
        for _ in range(args.repeats):                       # in turn: the machine's mood is shared
            for name, loader in candidates.items():
                rates[name].append(images_per_second(loader, device))
        reference = sorted(rates["torchvision recipe"])[args.repeats // 2]
        for name, found in rates.items():
            rate = sorted(found)[args.repeats // 2]
            print(f"{name:>20} {rate:>7.0f} images/s  {rate / reference:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["mixing", "loader"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", help="folder with train/<class>/*.jpg")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    runtime.tune_cpu_memory()
    {"mixing": mixing, "loader": loaders}[args.what](args, device)


if __name__ == "__main__":
    main()
