"""Batches of a data set that lies in memory, augmented all at once on the device."""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from common import distributed
from common.errors import DataError
from common.precision import full_precision


class ResizedCrop(NamedTuple):
    """Random crops of a share `scale` of the image, with sides in a ratio within `ratio`, resized
    by a filter, "bilinear" or "bicubic", that widens to shrink."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: str = "bilinear"


class Batches:
    """Iterates over (images (B, 3, H, W) float32 normalised, labels (B,) int64) on the device.

    With a seed: training batches, each epoch a new permutation, random crops (of the image with
    `padding` zeros around it or, with `reflect`, its reflection; or ResizedCrop's) and flips; every
    draw is a function of (seed, epoch) and of the image's place in the permutation, so the batches
    are the same on every device, with either loader, and however many ranks share them. Without:
    every image once, in order. With `resized_crop` all are resized to `size` (height, width).

    Of each batch of `batch_size` images a rank takes every world-th. In training a last partial
    batch is filled up from its own images so that all ranks do equally many steps of equal size;
    in evaluation nothing is repeated.
    """

    def __init__(self, images, labels, *, batch_size, device, mean, std, seed=None, padding=0,
                 flip=False, transform=None, transform_first=False, drop_last=False,
                 loader="auto", workers=2, reflect=False, resized_crop: ResizedCrop | None = None,
                 size: tuple[int, int] | None = None):
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.padding, self.flip = 0 if resized_crop else padding, flip
        self.transform, self.transform_first = transform, transform_first
        self.reflect, self.resized_crop = reflect, resized_crop
        self.count, self.stored = len(labels), images.shape[1:3]
        self.size = size or self.stored
        if reflect and self.padding >= min(self.stored):
            raise DataError(f"images of {self.stored[0]}×{self.stored[1]} pixels cannot be "
                                    f"padded by {self.padding} of their reflection")
        self.steps = self.count // batch_size if drop_last else -(-self.count // batch_size)
        if not self.steps:
            raise DataError(f"--batch_size {batch_size} is more than the "
                                    f"{self.count} training images")
        self.workers = workers
        self.dali = loader == "dali"        # auto: gathering in memory measures faster than DALI
        self.labels = torch.as_tensor(labels, device=device)
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        if self.dali:
            self.images = images
        else:
            stored = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            border = 0 if transform_first else self.padding
            self.windows = crops(pad(stored, border, reflect), self.stored)
        self.set_epoch(0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0):
        """Chooses the epoch's draws; iteration begins at start_step (to resume inside an epoch)."""
        self.epoch, self.start_step = epoch, start_step
        rows = torch.cat([self.rows(step) for step in range(self.steps)])
        if self.seed is None:
            self.order = rows.to(self.device)
            return
        generator = torch.Generator().manual_seed(distributed.seed_of(self.seed, "epoch", epoch))
        order = torch.randperm(self.count, generator=generator)
        shifts = torch.randint(0, 2 * self.padding + 1, (2, self.count), generator=generator)
        flips = (torch.rand(self.count, generator=generator) < 0.5) & self.flip
        boxes = torch.empty(4, self.count)
        if self.resized_crop:
            boxes = draw_boxes(self.count, self.stored, self.resized_crop, generator)
        self.drawn = order[rows], shifts[:, rows], flips[rows], boxes[:, rows]
        self.order, self.shifts, self.flips, self.boxes = (
            draw.to(self.device) for draw in self.drawn)

    def rows(self, step: int) -> torch.Tensor:
        """Places in the epoch's permutation that make up this rank's part of a batch."""
        rows = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.count))
        rank, world = distributed.rank(), distributed.world()
        if self.seed is not None and len(rows) % world:
            rows = rows[torch.arange(-(-len(rows) // world) * world) % len(rows)]
        return rows[rank::world]

    def __iter__(self):
        steps = range(self.start_step, self.steps)
        cropped = self.dali_crops(steps) if self.dali else map(self.torch_crops, steps)
        for step, images in zip(steps, cropped, strict=True):
            if not len(images):             # a rank without a share of the last test batch
                return
            if self.seed is not None and self.transform and not self.transform_first:
                images = self.transform(images, self.generator(step))
            yield self.normalise(images), self.labels[self.order[self.part(step)]]

    def part(self, step: int) -> slice:
        """This rank's images of a step, as a slice of its draws of the epoch."""
        size = self.batch_size // distributed.world()
        return slice(step * size, (step + 1) * size)

    def generator(self, step: int) -> torch.Generator:
        seed = distributed.seed_of(self.seed, "transform", self.epoch, step, distributed.rank())
        return torch.Generator().manual_seed(seed)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 to float32 in units of the data set's standard deviation."""
        return images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def torch_crops(self, step: int) -> torch.Tensor:
        """Flipped and cropped uint8 images of one step, one gather on the device."""
        part = self.part(step)
        index = self.order[part]
        if self.seed is None:
            images = self.windows[index, 0, 0]
            if self.size == self.stored:
                return images
            whole = torch.tensor([0, 0, *self.stored], device=self.device)[:, None]
            return resize_boxes(images, whole.expand(4, len(index)), self.size,
                                self.resized_crop.filter)
        shifts = tuple(self.shifts[:, part])
        if self.transform_first:
            images = self.transform(self.windows[index, 0, 0], self.generator(step))
            here = torch.arange(len(index), device=self.device)
            images = crops(pad(images, self.padding, self.reflect), self.stored)[(here, *shifts)]
        else:
            images = self.windows[(index, *shifts)]
        if self.resized_crop:
            images = resize_boxes(images, self.boxes[:, part], self.size, self.resized_crop.filter)
        if not self.flip:
            return images
        return torch.where(self.flips[part, None, None, None], images.flip(3), images)

    def dali_crops(self, steps):
        """The same images made by DALI, fed with the same draws (resized ones within rounding)."""
        from nvidia.dali import fn, pipeline_def, types

        def source(info):
            if info.iteration >= len(steps):
                raise StopIteration
            step = steps[info.iteration]
            order, shifts, flips, boxes = (draw[..., self.part(step)] for draw in self.drawn)
            images = self.images[order.numpy()]
            if self.transform_first:
                changed = self.transform(torch.from_numpy(images).permute(0, 3, 1, 2),
                                         self.generator(step))
                images = changed.permute(0, 2, 3, 1).contiguous().numpy()
            border = (self.padding, self.padding)
            images = np.pad(images, ((0, 0), border, border, (0, 0)),
                            "reflect" if self.reflect else "constant")
            if not self.resized_crop:
                boxes = torch.cat([shifts, torch.tensor(self.stored)[:, None].expand_as(shifts)])
            corner, sides = boxes.int().view(2, 2, -1).mT.contiguous().numpy()
            return images, corner, sides, flips.int().numpy()

        on_gpu = self.device.type == "cuda"
        filters = {"interp_type": {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[
            self.resized_crop.filter], "antialias": True} if self.resized_crop else {}

        @pipeline_def(batch_size=-(-self.batch_size // distributed.world()),
                      num_threads=self.workers,
                      device_id=self.device.index if on_gpu else None)
        def pipeline():
            images, corner, sides, mirror = fn.external_source(source, num_outputs=4,
                                                               batch_info=True)
            if on_gpu:
                images = images.gpu()
            images = fn.slice(images, corner, sides, axes=(0, 1))
            if self.resized_crop:
                images = fn.resize(images, size=self.size, **filters)
            return fn.crop_mirror_normalize(images, crop=self.size, mirror=mirror,
                                            dtype=types.UINT8, output_layout="CHW")

        pipe = pipeline()
        for _ in steps:
            images, = pipe.run()
            yield torch.from_dlpack(images.as_tensor()).clone()


def pad(images: torch.Tensor, border: int, reflect: bool = False) -> torch.Tensor:
    """(N, C, H, W) images with `border` pixels more on each side: zeros, or their reflection."""
    if not reflect:
        return torch.nn.functional.pad(images, (border,) * 4)
    for dim in (2, 3):
        last = images.shape[dim] - 1
        place = torch.arange(-border, last + border + 1, device=images.device).abs()
        images = images.index_select(dim, last - (last - place).abs())
    return images


def draw_boxes(count: int, size, crop: ResizedCrop, generator: torch.Generator) -> torch.Tensor:
    """Crops (4, count) of (top, left, height, width) int64 in images of `size` (height, width).

    Area and ratio are drawn ten times, the first that fits is taken, as torchvision's
    RandomResizedCrop does; else the largest central crop within the range of ratios.
    """
    height, width = size
    share, turn = torch.rand(2, 10, count, generator=generator)
    area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * share)
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = (low + (high - low) * turn).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round().long()
    limit = torch.tensor([height, width])
    fits = ((sides > 0) & (sides <= limit[:, None, None])).all(0)
    sides = sides.gather(1, fits.int().argmax(0).expand(2, 1, -1))[:, 0]
    least = round(min(height, width / crop.ratio[0])), round(min(width, height * crop.ratio[1]))
    sides = torch.where(fits.any(0), sides, torch.tensor(least)[:, None])
    place = torch.rand(2, count, generator=generator)
    corner = (place * (limit[:, None] - sides + 1)).long()
    corner = torch.where(fits.any(0), corner, (limit[:, None] - sides) // 2)
    return torch.cat([corner, sides])


def resize_boxes(images: torch.Tensor, boxes: torch.Tensor, size, filter: str) -> torch.Tensor:
    """Crops `boxes` (4, B) of (top, left, height, width) of (B, C, H, W) uint8 images, each resized
    to `size` (height, width): antialiased, by two products with the filter's weights."""
    crops = images.float()
    for dim, (begin, length) in ((2, boxes[0::2]), (3, boxes[1::2])):
        weights = taps(begin, length, images.shape[dim], size[dim - 2], filter)[:, None]
        with full_precision(images.device.type):            # TF32 would change 2 % of the bytes
            crops = weights @ crops if dim == 2 else crops @ weights.mT
    return crops.round_().clamp_(0, 255).to(torch.uint8)


def taps(begin: torch.Tensor, length: torch.Tensor, before: int, after: int, filter: str
         ) -> torch.Tensor:
    """Weights (B, after, before) that resize pixels [begin, begin + length) (B,) of a side."""
    scale = (length / after)[:, None, None]
    place = torch.arange(before, device=begin.device)
    inside = (place >= begin[:, None]) & (place < (begin + length)[:, None])
    centre = (torch.arange(after, device=begin.device)[:, None] + 0.5) * scale \
        + begin[:, None, None]
    x = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    if filter == "bicubic":                     # Keys' cubic with a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def crops(images: torch.Tensor, size) -> torch.Tensor:
    """All windows of `size` in (N, C, H, W) images as a view (N, rows, columns, C, *size)."""
    return images.unfold(2, size[0], 1).unfold(3, size[1], 1).permute(0, 2, 3, 1, 4, 5)


@functools.cache
def _on_device(mean: tuple, std: tuple, device):
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))


def statistics(info, device) -> tuple[torch.Tensor, torch.Tensor]:
    """info.mean and info.std as (3, 1, 1) tensors, made once: to make them waits for a GPU."""
    return _on_device(tuple(info.mean), tuple(info.std), device)


def unnormalise(images: torch.Tensor, info) -> torch.Tensor:
    """Normalised images (..., 3, H, W) as pixels in [0, 1]."""
    mean, std = statistics(info, images.device)
    return images * std + mean


def to_uint8(images: torch.Tensor, info) -> torch.Tensor:
    """Normalised images back to uint8 pixels, rounded."""
    return unnormalise(images, info).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def to_arrays(images: torch.Tensor, info) -> np.ndarray:
    """Normalised images (B, 3, H, W) as (B, H, W, 3) uint8 arrays, for drawing."""
    return to_uint8(images, info).permute(0, 2, 3, 1).cpu().numpy()
