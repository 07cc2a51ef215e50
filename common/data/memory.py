"""Batches of a data set that lies in memory, augmented all at once on the device."""
import math

import torch
from torchvision.transforms.functional import pad

from common import distributed
from common.data.recipe import Recipe, normalise
from common.errors import DataError
from common.precision import full_precision


class MemoryBatches:
    """Iterates over (images (B, 3, H, W) float32 normalised, labels (B,) int64) on the device.
    seed given: training; every draw is a function of (seed, epoch) and of the image's position in
    the epoch's permutation: the same on every device, with either loader, over any number of ranks
    (the recipe's `transform`: for each rank its own).
    seed None: every image once, in stored order. Of each batch of `batch_size` images a rank takes
    every world-th; in training a partial one is filled up from its own images, so that all ranks do
    equally many steps of equal size. size: (height, width) of resized images."""

    def __init__(self, images, labels, recipe: Recipe, *, size, batch_size, device, seed=None,
                 drop_last=False, loader="auto", workers=2):
        filters = ("bilinear", "bicubic", "lanczos")[:2 if recipe.crop == "resized" else 3]
        recipe.check("a set in memory", crop=("padded", "resized"), resize=(None,),
                     color_jitter=(0,), test_crop=(None, "whole"), interpolation=filters,
                     padding_mode=("constant", "reflect"))
        self.recipe, self.batch_size, self.device, self.seed = recipe, batch_size, device, seed
        self.count, self.stored, self.size = len(labels), images.shape[1:3], size
        self.workers = workers
        self.steps = -(-self.count // batch_size)
        if drop_last and self.count > batch_size:
            self.steps = self.count // batch_size
        self.dali = loader == "dali"        # auto: gathering in memory measures faster than DALI
        self.home = torch.device("cpu") if self.dali else device
        self.labels = torch.as_tensor(labels, device=self.home)
        stored = torch.from_numpy(images).to(self.home).permute(0, 3, 1, 2)
        if recipe.padding_mode == "reflect" and recipe.padding >= min(self.stored):
            raise DataError(f"images of {self.stored[0]}×{self.stored[1]} pixels cannot be padded "
                            f"by {recipe.padding} of their reflection")
        self.windows = self.all_windows(stored, 0 if recipe.transform_first else recipe.padding)
        self.set_epoch(0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0):
        """Choose the epoch's draws; iteration begins at start_step (to resume inside an epoch)."""
        self.epoch, self.start_step = epoch, start_step
        rows = torch.cat([self.rows(step) for step in range(self.steps)])
        generator = torch.Generator().manual_seed(distributed.seed_of(self.seed, "epoch", epoch))
        order = torch.arange(self.count) if self.seed is None else \
            torch.randperm(self.count, generator=generator)
        shifts = torch.randint(0, 2 * self.recipe.padding + 1, (2, self.count), generator=generator)
        flips = (torch.rand(self.count, generator=generator) < 0.5) & bool(self.recipe.flip)
        boxes = torch.tensor([0, 0, *self.stored])[:, None].expand(4, self.count)
        if self.recipe.crop == "resized":
            boxes = draw_boxes(self.count, self.stored, self.recipe.scale, self.recipe.ratio,
                               generator)
        self.order, self.shifts, self.flips, self.boxes = (
            draw[..., rows].to(self.home) for draw in (order, shifts, flips, boxes))

    def rows(self, step: int) -> torch.Tensor:
        """Return the positions in the epoch's permutation of this rank's part of a batch."""
        rows = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.count))
        rank, world = distributed.rank(), distributed.world()
        if self.seed is not None and len(rows) % world:
            rows = rows[torch.arange(-(-len(rows) // world) * world) % len(rows)]
        return rows[rank::world]

    def __iter__(self):
        steps = range(self.start_step, self.steps)
        made = self.by_dali(steps) if self.dali else map(self.by_torch, steps)
        for step, images in zip(steps, made, strict=True):
            if not len(images):             # a rank without a share of the last test batch
                return
            if self.recipe.transform and not self.recipe.transform_first:
                images = self.transformed(images, step)
            labels = self.labels[self.order[self.part(step)]].to(self.device, non_blocking=True)
            yield normalise(images, self.recipe), labels

    def part(self, step: int) -> slice:
        """Return this rank's images of a step, as a slice of its draws of the epoch."""
        size = self.batch_size // distributed.world()
        return slice(step * size, (step + 1) * size)

    def transformed(self, images: torch.Tensor, step: int) -> torch.Tensor:
        seed = distributed.seed_of(self.seed, "transform", self.epoch, step, distributed.rank())
        return self.recipe.transform(images, torch.Generator().manual_seed(seed))

    def all_windows(self, images: torch.Tensor, border: int) -> torch.Tensor:
        """Return windows (N, rows, columns, C, *stored) of padded images (N, C, H, W), a view."""
        images = torch.cat([pad(piece, [border], padding_mode=self.recipe.padding_mode)
                            for piece in images.split(1000)])       # they may be floats inside
        return images.unfold(2, self.stored[0], 1).unfold(3, self.stored[1], 1).permute(
            0, 2, 3, 1, 4, 5)

    def crop(self, step: int) -> torch.Tensor:
        """Return uint8 images of a step, cropped by one gather and resized."""
        part, windows = self.part(step), self.windows
        index = self.order[part]
        if self.recipe.transform_first:
            windows = self.all_windows(self.transformed(windows[index, 0, 0], step),
                                       self.recipe.padding)
            index = torch.arange(len(index), device=self.home)
        images = windows[(index, *self.shifts[:, part])]
        if self.recipe.crop == "resized" or self.size != self.stored:
            images = resize_boxes(images, self.boxes[:, part], self.size, self.recipe.interpolation)
        return images

    def by_torch(self, step: int) -> torch.Tensor:
        """Return cropped and flipped uint8 images of a step."""
        images = self.crop(step)
        if not self.recipe.flip:
            return images
        return torch.where(self.flips[self.part(step), None, None, None], images.flip(3), images)

    def by_dali(self, steps):
        """Yield the same images, brought to the device and flipped by DALI."""
        from nvidia.dali import fn, pipeline_def, types
        on_gpu = self.device.type == "cuda"

        def source(info):
            if info.iteration >= len(steps):
                raise StopIteration
            step = steps[info.iteration]
            images = self.crop(step).permute(0, 2, 3, 1).contiguous().numpy()
            return images, self.flips[self.part(step)].int().numpy()

        @pipeline_def(batch_size=-(-self.batch_size // distributed.world()),
                      num_threads=self.workers, exec_dynamic=True,
                      device_id=(self.device.index or 0) if on_gpu else None)
        def pipeline():
            images, mirror = fn.external_source(source, num_outputs=2, batch_info=True)
            return fn.crop_mirror_normalize(images.gpu() if on_gpu else images, mirror=mirror,
                                            dtype=types.UINT8, output_layout="CHW")

        pipe = pipeline()
        for _ in steps:
            yield run(pipe, self.device)


def run(pipe, device) -> torch.Tensor:
    """Return the next batch of a DALI pipeline, in the order of the current stream on a GPU."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    images, = pipe.run(stream)
    images = torch.from_dlpack(images.as_tensor())
    return images.clone() if stream else images     # DALI uses its GPU buffer again after the copy


def draw_boxes(count: int, size, scale, ratio, generator: torch.Generator) -> torch.Tensor:
    """Return crops (4, count) of (top, left, height, width) in images of `size` (height, width), as
    torchvision's RandomResizedCrop draws them."""
    height, width = size
    share, turn = torch.rand(2, 10, count, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    low, high = map(math.log, ratio)
    ratios = (low + (high - low) * turn).exp()
    sides = torch.stack([(area / ratios).sqrt(), (area * ratios).sqrt()]).round().long()
    limit = torch.tensor([height, width])
    fits = ((sides > 0) & (sides <= limit[:, None, None])).all(0)
    sides = sides.gather(1, fits.int().argmax(0).expand(2, 1, -1))[:, 0]
    least = round(min(height, width / ratio[0])), round(min(width, height * ratio[1]))
    sides = torch.where(fits.any(0), sides, torch.tensor(least)[:, None])
    position = torch.rand(2, count, generator=generator)
    corner = (position * (limit[:, None] - sides + 1)).long()
    corner = torch.where(fits.any(0), corner, (limit[:, None] - sides) // 2)
    return torch.cat([corner, sides])


def resize_boxes(images: torch.Tensor, boxes: torch.Tensor, size, filter: str) -> torch.Tensor:
    """Return crops `boxes` (4, B) as of draw_boxes, of images (B, C, H, W) uint8, each resized to
    `size` (H, W): antialiased, by two products with the filter's weights."""
    crops = images.float()
    for dim, (begin, length) in ((2, boxes[0::2, :, None, None]), (3, boxes[1::2, :, None, None])):
        index = torch.arange(images.shape[dim], device=images.device)
        scale = length / size[dim - 2]
        centre = (torch.arange(size[dim - 2], device=images.device)[:, None] + 0.5) * scale + begin
        x = ((index + 0.5 - centre) / scale.clamp(min=1)).abs()         # (B, after, before)
        if filter == "bicubic":                 # Keys' cubic with a = -0.5
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
        else:
            weights = (1 - x).clamp(min=0)
        weights = weights * ((index >= begin) & (index < begin + length))
        weights = (weights / weights.sum(2, keepdim=True))[:, None]
        with full_precision(images.device.type):            # TF32 would change 2 % of the bytes
            crops = weights @ crops if dim == 2 else crops @ weights.mT
    return crops.round_().clamp_(0, 255).to(torch.uint8)
