"""Loaders that read large images from disk as training goes: folders, lists of files, RecordIO.

`streaming` gives a loader that DALI drives, or torch's DataLoader with the same augmentation.
An epoch's images, their order and their augmentation are functions of (seed, epoch, rank), so a
run resumed at an epoch goes on as one that was never stopped, with any number of workers.
"""
import gc
import importlib.util
import os
import warnings
from pathlib import Path

import torch
from PIL import Image
from PIL.Image import Resampling
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import RandomResizedCrop, v2

from common import distributed
from common.data.recordio import RecordFile, decode, reason
from common.data.sets import list_classes
from common.errors import DataError, RunError

ASPECT = (3 / 4, 4 / 3)                 # of training crops
JITTER = 0.4                            # brightness, contrast and saturation: 1 ± 0.4
AHEAD = 2                               # batches that DALI prepares in advance
# to shrink and to enlarge with, in DALI's words and in Pillow's
FILTERS = {"lanczos": (("TRIANGULAR", "LANCZOS3"), ("BILINEAR", "LANCZOS")),
           "bilinear": (("TRIANGULAR", "LINEAR"), ("BILINEAR", "BILINEAR")),
           "bicubic": (("CUBIC", "CUBIC"), ("BICUBIC", "BICUBIC"))}


def streaming(source, *, split: str, loader: str = "auto", **options):
    """Batches of `source`'s part `split`, by DALI or torch: a `Stream` with these options.

    source: a folder that holds <split>.rec and <split>.idx, or a folder <split>/ with one folder
    per class; or `Files`. Raises DataError naming the file or the record that is missing, cut off
    or no image, at once or in mid-epoch.
    """
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    kind = DaliStream if has_dali and loader != "torch" else TorchStream
    return kind(source if isinstance(source, Files) else open_source(source, split), **options)


