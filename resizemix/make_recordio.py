#!/usr/bin/env python3
"""Packs a folder of images into one RecordIO file: PREFIX.rec and its index PREFIX.idx.

    python resizemix/make_recordio.py imagenet/train records/train
    python resizemix/make_recordio.py imagenet/val records/val --classes records/train_classes.txt

The folder holds one folder per class; labels number the classes in alphabetical order, and
PREFIX_classes.txt names them. The images are shuffled once (seeded), because readers stream the
file in order and shuffle a window only. Files that are no readable image are left out and listed
in PREFIX_unreadable.txt. A run that was stopped, even killed, goes on where it was when the same
command is given again; the index is made last, and no program reads PREFIX.rec without it.
"""
import argparse
import hashlib
import io
import itertools
import json
import os
import re
import signal
import struct
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
from common.data.folders import list_classes
from common.data.images import decode, read_text, reason
from common.errors import DataError, Stopped
from common.files import lock, write_atomic

STORED = {"JPEG", "PNG"}                # formats whose bytes are stored as they are


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with one folder per class")
    parser.add_argument("prefix", type=Path, help="where to write: PREFIX.rec, PREFIX.idx, …")
    parser.add_argument("--resize", type=flags.positive, metavar="N",
                        help="make the shorter side N pixels where it is longer")
    parser.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100",
                        help="encode every image as JPEG of this quality (default: the files' "
                             "own bytes, and 95 where an image has to be encoded anew)")
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
    """Return `text` with what cannot be printed, line breaks too, as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def list_images(args) -> tuple[list[tuple[str, int]], list[str]]:
    """Return (path below the folder, label) of all images in writing order, and the classes."""
    folders = list_classes(args.images, allow_empty=True)
    listed = read_text(args.classes).splitlines() if args.classes else folders
    classes = [name for name in listed if name]
    labels = {name: label for label, name in enumerate(classes)}
    for name in folders:
        if name not in labels:
            raise DataError(f"{args.images / name}: no such class in {args.classes}")
    for label, name in enumerate(classes):
        odd = name.splitlines() != [name] or name.encode(errors="replace").decode() != name
        if odd or labels[name] != label:
            raise DataError(f"{args.classes or args.images}: the class {printable(name)} "
                            + ("has a name that cannot be listed" if odd else "is there twice"))
    items = [(os.path.relpath(path, args.images), labels[name])
             for name, files in folders.items() for path in files]
    if args.shuffle:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(args.seed))
        items = [items[i] for i in order.tolist()]
    return items, classes


class Encoder(Dataset):
    """Item i -> (record, '') or (b'', why it cannot be read). Runs in worker processes."""

    def __init__(self, args, items, classes):
        self.folder, self.resize, self.quality = args.images, args.resize, args.quality
        self.items = items
        what = json.dumps([str(args.images.resolve()), args.resize, args.quality, items, classes])
        self.job = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big")

    def __getitem__(self, i: int) -> tuple[bytes, str]:
        path, label = self.items[i]
        try:
            encoded = self.encode((self.folder / path).read_bytes())
            return recordio.pack(label, i, encoded, self.job), ""
        except Exception as fault:              # Pillow raises nearly anything for damaged files
            return b"", reason(fault)

    def encode(self, data: bytes) -> bytes:
        kind, image = Image.open(io.BytesIO(data)).format, decode(data)
        shrink = self.resize is not None and min(image.size) > self.resize
        if kind in STORED and not shrink and not self.quality:
            return data
        if shrink:
            factor = self.resize / min(image.size)
            image = image.resize([max(self.resize, round(side * factor)) for side in image.size],
                                 Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality or 95)
        return out.getvalue()


def begin(rec, job: int) -> list[tuple[int, int]]:
    """Return (item, byte offset) of the whole records of an unfinished run; cut off the rest.

    Raises DataError where the open file `rec` holds anything but records of this `job`.
    """
    index, end, size = [], 0, rec.seek(0, os.SEEK_END)
    rec.seek(0)
    foreign = not struct.pack("<I", recordio.MAGIC).startswith(rec.read(4))
    while True:
        rec.seek(end)
        head = rec.read(recordio.FRAME.size + recordio.HEADER.size)
        if len(head) < recordio.FRAME.size + recordio.HEADER.size:
            break
        magic, length = recordio.FRAME.unpack_from(head)
        _, _, item, made_by = recordio.HEADER.unpack_from(head, recordio.FRAME.size)
        after = end + recordio.FRAME.size + length + -length % 4
        if magic != recordio.MAGIC or after > size:
            break
        foreign |= made_by != job
        index.append((item, end))
        end = after
    if foreign:
        raise DataError(f"{rec.name} is there already, of other images or flags: remove it to "
                        "write it anew")
    rec.truncate(end)
    return index


def write(rec, bad_path: Path, encoder: Encoder, index: list, workers: int):
    """Append the records of all items after those in `index`, in order, and complete `index`."""
    done = index[-1][0] + 1 if index else 0
    listed = bad_path.read_bytes().splitlines(keepends=True) if bad_path.exists() else []
    listed = itertools.takewhile(re.compile(rb"\d{1,18}\t.*\n").fullmatch, listed)
    listed = [line for line in listed if int(line.split(b"\t")[0]) < done]
    if done:
        print(f"going on after {done} of {len(encoder.items)} images")
    batches = DataLoader(encoder, sampler=range(done, len(encoder.items)), batch_size=16,
                         num_workers=workers, collate_fn=list)
    with (open(bad_path, "wb") as bad,
          tqdm(total=len(encoder.items), initial=done, unit="img", smoothing=0.05) as progress):
        bad.writelines(listed)
        for batch in batches:
            for item, (record, fault) in enumerate(batch, done):
                if fault:
                    name = printable(encoder.items[item][0])
                    bad.write(f"{item}\t{name}\t{fault}\n".encode())
                else:
                    index.append((item, rec.seek(0, os.SEEK_END)))
                    rec.write(record)
            done += len(batch)
            bad.flush()                         # before the records behind them
            rec.flush()
            progress.update(len(batch))
    os.fsync(rec.fileno())
    if not bad_path.stat().st_size:
        bad_path.unlink()


def main(argv=None):
    """Pack the images as the flags say."""
    args = parse_args(argv)
    items, classes = list_images(args)
    rec_path, idx, bad, names = (args.prefix.with_name(args.prefix.name + end) for end in
                                 (".rec", ".idx", "_unreadable.txt", "_classes.txt"))
    if idx.exists():
        raise DataError(f"{idx} is there already: remove it to write it anew")
    encoder = Encoder(args, items, classes)
    args.prefix.parent.mkdir(parents=True, exist_ok=True)
    with lock(rec_path, "ab+") as rec:
        index = begin(rec, encoder.job)
        try:
            write(rec, bad, encoder, index, args.workers)
        except KeyboardInterrupt:
            raise Stopped("stopped; the same command goes on from here", 130) from None
        size = rec.tell()
    if not index:
        rec_path.unlink()
        raise DataError(f"{args.images}: not one of {len(items)} files is a readable image; see "
                        f"{bad}")
    write_atomic(names, "".join(name + "\n" for name in classes))
    write_atomic(idx, "".join(f"{item}\t{offset}\n" for item, offset in index))
    print(f"{rec_path}: {len(index)} images of {len(classes)} classes, {size / 1e6:.1f} MB")
    if len(index) < len(items):
        print(f"left out {len(items) - len(index)} unreadable files, listed in {bad}")


if __name__ == "__main__":
    runtime.launch(main)
