#!/usr/bin/env python3
"""Packs a folder of images into one RecordIO file: PREFIX.rec and its index PREFIX.idx.

    python resizemix/make_recordio.py imagenet/train records/train
    python resizemix/make_recordio.py imagenet/val records/val --classes records/train_classes.txt

The folder holds one folder per class; labels number the classes in alphabetical order, and
PREFIX_classes.txt names them. The images are shuffled once (seeded), because readers stream the
file in order and shuffle a window only. Files that are no readable image are left out and listed
in PREFIX_unreadable.txt. A run that was stopped, even killed, goes on where it was when the same
command is given again; until the end its files are called PREFIX.rec.part and PREFIX.idx.part.
"""
import argparse
import hashlib
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import runtime
from common.data import recordio

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}
KEPT = {"JPEG", "PNG"}                  # formats whose bytes are stored as they are


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with one folder per class")
    parser.add_argument("prefix", type=Path, help="where to write: PREFIX.rec, PREFIX.idx, …")
    parser.add_argument("--resize", type=runtime.positive, metavar="N",
                        help="make the shorter side N pixels where it is longer")
    parser.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100",
                        help="encode every image as JPEG of this quality (default: keep the "
                             "files' bytes, and 95 where an image has to be encoded anew)")
    parser.add_argument("--classes", type=Path, metavar="FILE",
                        help="class names by label, one a line (default: the folders' names)")
    parser.add_argument("--shuffle", type=runtime.boolean, default=True, metavar="BOOL",
                        help="False keeps the alphabetical order")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--workers", type=runtime.positive, metavar="N",
                        default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        parser.error(f"{args.images} is no folder")
    if args.classes and not args.classes.is_file():
        parser.error(f"{args.classes} is no file")
    return args


def list_images(args) -> tuple[list[tuple[str, int]], list[str]]:
    """(path below the folder, label) of all images in writing order, and the class names."""
    folders = sorted(entry.name for entry in args.images.iterdir() if entry.is_dir())
    classes = args.classes.read_text().split("\n") if args.classes else folders
    classes = [name for name in classes if name]
    unknown = [name for name in folders if name not in classes]
    if unknown:
        raise runtime.DataError(f"{args.images / unknown[0]}: no such class in {args.classes}")
    labels = {name: label for label, name in enumerate(classes)}
    items = [(str(path.relative_to(args.images)), labels[name]) for name in folders
             for path in sorted((args.images / name).rglob("*"))
             if path.suffix.lower() in SUFFIXES]
    if not items:
        raise runtime.DataError(f"{args.images} holds no folder with images")
    if args.shuffle:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(args.seed))
        items = [items[i] for i in order.tolist()]
    return items, classes


class Encoder(Dataset):
    """Item i -> (record, '') or (b'', why it cannot be read). Runs in worker processes."""

    def __init__(self, args, items):
        self.folder, self.resize, self.quality = args.images, args.resize, args.quality
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[bytes, str]:
        path, label = self.items[i]
        try:
            return recordio.pack(label, i, self.encode((self.folder / path).read_bytes())), ""
        except Exception as fault:              # Pillow raises nearly anything for damaged files
            return b"", recordio.reason(fault)

    def encode(self, data: bytes) -> bytes:
        image = Image.open(io.BytesIO(data))
        image.load()                            # the whole image: a cut-off file fails here
        shrink = self.resize is not None and min(image.size) > self.resize
        if image.format in KEPT and not shrink and not self.quality:
            return data
        image = image.convert("RGB")
        if shrink:
            factor = self.resize / min(image.size)
            image = image.resize([max(self.resize, round(side * factor)) for side in image.size],
                                 Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality or 95)
        return out.getvalue()


