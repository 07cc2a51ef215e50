"""Loaders that read large images from disk as training goes: lists of files, RecordIO.

An epoch's images, their order and their augmentation are functions of (seed, epoch, rank), so a
run resumed at an epoch goes on as one that was never stopped, with any number of workers.
"""
import gc
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from PIL.Image import Resampling
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import RandomResizedCrop, v2

from common import distributed
from common.data.images import decode, for_dali, reading
from common.data.memory import run
from common.data.recipe import Recipe, normalise
from common.errors import DataError, RunError

AHEAD = 2                               # batches that DALI prepares in advance
WINDOW = 4096                           # records that are shuffled with one another
# DALI's filters to shrink and to enlarge with
FILTERS = {"lanczos": ("TRIANGULAR", "LANCZOS3"), "bilinear": ("TRIANGULAR", "LINEAR"),
           "bicubic": ("CUBIC", "CUBIC")}


class Stream:
    """(B, 3, S, S) float32 normalised images and (B,) int64 labels of `data`; both loaders' part.

    data: `Files` or `RecordFile`; recipe: all of its fields set. batch_size counts the images of
    one step over all `world` processes; this one is `rank`. On a CUDA device DALI decodes on the
    GPU.

    train: every rank does equally many steps of equal size, for which at most one image a rank is
    seen twice in an epoch; drop_last: no partial batch at an epoch's end. Files are in a new
    permutation each epoch; records in the file's order through a window of shuffled records, with
    shards that rotate from epoch to epoch. Otherwise every image is seen once over all ranks.

    len: steps; `count`: images in all. channels_last: strides of the images.
    """

    def __init__(self, data, recipe: Recipe, *, image_size: int, batch_size: int, device,
                 train: bool, seed: int = 0, rank: int = 0, world: int = 1, workers: int = 4,
                 drop_last: bool = False, channels_last: bool = False):
        recipe.check("a streamed set", crop=("resized", "random", "centre"),
                     transform_first=(False,), resize=(None, "shorter", "square"),
                     test_crop=("centre", "whole"), interpolation=tuple(FILTERS))
        self.data, self.recipe, self.size = data, recipe, image_size
        self.device, self.batch_size = torch.device(device), batch_size // world
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.train, self.channels_last, self.count = train, channels_last, len(data)
        self.resize = recipe.resize or ("shorter" if recipe.crop != "resized" else None)
        if self.count < world:
            raise DataError(f"{data.path}: {self.count} images are too few for {world} processes")
        begin, end = self.count * rank // world, self.count * (rank + 1) // world
        self.shard = range(begin, end)
        self.images = -(-self.count // world) if train else len(self.shard)     # of this rank
        if drop_last and train and self.images > self.batch_size:
            self.images -= self.images % self.batch_size
        self.steps = -(-self.images // self.batch_size)
        self.set_epoch(0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0):
        """Chooses the epoch's draws; iteration begins at start_step (to resume inside an epoch)."""
        self.epoch, self.start_step = epoch, start_step

    def number(self, *what) -> int:
        """Return a seed that is a function of the run's seed, the epoch and `what`."""
        return distributed.seed_of(self.seed, "stream", self.epoch, *what)

    def order(self) -> list[int]:
        """Return the items of this rank in this epoch, in order."""
        if not self.train:
            return list(self.shard)
        if self.data.in_file_order:
            begin = self.count * ((self.rank + self.epoch) % self.world) // self.world
            positions = torch.arange(-(-self.count // self.world))
            generator = torch.Generator().manual_seed(self.number(self.rank))
            moved = positions + WINDOW * torch.rand(len(positions), generator=generator)
            return ((begin + moved.argsort()) % self.count)[:self.images].tolist()
        generator = torch.Generator().manual_seed(self.number())
        order = torch.randperm(self.count, generator=generator)
        positions = torch.arange(self.rank, self.images * self.world, self.world) % self.count
        return order[positions].tolist()

    def __iter__(self):
        for step, (images, labels) in enumerate(self.batches(), self.start_step):
            labels = labels.to(self.device, non_blocking=True)
            yield self.finish(images.to(self.device, non_blocking=True), step), labels

    def finish(self, images: torch.Tensor, step: int) -> torch.Tensor:
        """Return the images of a step as the network sees them."""
        if images.dtype != torch.uint8:             # normalised by DALI
            return images.permute(0, 3, 1, 2) if self.channels_last else images
        if self.train and self.recipe.transform:
            generator = torch.Generator().manual_seed(self.number("transform", step, self.rank))
            images = self.recipe.transform(images, generator)
        return normalise(images, self.recipe, self.channels_last)

    def item(self, i: int):
        """Return (label, PIL image) of item i. Raises DataError naming it when it is no image."""
        label, encoded = self.data[i]
        with reading(self.data.name(i), "a readable image"):
            return label, decode(encoded)

    def resize_shorter(self) -> int:
        """Return the length of the shorter side before a crop: of a centre's in training, size."""
        whole = self.train and self.recipe.crop == "centre"
        return self.size if whole else round(self.size * 256 / 224)

    def boxes(self) -> torch.Tensor | None:
        """True boxes (x1, y1, x2, y2) in pixels of this rank's images, (N, 4) float32 in order.

        None where the set has none or test images are cropped. Reads the size of every image.
        """
        if getattr(self.data, "boxes", None) is None or self.recipe.test_crop != "whole":
            return None
        boxes = torch.tensor([self.data.boxes[i] for i in self.shard]).view(-1, 4)
        sizes = []
        for i in self.shard:
            with reading(self.data.name(i), "a readable image"), \
                    Image.open(self.data.files[i]) as image:
                sizes.append(image.size)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        return (corners * self.size / torch.tensor(sizes).repeat(1, 2)).clamp(0, self.size)


# ------------------------------------------------------------------------------------------- DALI

class DaliStream(Stream):
    """DALI decodes and augments: on the GPU where the batches are wanted there.

    What DALI cannot decode, or not as Pillow does, Pillow decodes before it. The pipeline is made
    anew for each epoch: that makes an epoch a function of its number.
    """

    def batches(self):
        """Yield uint8 images and labels from start_step on."""
        order, waiting, labels, step = self.order(), {}, [], 0
        pool = ThreadPoolExecutor(self.workers)

        def source(info):
            """Encoded images of a step; those of the next steps are being read meanwhile."""
            for step in range(info.iteration, min(info.iteration + AHEAD + 1, self.steps)):
                if step not in waiting:
                    part = order[step * self.batch_size:(step + 1) * self.batch_size]
                    waiting[step] = [pool.submit(self.encoded, i) for i in part]
            if info.iteration >= self.steps:
                raise StopIteration
            found = [future.result() for future in waiting.pop(info.iteration)]
            labels.append(torch.tensor([label for label, _ in found]))
            return [encoded for _, encoded in found]

        fault = None
        try:
            pipe = self.pipeline(source)
            for step in range(self.steps):      # random states pass through all earlier steps
                images = run(pipe, self.device)
                if step >= self.start_step:
                    yield images, labels[step]
        except (RuntimeError, DataError) as found:
            fault = found.with_traceback(None)  # which would keep the pipeline alive
        finally:
            pool.shutdown(cancel_futures=True)
            pipe = None
        if isinstance(fault, DataError):
            raise fault
        if fault:
            self.explain(order[step * self.batch_size:(step + AHEAD + 1) * self.batch_size],
                         str(fault))

    def encoded(self, i: int):
        """Return (label, bytes for DALI) of item i."""
        label, encoded = self.data[i]
        with reading(self.data.name(i), "a readable image"):
            return label, for_dali(encoded)

    def explain(self, items: list[int], fault: str):
        """Raise the exception that names the damaged item behind a failure of DALI."""
        for i in items:
            self.item(i)
        lines = [line.strip() for line in fault.splitlines() if line.strip()]
        at = [n for n, line in enumerate(lines) if "encountered:" in line]
        reason = lines[at[0] + 1] if at and at[0] + 1 < len(lines) else lines[0]
        raise RunError(f"{self.data.path}: DALI stopped: {reason}")

    def pipeline(self, source):
        """Return a DALI pipeline that makes images of the encoded ones from `source`."""
        from nvidia.dali import fn, pipeline_def, types
        on_gpu = self.device.type == "cuda"

        def graph():
            encoded = fn.external_source(source, batch_info=True, dtype=types.UINT8, ndim=1)
            return self.graph(encoded, device="mixed" if on_gpu else "cpu",
                              output_type=types.RGB, adjust_orientation=True)

        return pipeline_def(graph)(
            batch_size=self.batch_size, num_threads=self.workers, prefetch_queue_depth=AHEAD,
            exec_dynamic=True,                      # tensors own what they show
            device_id=(self.device.index or 0) if on_gpu else None,
            seed=self.number("pipeline", self.rank))

    def filters(self) -> dict:
        """Arguments of DALI's resizing operators."""
        from nvidia.dali import types
        shrink, enlarge = FILTERS[self.recipe.interpolation]
        return {"min_filter": getattr(types, f"INTERP_{shrink}"),
                "mag_filter": getattr(types, f"INTERP_{enlarge}")}

    def graph(self, encoded, **decoder):
        """Return the augmented images of the encoded ones: normalised, or bytes to `transform`."""
        from nvidia.dali import fn, types
        recipe, filters, mirror = self.recipe, self.filters(), 0
        area = {"random_area": recipe.scale, "random_aspect_ratio": recipe.ratio}
        square, shorter = (self.size, self.size), self.resize_shorter()
        if self.train and not self.resize:
            images = fn.decoders.image_random_crop(encoded, **area, **decoder)
            images = fn.resize(images, size=square, **filters)      # decodes the crop alone
        else:
            images = fn.decoders.image(encoded, **decoder)
            if not self.train and recipe.test_crop == "whole":
                images = fn.resize(images, size=square, **filters)
            elif self.train and self.resize == "square":
                images = fn.resize(images, size=(shorter, shorter), **filters)
            else:
                images = fn.resize(images, resize_shorter=shorter, **filters)
        if self.train and recipe.crop == "random":
            y, x = (fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
            images = fn.crop(images, crop=square, crop_pos_x=x, crop_pos_y=y)
        elif self.train and self.resize and recipe.crop == "resized":
            images = fn.random_resized_crop(images, size=square, **area, **filters)
        if self.train and recipe.color_jitter:
            low, high = 1 - recipe.color_jitter, 1 + recipe.color_jitter
            factors = [fn.random.uniform(range=(low, high)) for _ in range(3)]
            images = fn.color_twist(images, brightness=factors[0], contrast=factors[1],
                                    saturation=factors[2])
        if self.train and recipe.flip:
            mirror = fn.random.coin_flip(probability=0.5)
        if self.train and recipe.transform:         # of bytes
            return fn.crop_mirror_normalize(images, crop=square, mirror=mirror, dtype=types.UINT8,
                                            output_layout="CHW")
        return fn.crop_mirror_normalize(
            images, crop=square, mirror=mirror, output_layout="HWC" if self.channels_last else
            "CHW", mean=[255 * v for v in recipe.mean], std=[255 * v for v in recipe.std])


# ------------------------------------------------------------------------------------------ torch

class TorchStream(Stream):
    """The same augmentation by Pillow and torchvision in the processes of a DataLoader."""

    def batches(self):
        """Yield uint8 images and labels from start_step on."""
        gc.collect()            # a forked worker that clears away a DALI pipeline never returns
        order = self.order()[self.start_step * self.batch_size:]
        items = [(i, self.number("item", i)) for i in order]
        loader = DataLoader(Images(self), sampler=items, batch_size=self.batch_size,
                            num_workers=self.workers, collate_fn=collate,
                            pin_memory=self.device.type == "cuda",
                            generator=torch.Generator())   # else it draws from torch's global one
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class Images(Dataset):
    """Augmented uint8 images of a Stream; [(i, seed)] -> (image, label), or the DataError."""

    def __init__(self, stream: Stream):
        self.stream, self.recipe, self.size = stream, stream.recipe, stream.size
        jitter = [v2.ColorJitter(*(self.recipe.color_jitter,) * 3)]
        flip = [v2.RandomHorizontalFlip()]
        self.augment = v2.Compose([v2.PILToTensor(), *jitter * bool(self.recipe.color_jitter),
                                   *flip * self.recipe.flip])

    def __getitem__(self, item: tuple[int, int]):
        i, seed = item
        try:
            label, image = self.stream.item(i)
        except DataError as fault:
            return fault
        if not self.stream.train:
            return v2.functional.pil_to_tensor(self.evaluated(image)), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.augment(self.cropped(image)), label

    def cropped(self, image):
        """Return the training crop of an image, a square of the recipe's size."""
        if self.stream.resize == "square":
            image = self.resize(image, (self.stream.resize_shorter(),) * 2)
        elif self.stream.resize:
            image = self.resize(image, self.shorter(image))
        if self.recipe.crop == "centre":
            return self.centre(image)
        if self.recipe.crop == "random":
            left, top = (int(torch.randint(side - self.size + 1, ())) for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size))
        top, left, h, w = RandomResizedCrop.get_params(image, self.recipe.scale, self.recipe.ratio)
        return self.resize(image, (self.size, self.size), (left, top, left + w, top + h))

    def evaluated(self, image):
        """The square that evaluation sees of an image."""
        if self.recipe.test_crop == "whole":
            return self.resize(image, (self.size, self.size))
        return self.centre(self.resize(image, self.shorter(image)))

    def centre(self, image):
        """Return the central square of an image."""
        left, top = ((side - self.size + 1) // 2 for side in image.size)   # rounded as DALI does
        return image.crop((left, top, left + self.size, top + self.size))

    def shorter(self, image) -> tuple[int, int]:
        """The size of the image when its shorter side is resized."""
        side = self.stream.resize_shorter()
        return tuple(max(side, round(length * side / min(image.size))) for length in image.size)

    def resize(self, image, size, box=None):
        """Resize `box` of a PIL image; lanczos gives way to bilinear where both sides shrink."""
        left, top, right, bottom = box or (0, 0, *image.size)
        name = self.recipe.interpolation
        if name == "lanczos" and size[0] <= right - left and size[1] <= bottom - top:
            name = "bilinear"
        return image.resize(size, Resampling[name.upper()], (left, top, right, bottom))


def collate(samples: list):
    """A batch of tensors, or the first fault among the samples."""
    faults = [sample for sample in samples if isinstance(sample, DataError)]
    return faults[0] if faults else default_collate(samples)
