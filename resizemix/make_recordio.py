#!/usr/bin/env python3
"""Packs a folder of images into one RecordIO file: PREFIX.rec and its index PREFIX.idx.

    python resizemix/make_recordio.py imagenet/train records/train
    python resizemix/make_recordio.py imagenet/val records/val --classes records/train_classes.txt

The folder holds one folder per class; labels number the classes in alphabetical order, and
PREFIX_classes.txt names them. The images are shuffled once (seeded), because readers stream the
file in order and shuffle a window only. Files that are no readable image are left out and listed
in PREFIX_unreadable.txt. A run that was stopped, even killed, goes on where it was when the same
command is given again; until the end the file is called PREFIX.rec.part, the index is made last.
"""
import argparse
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import flags, runtime
from common.data import recordio
from common.data.images import decode, reason
from common.data.sources import list_classes
from common.errors import DataError, Stopped
from common.plots import write_atomic

KEPT = {"JPEG", "PNG"}                  # formats whose bytes are stored as they are


def parse_args(argv=None):
    """The flags; usage errors end the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with one folder per class")
    parser.add_argument("prefix", type=Path, help="where to write: PREFIX.rec, PREFIX.idx, …")
    parser.add_argument("--resize", type=flags.positive, metavar="N",
                        help="make the shorter side N pixels where it is longer")
    parser.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100",
                        help="encode every image as JPEG of this quality (default: keep the "
                             "files' bytes, and 95 where an image has to be encoded anew)")
    parser.add_argument("--classes", type=Path, metavar="FILE",
                        help="class names by label, one a line (default: the folders' names)")
    parser.add_argument("--shuffle", type=flags.boolean, default=True, metavar="BOOL",
                        help="False keeps the alphabetical order")
    parser.add_argument("--seed", type=flags.number(int, low=0, high=2**63 - 1), default=0,
                        help="of the shuffle")
    parser.add_argument("--workers", type=flags.positive, metavar="N",
                        default=runtime.cores(), help="processes (default: cores)")
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        parser.error(f"{args.images} is no folder")
    if args.classes and not args.classes.is_file():
        parser.error(f"{args.classes} is no file")
    return args


def printable(text: str) -> str:
    """`text` with line breaks and whatever else cannot be printed written as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def list_images(args) -> tuple[list[tuple[str, int]], list[str]]:
    """(path below the folder, label) of all images in writing order, and the class names."""
    folders = list_classes(args.images, allow_empty=True)
    try:
        classes = args.classes.read_text("utf-8").splitlines() if args.classes else list(folders)
    except UnicodeDecodeError:
        raise DataError(f"{args.classes} is no text in UTF-8") from None
    classes = [name for name in classes if name]
    unknown = [name for name in folders if name not in classes]
    odd = [name for name in classes if name.splitlines() != [name]
           or name.encode(errors="replace").decode() != name]
    twice = [one for one, other in itertools.pairwise(sorted(classes)) if one == other]
    if unknown:
        raise DataError(f"{args.images / unknown[0]}: no such class in {args.classes}")
    if odd or twice:
        raise DataError(f"{args.classes or args.images}: the class {printable((odd + twice)[0])} "
                        + ("has a name that cannot be listed" if odd else "is there twice"))
    labels = {name: label for label, name in enumerate(classes)}
    items = [(os.path.relpath(path, args.images), labels[name])
             for name, files in folders.items() for path in files]
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
            return b"", reason(fault)

    def encode(self, data: bytes) -> bytes:
        kind, image = Image.open(io.BytesIO(data)).format, decode(data)
        shrink = self.resize is not None and min(image.size) > self.resize
        if kind in KEPT and not shrink and not self.quality:
            return data
        if shrink:
            factor = self.resize / min(image.size)
            image = image.resize([max(self.resize, round(side * factor)) for side in image.size],
                                 Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality or 95)
        return out.getvalue()


