"""Images per second of Soft Augmentation's input pipeline, beside one image at a time.

    python tests/bench/soft_aug.py [--batch_size 128] [--size 32] [--device cpu|cuda]

Batches of random bytes go through flip, (RandAugment,) normalisation and SoftCrop. The reference
does the same to one PIL image after the other, on one core, with torchvision's transforms.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import runtime
from common.randaugment import draw_randaugment, rand_augment
from soft_aug.softcrop import confidence, draw_offsets, soft_crop

MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


def batched(images, mean, std, generator, randaugment):
    """Flip, RandAugment, normalisation, SoftCrop, confidence of a batch of bytes."""
    n, channels, *size = images.shape
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device, non_blocking=True)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    if randaugment:
        images = rand_augment(images, *draw_randaugment(n, generator))
    images = images.float().sub_(mean).mul_(1 / std)
    crops, visible = soft_crop(images, draw_offsets(n, size, 12.0, generator),
                               0.01 * torch.randn(n, channels, generator=generator))
    return crops, confidence(visible, 100, power=2.0)


def one_by_one(randaugment):
    """The same for one PIL image."""
    transform = v2.Compose([
        v2.RandomHorizontalFlip(), *([v2.RandAugment()] if randaugment else []), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def run(picture):
        image = transform(picture)
        crop, visible = soft_crop(image[None], draw_offsets(1, image.shape[1:], 12.0),
                                  0.01 * torch.randn(1, 3))
        return crop[0], confidence(visible, 100, power=2.0)
    return run


def milliseconds(call, device, repeats):
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
    return 1000 * sorted(times[3:])[repeats // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    device = torch.device(args.device)
    runtime.tune_cpu_memory()
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.size, args.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1)
                 for values in (MEAN, STD))
    pictures = [Image.fromarray(np.ascontiguousarray(image))
                for image in images[:64].permute(0, 2, 3, 1).cpu().numpy()]
    print(f"{device}, {torch.get_num_threads()} threads, batches of {shape}")
    for randaugment in (False, True):
        took = milliseconds(lambda on=randaugment: batched(images, mean, std, generator, on),
                            device, args.repeats)
        run = one_by_one(randaugment)
        each = milliseconds(lambda run=run: [run(picture) for picture in pictures],
                            torch.device("cpu"), 5) / len(pictures)
        print(f"flip{' + RandAugment' * randaugment} + normalisation + SoftCrop: "
              f"{1000 * args.batch_size / took:,.0f} images/s ({took:.2f} ms a batch); "
              f"one by one {1000 / each:,.0f} images/s")


if __name__ == "__main__":
    main()
