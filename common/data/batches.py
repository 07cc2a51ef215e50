"""Batches of a data set that lies in memory, augmented all at once on the device."""
import numpy as np
import torch
import torch.nn.functional as F

from common import runtime


class Batches:
    """Iterates over (images (B, 3, H, W) float32 normalised, labels (B,) int64) on the device.

    With a seed: training batches, a new permutation, random crops (zero `padding`) and flips
    each epoch; every draw is a function of (seed, epoch) and of the image's place in the
    permutation, so the batches are the same on every device, with either loader, and however
    many ranks share them. Without: every image once, in order.

    Of each batch of `batch_size` images a rank takes every world-th. In training a last partial
    batch is filled up from its own images so that all ranks do equally many steps of equal size;
    in evaluation nothing is repeated.
    """

    def __init__(self, images, labels, *, batch_size, device, mean, std, seed=None, padding=0,
                 flip=False, transform=None, transform_first=False, drop_last=False,
                 loader="auto", workers=2):
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.padding, self.flip = padding, flip
        self.transform, self.transform_first = transform, transform_first
        self.count, self.size = len(labels), images.shape[1:3]
        self.steps = self.count // batch_size if drop_last else -(-self.count // batch_size)
        if not self.steps:
            raise runtime.DataError(f"--batch_size {batch_size} is more than the "
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
            border = 0 if transform_first else padding
            self.windows = crops(F.pad(stored, (border,) * 4), self.size)
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
        generator = torch.Generator().manual_seed(runtime.seed_of(self.seed, "epoch", epoch))
        order = torch.randperm(self.count, generator=generator)
        shifts = torch.randint(0, 2 * self.padding + 1, (2, self.count), generator=generator)
        flips = (torch.rand(self.count, generator=generator) < 0.5) & self.flip
        self.drawn = order[rows], shifts[:, rows], flips[rows]
        self.order, self.shifts, self.flips = (draw.to(self.device) for draw in self.drawn)

    def rows(self, step: int) -> torch.Tensor:
        """Places in the epoch's permutation that make up this rank's part of a batch."""
        rows = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.count))
        rank, world = runtime.rank(), runtime.world()
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
        size = self.batch_size // runtime.world()
        return slice(step * size, (step + 1) * size)

    def generator(self, step: int) -> torch.Generator:
        seed = runtime.seed_of(self.seed, "transform", self.epoch, step, runtime.rank())
        return torch.Generator().manual_seed(seed)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 to float32 in units of the data set's standard deviation."""
        return images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def torch_crops(self, step: int) -> torch.Tensor:
        """Flipped and cropped uint8 images of one step, one gather on the device."""
        part = self.part(step)
        index = self.order[part]
        if self.seed is None:
            return self.windows[index, 0, 0]
        shifts = tuple(self.shifts[:, part])
        if self.transform_first:
            images = self.transform(self.windows[index, 0, 0], self.generator(step))
            here = torch.arange(len(index), device=self.device)
            images = crops(F.pad(images, (self.padding,) * 4), self.size)[(here, *shifts)]
        else:
            images = self.windows[(index, *shifts)]
        if not self.flip:
            return images
        return torch.where(self.flips[part, None, None, None], images.flip(3), images)

    def dali_crops(self, steps):
        """The same images made by DALI, fed with the same draws."""
        from nvidia.dali import fn, pipeline_def, types

        def source(info):
            if info.iteration >= len(steps):
                raise StopIteration
            step = steps[info.iteration]
            order, shifts, flips = (draw[..., self.part(step)] for draw in self.drawn)
            images = self.images[order.numpy()]
            if self.transform_first:
                changed = self.transform(torch.from_numpy(images).permute(0, 3, 1, 2),
                                         self.generator(step))
                images = changed.permute(0, 2, 3, 1).contiguous().numpy()
            place = shifts.float().div(max(2 * self.padding, 1)).numpy()
            return images, place[0], place[1], flips.int().numpy()

        height, width = self.size
        border = 2 * self.padding
        on_gpu = self.device.type == "cuda"

        @pipeline_def(batch_size=-(-self.batch_size // runtime.world()), num_threads=self.workers,
                      device_id=self.device.index if on_gpu else None)
        def pipeline():
            images, y, x, mirror = fn.external_source(source, num_outputs=4, batch_info=True)
            if on_gpu:
                images = images.gpu()
            images = fn.crop(images, crop=(height + border, width + border), crop_pos_x=0.5,
                             crop_pos_y=0.5, out_of_bounds_policy="pad", fill_values=0)
            return fn.crop_mirror_normalize(images, crop=(height, width), crop_pos_x=x,
                                            crop_pos_y=y, mirror=mirror, dtype=types.UINT8,
                                            output_layout="CHW")

        pipe = pipeline()
        for _ in steps:
            images, = pipe.run()
            yield torch.from_dlpack(images.as_tensor()).clone()


def crops(images: torch.Tensor, size) -> torch.Tensor:
    """All windows of `size` in (N, C, H, W) images as a view (N, rows, columns, C, *size)."""
    return images.unfold(2, size[0], 1).unfold(3, size[1], 1).permute(0, 2, 3, 1, 4, 5)


def to_uint8(images: torch.Tensor, mean, std) -> torch.Tensor:
    """Normalised images back to uint8 pixels, rounded."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images * std + mean).mul(255).round_().clamp_(0, 255).to(torch.uint8)


def pixels(images: torch.Tensor, mean, std) -> np.ndarray:
    """Normalised images (B, 3, H, W) as (B, H, W, 3) uint8 arrays, for drawing."""
    return to_uint8(images, mean, std).permute(0, 2, 3, 1).cpu().numpy()
