"""Milliseconds of ResizeMix's mixing, and images per second of the ImageNet loaders.

    python tests/bench/resizemix.py mixing --tune [--device cpu|cuda]
    python tests/bench/resizemix.py loader [--tune] [--data DIR] [--device cpu|cuda] [--workers 2]

mixing: `resize_mix` beside the loop over images that it replaces, for small, middle and large
scales. loader: DALI's training pipeline and the DataLoader of `--loader torch` beside the usual
torchvision recipe (ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize, DataLoader), on the
same JPEGs: those of DIR/train, or 768 made for the purpose (500×375 pixels). --tune gives all of
them the memory settings of our programs, which also spare the usual recipe its page faults.
"""
import argparse
import resource
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
from pictures import photographs

from common import flags, runtime
from common.data import Recipe, stream
from common.data.lists import as_files, list_classes
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
    """Shortest time of a call: what it takes when nothing else wants the cores."""
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[3:])


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


def make_images(root: Path, per_class: int = 96):
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


def cpu_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(loader, device, epochs=1) -> tuple[float, float]:
    """Images per second and processor ms per image over whole epochs, workers' start included."""
    count, start, used = 0, time.perf_counter(), cpu_seconds()
    for epoch in range(epochs):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for images, labels in loader:
            count += len(images.to(device, non_blocking=True))
            labels.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start), 1000 * (cpu_seconds() - used) / count


def loaders(args, device):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.data or folder)
        if not args.data:
            make_images(root)

        def ours(loader):
            kind = stream.DaliStream if loader == "dali" else stream.TorchStream
            usual = Recipe(crop="resized", test_crop="centre", flip=True, mean=MEAN, std=STD,
                           interpolation="lanczos")
            files = as_files(root / "train", list_classes(root / "train"))
            return kind(files, usual, image_size=224, train=True, batch_size=args.batch_size,
                        device=device, workers=args.workers)

        candidates = {"torchvision recipe": recipe(root, args, device),
                      "ours, torch": ours("torch"), "ours, DALI": ours("dali")}
        found = {name: [] for name in candidates}
        for _ in range(args.repeats):                       # in turn: the machine's mood is shared
            for name, loader in candidates.items():
                found[name].append(measure(loader, device))
        print(f"{'':>20} {'images/s':>9} {'ratio':>6} {'CPU ms/image':>13} {'ratio':>6}")
        (rate0, cost0), *_ = (best(pairs) for pairs in found.values())
        for name, pairs in found.items():
            rate, cost = best(pairs)
            print(f"{name:>20} {rate:>9.0f} {rate / rate0:>6.2f} {cost:>13.2f} "
                  f"{cost0 / cost:>6.2f}")


def best(pairs):
    """Highest rate and lowest cost of several measurements."""
    return max(rate for rate, _ in pairs), min(cost for _, cost in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["mixing", "loader"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", help="folder with train/<class>/*.jpg")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    flags.add_boolean(parser.add_argument, "--tune", False,
                        "with runtime's memory settings, as main.py runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.tune:
        runtime.tune_cpu_memory()
    {"mixing": mixing, "loader": loaders}[args.what](args, device)


if __name__ == "__main__":
    main()