class Files:
    """The files of one output, and its index so far: (item, byte offset) of each record."""

    def __init__(self, args, items, classes):
        self.items, self.index = items, []
        self.rec, self.idx, self.part, self.bad, self.names, self.job = (
            args.prefix.parent / (args.prefix.name + end) for end in
            (".rec", ".idx", ".rec.part", "_unreadable.txt", "_classes.txt", ".job.part"))
        self.names_text = "".join(name + "\n" for name in classes)
        self.job_text = json.dumps({
            "images": str(args.images.resolve()), "resize": args.resize, "quality": args.quality,
            "list": hashlib.sha256(json.dumps([items, classes]).encode()).hexdigest()}).encode()

    def begin(self) -> int:
        """Number of items done by an earlier run of the same job; forgets those of others.

        Raises DataError when the files are there already or another run is writing them.
        """
        self.rec.parent.mkdir(parents=True, exist_ok=True)
        if not self.job.exists():
            self.refuse()
        self.lock = open(self.job, "ab+")       # never opened again: closing would free the lock
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{self.rec}: another run is writing it") from None
        self.lock.seek(0)
        same = self.lock.read() == self.job_text
        if same and self.rec.exists() and not self.part.exists():
            self.scan(self.rec)                 # killed while the files got their names
            return len(self.items)
        self.refuse()
        if not same:
            for path in (self.part, self.bad):
                path.unlink(missing_ok=True)
            self.lock.truncate(0)
            self.lock.write(self.job_text)
            self.lock.flush()
        for path in (self.part, self.bad):
            path.touch()
        os.truncate(self.part, self.scan(self.part))
        done = self.index[-1][0] + 1 if self.index else 0
        bad = self.bad.read_bytes().splitlines(keepends=True)
        bad = [line for line in itertools.takewhile(re.compile(rb"\d{1,18}\t.*\n").fullmatch, bad)
               if int(line.split(b"\t")[0]) < done]
        self.bad.write_bytes(b"".join(bad))
        return done

    def refuse(self):
        """Raises DataError where a finished file would be overwritten."""
        for path in (self.rec, self.idx):
            if path.exists():
                raise DataError(f"{path} is there already: remove it to write it anew")

    def scan(self, path: Path) -> int:
        """Indexes the whole records of a file; returns where the last of them ends."""
        end, size = 0, path.stat().st_size
        with path.open("rb") as file:
            while True:
                file.seek(end)
                head = file.read(recordio.FRAME.size + recordio.HEADER.size)
                if len(head) < recordio.FRAME.size + recordio.HEADER.size:
                    return end
                magic, length = recordio.FRAME.unpack_from(head)
                after = end + recordio.FRAME.size + length + -length % 4
                if magic != recordio.MAGIC or after > size:
                    return end
                self.index.append((recordio.HEADER.unpack_from(head, recordio.FRAME.size)[2], end))
                end = after

    def finish(self):
        """Gives the finished files their names, the index last."""
        self.names.write_text(self.names_text, "utf-8")
        if self.part.exists():
            with self.part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.part, self.rec)
        write_atomic(self.idx, "".join(f"{item}\t{offset}\n" for item, offset in self.index))
        if self.bad.exists() and not self.bad.stat().st_size:
            self.bad.unlink()
        self.job.unlink()


def write(files: Files, encoder: Encoder, number: int, workers: int):
    """Appends the records of all items from `number` on, in order, whoever encodes them first."""
    batches = DataLoader(encoder, sampler=range(number, len(encoder)), batch_size=16,
                         num_workers=workers, collate_fn=list)
    with (open(files.part, "ab") as rec, open(files.bad, "a", encoding="utf-8") as bad,
          tqdm(total=len(encoder), initial=number, unit="img", smoothing=0.05) as progress):
        for batch in batches:
            for record, fault in batch:
                if fault:
                    name = printable(encoder.items[number][0])
                    bad.write(f"{number}\t{name}\t{fault}\n")
                else:
                    files.index.append((number, rec.tell()))
                    rec.write(record)
                number += 1
            bad.flush()                         # before the records behind them
            rec.flush()
            progress.update(len(batch))


def main(argv=None):
    """Packs the images as the flags say."""
    args = parse_args(argv)
    items, classes = list_images(args)
    files = Files(args, items, classes)
    done = files.begin()
    if done:
        print(f"going on after {done} of {len(items)} images")
    try:
        if done < len(items):
            write(files, Encoder(args, items), done, args.workers)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on from here", 130) from None
    written = len(files.index)
    if not written:
        raise DataError(f"{args.images}: not one of {len(items)} files is a readable image; see "
                        f"{files.bad}")
    files.finish()
    print(f"{files.rec}: {written} images of {len(classes)} classes, "
          f"{files.rec.stat().st_size / 1e6:.1f} MB")
    if written < len(items):
        print(f"left out {len(items) - written} unreadable files, listed in {files.bad}")


if __name__ == "__main__":
    runtime.launch(main)