class Files:
    """The files of one output; `done` items have been written or listed by an earlier run."""

    def __init__(self, args, items, classes):
        self.rec, self.idx, self.bad, self.names, self.job = (
            args.prefix.parent / (args.prefix.name + end) for end in
            (".rec", ".idx", "_unreadable.txt", "_classes.txt", ".job.part"))
        self.parts = [path.with_name(path.name + ".part") for path in (self.rec, self.idx)]
        self.names_text = "".join(name + "\n" for name in classes)
        self.job_text = json.dumps({
            "images": str(args.images.resolve()), "resize": args.resize, "quality": args.quality,
            "list": hashlib.sha256(json.dumps([items, classes]).encode()).hexdigest()})

    def begin(self) -> int:
        """Number of items done by an earlier run of the same job; forgets those of others."""
        rec, idx = self.parts
        self.rec.parent.mkdir(parents=True, exist_ok=True)
        same = self.job.exists() and self.job.read_text() == self.job_text
        if same and self.rec.exists() and not rec.exists():
            if idx.exists():                    # killed between the two renamings at the end
                os.replace(idx, self.idx)
            self.job.unlink()
        if self.rec.exists() and self.idx.exists():
            raise runtime.DataError(f"{self.rec} is there already: remove it to write it anew")
        if not same:
            for path in (*self.parts, self.bad):
                path.unlink(missing_ok=True)
            self.job.write_text(self.job_text)
        for path in (*self.parts, self.bad):
            path.touch()
        return self.recover()

    def recover(self) -> int:
        """Cuts both files after the last whole record and tells the next item's number."""
        rec, idx = self.parts
        lines = idx.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        size, end = rec.stat().st_size, 0
        while lines and not end:
            offset = int(lines[-1].split("\t")[1])
            with rec.open("rb") as file:
                file.seek(offset)
                frame = file.read(recordio.FRAME.size)
            if len(frame) == recordio.FRAME.size:
                magic, length = recordio.FRAME.unpack(frame)
                after = offset + len(frame) + length + -length % 4
                end = after if magic == recordio.MAGIC and after <= size else 0
            if not end:
                lines.pop()                     # after a power cut the index may be ahead
        os.truncate(rec, end)
        idx.write_text("".join(lines))
        done = int(lines[-1].split("\t")[0]) + 1 if lines else 0
        bad = [line for line in self.bad.read_text().splitlines(keepends=True)
               if line.endswith("\n") and int(line.split("\t")[0]) < done]
        self.bad.write_text("".join(bad))
        return done

    def finish(self):
        """Gives the finished files their names, the index last."""
        self.names.write_text(self.names_text)
        for part, path in zip(self.parts, (self.rec, self.idx), strict=True):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        self.job.unlink()
        if not self.bad.stat().st_size:
            self.bad.unlink()


def write(files: Files, encoder: Encoder, number: int, workers: int):
    """Appends the records of all items from `number` on, in order, whoever encodes them first."""
    batches = DataLoader(encoder, sampler=range(number, len(encoder)), batch_size=16,
                         num_workers=workers, collate_fn=list)
    rec_part, idx_part = files.parts
    with (open(rec_part, "ab") as rec, open(idx_part, "a") as idx, open(files.bad, "a") as bad,
          tqdm(total=len(encoder), initial=number, unit="img", smoothing=0.05) as progress):
        for batch in batches:
            index = ""
            for record, fault in batch:
                if fault:
                    bad.write(f"{number}\t{encoder.items[number][0]}\t{fault}\n")
                else:
                    index += f"{number}\t{rec.tell()}\n"
                    rec.write(record)
                number += 1
            bad.flush()
            rec.flush()                         # a record is on its way before its index line
            idx.write(index)
            idx.flush()
            progress.update(len(batch))


def main(argv=None):
    args = parse_args(argv)
    items, classes = list_images(args)
    files = Files(args, items, classes)
    done = files.begin()
    if done:
        print(f"going on after {done} of {len(items)} images")
    try:
        write(files, Encoder(args, items), done, args.workers)
    except KeyboardInterrupt:
        raise runtime.Stopped("stopped; the same command goes on from here", 130) from None
    with open(files.parts[1]) as idx:
        written = sum(1 for _ in idx)
    if not written:
        raise runtime.DataError(f"{args.images}: not one of {len(items)} files is a readable "
                                f"image; see {files.bad}")
    files.finish()
    print(f"{files.rec}: {written} images of {len(classes)} classes, "
          f"{files.rec.stat().st_size / 1e6:.1f} MB")
    if written < len(items):
        print(f"left out {len(items) - written} unreadable files, listed in {files.bad}")


if __name__ == "__main__":
    runtime.launch(main)