class Files:
    """A list of image files: len, [i] -> (label, encoded image), name(i), classes.

    `path`: the set's folder; `files`: paths as text; `labels`: ints; `boxes`: of the objects, (x,
    y, width, height) in pixels of each file, or None.
    """

    def __init__(self, path: Path, files: list[str], labels: list[int], classes: list[str],
                 boxes: list[tuple] | None = None):
        self.path, self.files, self.labels, self.classes = path, files, labels, classes
        self.boxes = boxes

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        try:
            return self.labels[i], Path(self.files[i]).read_bytes()
        except OSError as fault:
            raise DataError(f"{self.files[i]}: {fault.strerror}") from None

    def name(self, i: int) -> str:
        return self.files[i]

    def facts(self) -> bytes:
        """What tells this set from a changed one: names, labels, and sizes of up to 20,000."""
        names = "\n".join(name[len(str(self.path)):] for name in self.files)
        some = self.files[::-(-len(self.files) // 20000)]
        try:
            return repr((names, self.labels, [os.stat(file).st_size for file in some])).encode()
        except OSError as fault:
            raise DataError(f"{fault.filename}: {fault.strerror}") from None


def folder(path: Path) -> Files:
    """Images in one folder per class."""
    classes = list_classes(path, allow_empty=True)
    files = [(str(file), label) for label, found in enumerate(classes.values()) for file in found]
    return Files(path, *map(list, zip(*files, strict=True)), list(classes))


def open_source(source, split: str) -> Files | RecordFile:
    """The images of <source>/<split>.rec, or else of the class folders in <source>/<split>/."""
    root = Path(source).expanduser()
    if any((root / f"{split}.{end}").exists() for end in ("rec", "idx")):
        return RecordFile(root / f"{split}.rec")
    if (root / split).is_dir():
        return folder(root / split)
    raise DataError(f"{root} holds neither {split}.rec nor a folder {split}/ with one folder "
                    "per class")


def size_of(data, i: int) -> tuple[int, int]:
    """(width, height) of item i, from the file's head; DataError where it is no image."""
    try:
        with Image.open(data.files[i]) as image:
            return image.size
    except OSError as fault:
        raise DataError(f"{data.name(i)}: no readable image ({reason(fault)})") from None


class Stream:
    """(B, 3, S, S) float32 normalised images and (B,) int64 labels of `data`; both loaders' part.

    batch_size counts the images of one step over all `world` processes; this one is `rank`. mean,
    std: of pixels in [0, 1]. On a CUDA device DALI decodes on the GPU.

    train: random crops of at least min_scale of the area (or of `scale`, least and largest) with
    sides in a ratio within `aspect`, resized to image_size; flips, on request color_jitter and
    auto_augment ("randaugment" or "autoaugment"); every rank does equally many steps of equal
    size, for which at most one image a rank is seen twice in an epoch. `resize` before the crop:
    the "shorter" side to image_size·256/224, or both, to a "square"; crop "random": a square of
    image_size of that. drop_last: no partial batch at an epoch's end.
    Otherwise the shorter side becomes image_size·256/224 and the centre is cut out (test_crop
    "centre") or the whole image becomes the square ("whole"); every image is seen once over all
    ranks. filter: "bilinear", "bicubic" or "lanczos" to enlarge; all widen to shrink (lanczos
    gives way to bilinear).

    len: steps; `count`: images in all; `classes`: names, empty if unknown; `num_classes`: what
    labels stay below.
    """

    def __init__(self, data, *, image_size: int, batch_size: int, device, train: bool, mean, std,
                 seed: int = 0, rank: int = 0, world: int = 1, workers: int = 4,
                 color_jitter: bool = False, min_scale: float = 0.08,
                 auto_augment: str | None = None, scale: tuple | None = None,
                 aspect: tuple = ASPECT, crop: str = "resized", resize: str = "",
                 test_crop: str = "centre", filter: str = "lanczos", drop_last: bool = False):
        if crop == "random" and not resize:
            raise ValueError('crop="random" needs resize="square" or "shorter"')
        self.data, self.size, self.device = data, image_size, torch.device(device)
        self.batch_size = batch_size = batch_size // world
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.train, self.mean, self.std = train, mean, std
        self.color_jitter, self.auto_augment = color_jitter, auto_augment
        self.scale, self.aspect = scale or (min_scale, 1.0), aspect
        self.crop, self.resize = crop, resize
        self.test_crop, self.filter = test_crop, filter
        self.count, self.classes = len(data), data.classes
        self.num_classes = len(data.classes) or 1000
        if self.count < world:
            raise DataError(f"{data.path}: {self.count} images are too few for {world} processes")
        begin, end = self.count * rank // world, self.count * (rank + 1) // world
        self.shard = range(begin, end)
        self.images = -(-self.count // world) if train else len(self.shard)     # of this rank
        if drop_last and train:
            self.images -= self.images % batch_size
        self.steps = -(-self.images // batch_size)
        if not self.steps:
            raise DataError(f"{data.path}: {self.count} images are less than one batch")
        self.set_epoch(0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0):
        """Chooses the epoch's draws; iteration begins at start_step (to resume inside an epoch)."""
        self.epoch, self.start_step = epoch, start_step

    def number(self, *what) -> int:
        """A seed that is a function of the run's seed, the epoch and `what`."""
        return distributed.seed_of(self.seed, "stream", self.epoch, *what)

    def order(self) -> list[int]:
        """Items of this rank in this epoch, in order: a share of one permutation, or its shard."""
        if not self.train:
            return list(self.shard)
        generator = torch.Generator().manual_seed(self.number())
        order = torch.randperm(self.count, generator=generator)
        places = torch.arange(self.rank, self.images * self.world, self.world) % self.count
        return order[places].tolist()

    def item(self, i: int):
        """(label, PIL image) of item i; DataError naming it when it is no image or of no class."""
        label, encoded = self.data[i]
        if not 0 <= label < self.num_classes:
            raise DataError(f"{self.data.name(i)} has the label {label:g}, but there are "
                            f"{self.num_classes} classes")
        try:
            return int(label), decode(encoded)
        except ValueError as fault:
            raise DataError(f"{self.data.name(i)}: no readable image ({fault})") from None

    def resize_shorter(self) -> int:
        """Length of the shorter side before the central crop of the evaluation."""
        return round(self.size * 256 / 224)

    def boxes(self) -> torch.Tensor | None:
        """True boxes (x1, y1, x2, y2) in pixels of this rank's evaluated images, (N, 4) float32
        in their order; None where the set has none. Reads the size of every image."""
        if getattr(self.data, "boxes", None) is None:
            return None
        found = []
        for i in self.shard:
            x, y, width, height = self.data.boxes[i]
            before = size_of(self.data, i)
            size, (left, top) = self.placed(before)
            across, down = size[0] / before[0], size[1] / before[1]
            found.append([x * across - left, y * down - top, (x + width) * across - left,
                          (y + height) * down - top])
        return torch.tensor(found, dtype=torch.float32).view(-1, 4).clamp(0, self.size)

    def placed(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """How evaluation sees an image of `size` (width, height): the size that it is resized to,
        and the left upper corner of the square that is then cut out."""
        if self.test_crop == "whole":
            return (self.size, self.size), (0, 0)
        factor = self.resize_shorter() / min(size)
        width, height = (max(self.resize_shorter(), round(side * factor)) for side in size)
        # rounded as DALI does
        return (width, height), ((width - self.size + 1) // 2, (height - self.size + 1) // 2)


# ------------------------------------------------------------------------------------------- DALI

class DaliStream(Stream):
    """DALI reads, decodes and augments: on the GPU where the batches are wanted there.

    Image folders are read in a new permutation each epoch. RecordIO is read in the file's order
    through a window of shuffled records, shards changing places between epochs. The pipeline is
    made anew for each epoch: that makes an epoch a function of its number.
    """

    def __iter__(self):
        from nvidia.dali.plugin.base_iterator import LastBatchPolicy
        from nvidia.dali.plugin.pytorch import DALIGenericIterator
        step, fault = 0, ""
        try:
            with warnings.catch_warnings(record=True):      # of DALI's own outdated calls
                # Samples made up to fill the last batch are cut off here, alike on all ranks.
                batches = DALIGenericIterator(
                    [self.pipeline(self.graph)], ["images", "labels"], auto_reset=False,
                    size=self.steps * self.batch_size, last_batch_policy=LastBatchPolicy.FILL,
                    prepare_first_batch=False)
            for step, (batch,) in enumerate(batches):
                if step < self.start_step:      # random states pass through all earlier steps
                    continue
                keep = min(self.batch_size, self.images - step * self.batch_size)
                labels = batch["labels"][:keep].squeeze(1).long()           # on the CPU
                if not 0 <= labels.min() <= labels.max() < self.num_classes:
                    raise RuntimeError("encountered:\na label of no class")
                yield batch["images"][:keep], labels.to(self.device, non_blocking=True)
        except RuntimeError as found:
            fault = str(found)
        if fault:                               # raised here, it keeps no DALI object alive
            batches = None
            raise self.explain(step, fault)

    def pipeline(self, graph):
        """A DALI pipeline that runs `graph`, the seed, device and threads being ours."""
        from nvidia.dali import pipeline_def
        on_gpu = self.device.type == "cuda"
        return pipeline_def(graph, enable_conditionals=bool(self.auto_augment))(
            batch_size=self.batch_size, num_threads=self.workers, prefetch_queue_depth=AHEAD,
            device_id=(self.device.index or 0) if on_gpu else None,
            seed=self.number("pipeline", self.rank))

    def read(self):
        """Encoded images and labels of this rank, in this epoch's order."""
        from nvidia.dali import fn
        if isinstance(self.data, Files):
            order = self.order()
            return fn.readers.file(files=[self.data.files[i] for i in order],
                                   labels=[self.data.labels[i] for i in order],
                                   pad_last_batch=True, name="reader")
        turn = self.epoch if self.train else 0
        return fn.readers.mxnet(path=[str(self.data.path)], index_path=[str(self.data.index_path)],
                                random_shuffle=self.train, pad_last_batch=True,
                                shard_id=(self.rank + turn) % self.world, num_shards=self.world,
                                seed=self.number("reader", self.rank), name="reader")

    def graph(self):
        from nvidia.dali import fn, types
        encoded, labels = self.read()
        on_gpu = self.device.type == "cuda"
        decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB,
                   "adjust_orientation": False}
        shrink, enlarge = FILTERS[self.filter][0]
        filters = {"min_filter": getattr(types, f"INTERP_{shrink}"),
                   "mag_filter": getattr(types, f"INTERP_{enlarge}")}
        area = {"random_area": self.scale, "random_aspect_ratio": self.aspect}
        square, shorter, mirror = (self.size, self.size), self.resize_shorter(), 0
        whole = not (self.train and self.crop == "resized" and not self.resize)
        images = fn.decoders.image(encoded, **decoder) if whole else \
            fn.decoders.image_random_crop(encoded, **area, **decoder)   # decodes the crop alone
        if self.train and self.resize == "square":
            images = fn.resize(images, size=(shorter, shorter), **filters)
        elif self.train and self.resize or not self.train and self.test_crop == "centre":
            images = fn.resize(images, resize_shorter=shorter, **filters)
        else:
            images = fn.resize(images, size=square, **filters)
        if self.train:
            if self.crop == "random":
                y, x = (fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
                images = fn.crop(images, crop=square, crop_pos_x=x, crop_pos_y=y)
            elif self.resize:
                images = fn.random_resized_crop(images, size=square, **area, **filters)
            images = self.augment(images)
            mirror = fn.random.coin_flip(probability=0.5)
        images = fn.crop_mirror_normalize(
            images, crop=(self.size, self.size), mirror=mirror, dtype=types.FLOAT,
            output_layout="CHW", mean=[255 * v for v in self.mean],
            std=[255 * v for v in self.std])
        return images, labels

    def augment(self, images):
        """Colour jitter and the learned or random policy, where they are wanted."""
        from nvidia.dali import fn, types
        from nvidia.dali.auto_aug import auto_augment, rand_augment
        if self.color_jitter:
            factors = [fn.random.uniform(range=(1 - JITTER, 1 + JITTER)) for _ in range(3)]
            images = fn.color_twist(images, brightness=factors[0], contrast=factors[1],
                                    saturation=factors[2])
        warp = {"fill_value": 0, "interp_type": types.INTERP_NN, "shape": (self.size, self.size)}
        if self.auto_augment == "randaugment":
            images = rand_augment.rand_augment(images, n=2, m=9, **warp)
        elif self.auto_augment == "autoaugment":
            images = auto_augment.auto_augment_image_net(images, **warp)
        return images

    def explain(self, step: int, fault: str) -> RunError:
        """The exception that names the damaged file or record behind a failure of DALI."""
        try:
            for i in self.candidates(step):
                self.item(i)
        except DataError as found:
            return found
        lines = [line.strip() for line in fault.splitlines() if line.strip()]
        places = [n for n, line in enumerate(lines) if "encountered:" in line]
        reason = lines[places[0] + 1] if places and places[0] + 1 < len(lines) else lines[0]
        return RunError(f"{self.data.path}: DALI stopped: {reason}")

    def candidates(self, step: int):
        """Items of batch `step` and of those that DALI prepared in advance."""
        window = slice(step * self.batch_size, (step + AHEAD + 1) * self.batch_size)
        if isinstance(self.data, Files):
            return self.order()[window]
        from nvidia.dali import fn
        reader = self.pipeline(lambda: fn.get_property(self.read()[0], key="source_info"))
        places = []                             # "FILE at index OFFSET", in the order of reading
        try:
            for _ in range(min(step + AHEAD + 1, self.steps)):
                names, = reader.run()
                places += [int(bytes(name).decode().split()[-1]) for name in names]
        except RuntimeError:                    # the file's structure itself is damaged
            return range(len(self.data))
        return self.data.offsets.searchsorted(places[window]).tolist()


# ------------------------------------------------------------------------------------------ torch

class TorchStream(Stream):
    """The same augmentation by Pillow and torchvision in the processes of a DataLoader."""

    def __iter__(self):
        gc.collect()            # a forked worker that clears away a DALI pipeline never returns
        order = self.order()[self.start_step * self.batch_size:]
        items = [(i, self.number("item", i)) for i in order]
        loader = DataLoader(Images(self), sampler=items, batch_size=self.batch_size,
                            num_workers=self.workers, collate_fn=collate,
                            pin_memory=self.device.type == "cuda",
                            generator=torch.Generator())   # else it draws from torch's global one
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1)
                     for v in (self.mean, self.std))
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield images.float().mul_(1 / (255 * std)).sub_(mean / std), labels


class Images(Dataset):
    """Augmented uint8 images of a Stream; [(i, seed)] -> (image, label), or the DataError."""

    def __init__(self, stream: Stream):
        self.stream, self.data, self.size = stream, stream.data, stream.size
        self.filter = FILTERS[stream.filter][1]
        augment = [v2.ColorJitter(JITTER, JITTER, JITTER)] if stream.color_jitter else []
        policies = {"randaugment": v2.RandAugment, "autoaugment": v2.AutoAugment}
        if stream.auto_augment:
            augment.append(policies[stream.auto_augment]())
        self.augment = v2.Compose([v2.PILToTensor(), *augment])

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
            image = self.augment(self.cropped(image))
            return (image.flip(2) if torch.rand(()) < 0.5 else image), label

    def cropped(self, image):
        """A random crop of an image, as a square of the wished size."""
        stream, shorter = self.stream, self.stream.resize_shorter()
        if stream.resize:
            factor = shorter / min(image.size)
            image = resize(image, [shorter if stream.resize == "square" else
                                   max(shorter, round(side * factor)) for side in image.size],
                           self.filter)
        if stream.crop == "random":
            left, top = (int(torch.randint(side - self.size + 1, ())) for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size))
        top, left, h, w = RandomResizedCrop.get_params(image, stream.scale, stream.aspect)
        return resize(image, (self.size, self.size), self.filter, (left, top, left + w, top + h))

    def evaluated(self, image):
        """The square that evaluation sees of an image."""
        size, (left, top) = self.stream.placed(image.size)
        return resize(image, size, self.filter).crop(
            (left, top, left + self.size, top + self.size))


def resize(image, size, filters, box=None):
    """Resizes `box` of a PIL image by the first filter along a side that shrinks, else the other.
    """
    left, top, right, bottom = box or (0, 0, *image.size)

    def taper(before, after):
        return Resampling[filters[0 if after < before else 1]]

    width, height = size
    image = image.resize((width, bottom - top), taper(right - left, width),
                         box=(left, top, right, bottom))
    return image.resize((width, height), taper(bottom - top, height))


def collate(samples: list):
    """A batch of tensors, or the first fault among the samples."""
    faults = [sample for sample in samples if isinstance(sample, DataError)]
    return faults[0] if faults else default_collate(samples)
