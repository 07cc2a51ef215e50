"""RecordIO, MXNet's container of labelled images: writing and random access.

A `.rec` file is a sequence of records, little-endian, padded with zeros to a multiple of 4 bytes:
    u32 magic, u32 part << 29 | length, then `length` bytes of
    u32 flag, f32 label, u64 id, u64 id2, `flag` further f32 labels, the encoded image
part is 0 for whole records; 1, 2, 3 for first, middle and last pieces of a record that was split
where it held the magic number. The `.idx` file has a line `key <tab> byte offset` for each record.
"""
import os
import struct
from pathlib import Path

import numpy as np

from common.data.images import read_text, reading
from common.errors import DataError

MAGIC = 0xCED7230A
FRAME, HEADER = struct.Struct("<II"), struct.Struct("<IfQQ")
UNNAMED = 1000                          # classes of a file without names: ImageNet's


def pack(label: float, key: int, image: bytes, job: int = 0) -> bytes:
    """Return the record of an encoded image; job: a number in id2, which readers pass over.
    Raises ValueError for 512 MB and more."""
    length = HEADER.size + len(image)
    if length >> 29:
        raise ValueError(f"{len(image)} bytes are too many for a record")
    return b"".join((FRAME.pack(MAGIC, length), HEADER.pack(0, label, key, job), image,
                     bytes(-length % 4)))


def read_at(file, length: int, position: int) -> bytes:
    """Return bytes of an unbuffered file; where there is pread, threads may share the file."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), length, position)
    file.seek(position)                                     # Windows: a process has its own file
    return file.read(length)


class RecordFile:
    """Random access to a .rec file by the number of a record (not by key): len, [i] -> (first
    label, encoded image), name(i); `classes` as make_recordio.py names them, or none."""
    in_file_order = True                # is best read in about the order of the file

    def __init__(self, path):
        self.path, self.file = Path(path), None
        index = self.path.with_suffix(".idx")
        with reading(index, "a RecordIO index of lines `key <tab> offset`"):
            self.offsets = np.sort(np.array(
                [int(line.split("\t")[1]) for line in read_text(index).splitlines()], np.int64))
            if not len(self.offsets):
                raise ValueError("empty")
        names = self.path.with_name(self.path.stem + "_classes.txt")
        self.classes = read_text(names).splitlines() if names.exists() else []
        some = min(256, len(self)) if self.classes else 1   # labels that names.txt lacks are seen
        for i in np.linspace(len(self) - 1, 0, some, dtype=int):
            self[i]                     # the last one first: a file that was cut off lacks it

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        with reading(self.name(i), "a RecordIO record of a label and an image"):
            payload = b"".join(self.parts(i))
            flag, label, _, _ = HEADER.unpack_from(payload)
            if flag:
                label, = struct.unpack_from("<f", payload, HEADER.size)
        classes = len(self.classes) or UNNAMED
        if not (0 <= label < classes and label % 1 == 0):
            raise DataError(f"{self.name(i)} has the label {label:g}, but there are {classes} "
                            "classes" + f" in {self.path.stem}_classes.txt" * bool(self.classes))
        return int(label), payload[HEADER.size + 4 * flag:]

    def __getstate__(self):
        return self.__dict__ | {"file": None}

    def name(self, i: int) -> str:
        return f"{self.path}: record {i} (byte {self.offsets[i]})"

    def facts(self) -> bytes:
        """Return what tells this file from a changed one: offsets and length."""
        return self.offsets.tobytes() + str(self.path.stat().st_size).encode()

    def parts(self, i: int):
        """Yield the payload of record i, with the magic numbers that it was split at."""
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)
        part, position = 1, int(self.offsets[i])
        while part in (1, 2):
            frame = read_at(self.file, FRAME.size, position)
            if len(frame) < FRAME.size:
                raise ValueError("truncated")
            magic, length = FRAME.unpack(frame)
            part, length = length >> 29, length & (1 << 29) - 1
            data = read_at(self.file, length, position + FRAME.size)
            if magic != MAGIC or len(data) < length:
                raise ValueError("truncated" if magic == MAGIC else "no magic number")
            yield struct.pack("<I", MAGIC) + data if part > 1 else data
            position += FRAME.size + length + -length % 4
