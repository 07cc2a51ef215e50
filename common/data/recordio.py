"""RecordIO, MXNet's container of labelled images, in pure Python: writing and random access.

A `.rec` file is a sequence of records, each padded with zeros to a multiple of 4 bytes:
    u32 magic, u32 part << 29 | length, then `length` bytes of
    u32 flag, f32 label, u64 id, u64 id2, `flag` further f32 labels, the encoded image
all little-endian; part is 0 for whole records and 1, 2, 3 for first, middle and last pieces of a
record that was split where it held the magic number. The `.idx` file beside it has a line
`key <tab> byte offset` for each record.
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
    """Return one record: the encoded image with its label, ready to be appended to a .rec file.

    job: a number in id2, which readers pass over. Raises ValueError for an image too long for the
    format (512 MB).
    """
    length = HEADER.size + len(image)
    if length >= 1 << 29:
        raise ValueError(f"{len(image)} bytes are too many for a record")
    return b"".join((FRAME.pack(MAGIC, length), HEADER.pack(0, label, key, job), image,
                     bytes(-length % 4)))


class RecordFile:
    """Random access to a .rec file by the number of a record (not by key).

    len(file) records; file[i] -> (label, encoded image as bytes), of several labels the first;
    classes: the names that make_recordio.py left beside the file, or none. Opening reads the
    index, the last record and, where there are names, up to 256 records for their labels. Can be
    pickled and shared by processes.

    Raises DataError naming the file, or the file and the record, when one is missing, cut off,
    not RecordIO, or has a label that is the number of no class.
    """
    in_file_order = True                # is best read in about the order of the file

    def __init__(self, path):
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".idx")
        for file in (self.path, self.index_path):
            if not file.is_file():
                raise DataError(f"{file} is missing: RecordIO needs {self.path.name} and "
                                f"{self.index_path.name} side by side")
        self.offsets = read_index(self.index_path)
        names = self.path.with_name(self.path.stem + "_classes.txt")
        self.classes = read_text(names).splitlines() if names.exists() else []
        self.file = None
        self.parts(len(self) - 1)              # a file that was cut off lacks its last record
        some = min(256, len(self)) if self.classes else 0
        for i in np.linspace(0, len(self) - 1, some, dtype=int):
            self[i]

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        payload = b"".join(self.parts(i))
        if len(payload) < HEADER.size:
            raise DataError(f"{self.name(i)} is too short to hold an image")
        flag, label, _, _ = HEADER.unpack_from(payload)
        if HEADER.size + 4 * flag > len(payload):
            raise DataError(f"{self.name(i)} ends before the {flag} labels that it announces")
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
        """Return how a message calls record i."""
        return f"{self.path}: record {i} (byte {self.offsets[i]})"

    def facts(self) -> bytes:
        """Return what tells this file from a changed one: offsets and length."""
        return self.offsets.tobytes() + str(self.path.stat().st_size).encode()

    def parts(self, i: int) -> list[bytes]:
        """Payload of record i; split records get back the magic numbers they were split at."""
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)
        parts, position = [], int(self.offsets[i])
        while True:
            frame = os.pread(self.file.fileno(), FRAME.size, position)
            if len(frame) < FRAME.size:
                raise DataError(f"{self.name(i)} lies beyond the end of the file: truncated?")
            magic, length = FRAME.unpack(frame)
            part, length = length >> 29, length & (1 << 29) - 1
            if magic != MAGIC:
                raise DataError(f"{self.name(i)} does not begin with RecordIO's magic number")
            data = os.pread(self.file.fileno(), length, position + FRAME.size)
            if len(data) < length:
                raise DataError(f"{self.name(i)} needs {length} bytes but only {len(data)} are "
                                "left: the file is truncated")
            parts += [struct.pack("<I", MAGIC), data] if part > 1 else [data]
            if part in (0, 3):
                return parts
            position += FRAME.size + length + -length % 4


def read_index(path: Path) -> np.ndarray:
    """Return byte offsets of an .idx file, ascending; DataError when a line is no index line."""
    with reading(path, "a RecordIO index of lines `key <tab> offset`"):
        offsets = np.array([int(line.split("\t")[1]) for line in read_text(path).splitlines()],
                           np.int64)
        if (offsets < 0).any():
            raise ValueError("negative offset")
    if not len(offsets):
        raise DataError(f"{path} is empty: no record in the index")
    return np.sort(offsets)
