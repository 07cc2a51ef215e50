#!/usr/bin/env python3
"""Packs a folder of images into one RecordIO file: PREFIX.rec and its index PREFIX.idx.

    python resizemix/make_recordio.py imagenet/train records/train
    python resizemix/make_recordio.py imagenet/val records/val --classes records/train_classes.txt

Labels number the classes of PREFIX_classes.txt. The images are shuffled once, since readers shuffle
a window only; unreadable files are left out and listed in PREFIX_unreadable.txt. The same command
continues a run that was stopped, even killed: the index is written last."""
import io
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import distributed, flags, runtime
from common.data.images import decode, read_text, reason
from common.data.lists import list_classes, printable
from common.data.recordio import FRAME, HEADER, MAGIC, pack
from common.errors import DataError
from common.files import lock, write_atomic


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("images", type=flags.folder, help="folder with one folder per class")
    add("prefix", type=flags.path, help="where to write: PREFIX.rec, PREFIX.idx, …")
    add("--resize", type=flags.positive, help="make the shorter side this long where it is longer")
    add("--quality", type=flags.number(int, low=1, high=100), help="encode all images as JPEG (if "
        "not given: in quality 95 those that are resized or are neither JPEG nor PNG)")
    add("--classes", type=flags.path, help="file of class names, if not the folders' names")
    add("--workers", type=flags.positive, default=runtime.cores(), help="processes")
    return parser.parse_args(argv)


def list_images(args) -> tuple[list[tuple[str, int]], list[str]]:
    """Return (path below the folder, label) of all images in writing order, and the classes."""
    folders = list_classes(Path(args.images), allow_empty=True)
    names = printable(folders)
    classes = read_text(Path(args.classes)).splitlines() if args.classes else names
    labels = {name: label for label, name in enumerate(classes)}
    for name in names:
        if name not in labels:
            raise DataError(f"{Path(args.images, name)}: no such class in {args.classes}")
    items = [(os.path.relpath(path, args.images), labels[name])
             for name, files in zip(names, folders.values(), strict=True) for path in files]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[i] for i in order.tolist()], classes


def make_record(item: int, args, items, job: int) -> tuple[bytes, str]:
    """Return an item's record and '', or b'' and why its image cannot be read."""
    path, label = items[item]
    try:
        encoded = Path(args.images, path).read_bytes()
        kind, image = Image.open(io.BytesIO(encoded)).format, decode(encoded)
        factor = min(1, args.resize / min(image.size)) if args.resize else 1
        if factor < 1:
            image = image.resize([max(args.resize, round(side * factor)) for side in image.size],
                                 Image.Resampling.BICUBIC)
        if factor < 1 or args.quality or kind not in ("JPEG", "PNG"):
            out = io.BytesIO()
            image.save(out, "JPEG", quality=args.quality or 95)
            encoded = out.getvalue()
        return pack(label, item, encoded, job), ""
    except Exception as fault:              # Pillow raises nearly anything for damaged files
        return b"", reason(fault)


def find_written(rec, job: int) -> dict[int, int]:
    """Return byte offsets by item of an unfinished run's whole records in the open file `rec`; cut
    off the rest. Raises DataError where it holds anything but records of this `job`."""
    index, end, size = {}, 0, rec.seek(0, os.SEEK_END)
    while end + FRAME.size + HEADER.size <= size:
        rec.seek(end)
        magic, length = FRAME.unpack(rec.read(FRAME.size))
        _, _, item, made_by = HEADER.unpack(rec.read(HEADER.size))
        after = end + FRAME.size + length + -length % 4
        if (magic, made_by) != (MAGIC, job) or after > size:
            break
        index[item], end = end, after
    if size and not index:
        raise DataError(f"{rec.name} is there already, of other images or flags: remove it to "
                        "write it anew")
    rec.truncate(end)
    return index


def main(argv=None):
    """Pack the images as the flags say."""
    args = parse_args(argv)
    items, classes = list_images(args)
    rec_path, idx, bad, names = (Path(args.prefix.rstrip("/") + end) for end in
                                 (".rec", ".idx", "_unreadable.txt", "_classes.txt"))
    if idx.exists():
        raise DataError(f"{idx} is there already: remove it to write it anew")
    job = distributed.seed_of(os.path.realpath(args.images), args.resize, args.quality, items,
                              classes)
    record_of = partial(make_record, args=args, items=items, job=job)
    idx.parent.mkdir(parents=True, exist_ok=True)
    with lock(rec_path, "ab+") as rec:
        index = find_written(rec, job)
        done = max(index, default=-1) + 1
        if done:
            print(f"going on after {done} of {len(items)} images")
        records = DataLoader(range(done, len(items)), batch_size=None, collate_fn=record_of,
                             num_workers=args.workers, prefetch_factor=16)
        for item, (record, _) in enumerate(tqdm(records, unit="img", smoothing=0.05), done):
            if record:
                index[item] = rec.seek(0, os.SEEK_END)
                rec.write(record)
        rec.flush()
        os.fsync(rec.fileno())
    missing = [item for item in range(len(items)) if item not in index]
    if missing:
        lines = [f"{item}\t{items[item][0]}\t{record_of(item)[1]}\n" for item in missing]
        write_atomic(bad, "".join(printable(lines)))
        print(f"left out {len(missing)} unreadable files, listed in {bad}")
    if not index:
        raise DataError(f"{args.images}: not one of {len(items)} files is a readable image")
    write_atomic(names, "".join(name + "\n" for name in classes))
    write_atomic(idx, "".join(f"{item}\t{offset}\n" for item, offset in index.items()))
    print(f"{rec_path}: {len(index)} images of {len(classes)} classes, "
          f"{rec_path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    runtime.launch(main)
