"""Loaders that read large images from disk as training goes: lists of files, RecordIO."""
import dataclasses
import gc
import signal
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop, v2

from common import distributed
from common.data.images import decode, for_dali, reading
from common.data.memory import run
from common.data.recipe import Recipe, normalise
from common.errors import DataError

AHEAD = 2                               # batches that DALI prepares in advance
GRACE = 30                              # seconds that a worker goes on after SIGTERM
WINDOW = 4096                           # records that are shuffled with one another
FILTERS = {"lanczos": ("TRIANGULAR", "LANCZOS3"), "bilinear": ("TRIANGULAR", "LINEAR"),
           "bicubic": ("CUBIC", "CUBIC")}           # DALI's to shrink and to enlarge


class Stream:
    """(B, 3, S, S) float32 normalised images and (B,) int64 labels of `data`; both loaders' part.
    data: `Files` or `RecordFile`; recipe: all of its fields set. batch_size: images of one step
    over all `world` processes. Everything drawn is a function of (seed, epoch, rank).
    train: every rank does equally many steps of equal size, for which at most one image a rank is
    seen twice in an epoch. Files are in a new permutation each epoch; records in the file's order
    through a window of shuffled records, with shards that rotate. Else every image is seen once."""

    def __init__(self, data, recipe: Recipe, *, image_size: int, batch_size: int, device,
                 train: bool, seed: int = 0, rank: int = 0, world: int = 1, workers: int = 4,
                 drop_last: bool = False):
        recipe.check("a streamed set", crop=("resized", "random", "centre"),
                     transform_first=(False,), resize=(None, "shorter", "square"),
                     test_crop=("centre", "whole"), interpolation=tuple(FILTERS))
        whole = recipe.crop == "centre" and not recipe.resize       # in training
        if not train:
            whole = recipe.test_crop == "whole"
            recipe = dataclasses.replace(recipe, crop="centre", flip=False, color_jitter=0,
                                         transform=None, resize="square" if whole else "shorter")
        # Images are resized, to this side, unless the crop is
        self.resize = recipe.resize or ("shorter" if recipe.crop != "resized" else None)
        self.side = image_size if whole else round(image_size * 256 / 224)
        self.data, self.recipe, self.size = data, recipe, image_size
        self.device, self.batch_size = torch.device(device), batch_size // world
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.train, self.count = train, len(data)
        self.shard = range(self.count * rank // world, self.count * (rank + 1) // world)
        self.images = -(-self.count // world) if train else len(self.shard)     # of this rank
        if drop_last and train and self.images > self.batch_size:
            self.images -= self.images % self.batch_size
        self.steps = -(-self.images // self.batch_size)
        self.set_epoch(0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0):
        """Choose the epoch's draws; iteration begins at start_step (to resume inside an epoch)."""
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
            return images
        if self.recipe.transform:
            generator = torch.Generator().manual_seed(self.number("transform", step, self.rank))
            images = self.recipe.transform(images, generator)
        return normalise(images, self.recipe)

    def item(self, i: int, read=decode):
        """Return (label, image) of item i as `read` decodes it. Raises DataError naming it."""
        with reading(self.data.name(i), "a readable image"):
            label, encoded = self.data[i]
            return label, read(encoded)

    def boxes(self) -> torch.Tensor | None:
        """Return this rank's boxes (N, 4) of x1, y1, x2, y2, or None; not of cropped images."""
        if getattr(self.data, "boxes", None) is None or self.recipe.test_crop != "whole":
            return None
        sizes = torch.tensor([Image.open(self.data.files[i]).size for i in self.shard])
        corner, sides = torch.tensor([self.data.boxes[i] for i in self.shard]).split(2, 1)
        corners = torch.cat([corner, corner + sides], 1)
        return (corners * self.size / sizes.repeat(1, 2)).clamp(0, self.size)


class DaliStream(Stream):
    """DALI decodes and augments, on the GPU where the batches are wanted there; each epoch, a
    function of its number, has a pipeline of its own."""

    def batches(self):
        """Yield images and labels from start_step on. Raises DataError naming a damaged image."""
        order, waiting, labels, step = self.order(), {}, [], 0
        pool = ThreadPoolExecutor(self.workers)

        def source(info):
            """Encoded images of a step; those of the next steps are being read meanwhile."""
            for step in range(info.iteration, min(info.iteration + AHEAD + 1, self.steps)):
                if step not in waiting:
                    part = order[step * self.batch_size:(step + 1) * self.batch_size]
                    waiting[step] = [pool.submit(self.item, i, for_dali) for i in part]
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
        if isinstance(fault, RuntimeError):     # which names no file: Pillow does
            for i in order[step * self.batch_size:(step + AHEAD + 1) * self.batch_size]:
                self.item(i)
        if fault:
            raise fault

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
        """Return arguments of DALI's resizing operators."""
        from nvidia.dali import types
        names = zip(("min_filter", "mag_filter"), FILTERS[self.recipe.interpolation], strict=True)
        return {filter: getattr(types, f"INTERP_{name}") for filter, name in names}

    def graph(self, encoded, **decoder):
        """Return the augmented images of the encoded ones: normalised, or bytes to `transform`."""
        from nvidia.dali import fn, types
        recipe, filters, square = self.recipe, self.filters(), (self.size, self.size)
        area = {"random_area": recipe.scale, "random_aspect_ratio": recipe.ratio}
        if not self.resize:
            images = fn.decoders.image_random_crop(encoded, **area, **decoder)
            images = fn.resize(images, size=square, **filters)      # decodes the crop alone
        else:
            images = fn.decoders.image(encoded, **decoder)
            images = fn.resize(images, **filters, **{"resize_shorter": self.side}
                               if self.resize == "shorter" else {"size": (self.side, self.side)})
            if recipe.crop == "random":
                last = self.side - self.size        # all offsets alike
                draw = {"values": [n / last for n in range(last + 1)]} \
                    if self.resize == "square" and last else {"range": (0.0, 1.0)}
                y, x = (fn.random.uniform(**draw) for _ in range(2))
                images = fn.crop(images, crop=square, crop_pos_x=x, crop_pos_y=y)
            elif recipe.crop == "resized":
                images = fn.random_resized_crop(images, size=square, **area, **filters)
        if recipe.color_jitter:
            span = 1 - recipe.color_jitter, 1 + recipe.color_jitter
            images = fn.color_twist(images, **{what: fn.random.uniform(range=span) for what in (
                "brightness", "contrast", "saturation")})
        mirror = fn.random.coin_flip(probability=0.5) if recipe.flip else 0
        if recipe.transform:                        # of bytes
            return fn.crop_mirror_normalize(images, crop=square, mirror=mirror, dtype=types.UINT8,
                                            output_layout="CHW")
        return fn.crop_mirror_normalize(
            images, crop=square, mirror=mirror, output_layout="CHW",
            mean=[255 * v for v in recipe.mean], std=[255 * v for v in recipe.std])


def leave_signals(worker: int):
    """Leave the signals that a whole job gets to the program, which saves; end GRACE seconds after
    SIGTERM, which Python sends, too: at its end it waits for workers that are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class TorchStream(Stream):
    """The same augmentation by Pillow and torchvision in the processes of a DataLoader."""

    def batches(self):
        """Yield uint8 images and labels from start_step on. Raises DataError."""
        gc.collect()            # a forked worker that clears away a DALI pipeline never returns
        order = self.order()[self.start_step * self.batch_size:]
        loader = DataLoader(self, sampler=order, batch_size=self.batch_size,
                            num_workers=self.workers, pin_memory=self.device.type == "cuda",
                            generator=torch.Generator(),   # else it draws from torch's global one
                            worker_init_fn=leave_signals)
        iterator = iter(loader)
        try:
            yield from iterator
        except DataError as fault:                          # below the worker's traceback
            message = str(fault).strip().splitlines()[-1]
            raise DataError(message.split("DataError: ", 1)[-1]) from None
        finally:
            iterator._shutdown_workers()     # a fault's traceback would keep them to Python's end

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Return the augmented uint8 image and the label of item i."""
        label, image = self.item(i)
        if self.resize:
            image = self.resized(image, self.side, self.resize == "square")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.number("item", i))
            image = v2.functional.pil_to_tensor(self.cropped(image))
            if self.recipe.color_jitter:
                image = v2.ColorJitter(*(self.recipe.color_jitter,) * 3)(image)
            return v2.RandomHorizontalFlip(0.5 * self.recipe.flip)(image), label

    def cropped(self, image):
        """Return the recipe's crop of a PIL image."""
        if self.recipe.crop == "random":
            return v2.RandomCrop(self.size)(image)
        if self.recipe.crop == "centre":                    # as DALI's
            left, top = ((side - self.size + 1) // 2 for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size))
        top, left, h, w = RandomResizedCrop.get_params(image, self.recipe.scale, self.recipe.ratio)
        return self.resized(image.crop((left, top, left + w, top + h)), self.size, square=True)

    def resized(self, image, side: int, square: bool):
        """Return a PIL image resized to a square or by its shorter side."""
        name = self.recipe.interpolation
        if name == "lanczos" and min(image.size) >= side:   # as DALI's filters to shrink
            name = "bilinear"
        size = [side if square else max(side, round(length * side / min(image.size)))
                for length in image.size]               # rounded as DALI does
        return image.resize(size, Image.Resampling[name.upper()])
