"""RecordIO, MXNet's container of labelled images, in pure Python: writing and random access.

A `.rec` file is a sequence of records, each padded with zeros to a multiple of 4 bytes:
    u32 magic, u32 part << 29 | length, then `length` bytes of
    u32 flag, f32 label, u64 id, u64 id2, `flag` further f32 labels, the encoded image
all little-endian; part is 0 for whole records and 1, 2, 3 for first, middle and last pieces of a
record that was split where it held the magic number. The `.idx` file beside it has a line
`key <tab> byte offset` for each record.
"""
import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import DataError

MAGIC = 0xCED7230A
FRAME, HEADER = struct.Struct("<II"), struct.Struct("<IfQQ")


def pack(label: float, key: int, image: bytes) -> bytes:
    """One record: the encoded image with its label, ready to be appended to a .rec file.

    Raises ValueError when the image is too long for the format (512 MB).
    """
    length = HEADER.size + len(image)
    if length >= 1 << 29:
        raise ValueError(f"{len(image)} bytes are too many for a record")
    return b"".join((FRAME.pack(MAGIC, length), HEADER.pack(0, label, key, 0), image,
                     bytes(-length % 4)))


class RecordFile:
    """Random access to a .rec file by the place of a record in it (not by key).

    len(file) records; file[i] -> (label, encoded image as bytes); classes: the names that
    make_recordio.py left beside the file, or none. Opening reads the index and, where there are
    names, up to 256 records for their labels; else the last record. Can be pickled and shared by
    processes.

    Raises DataError naming the file, or the file and the record, when one is missing, cut off,
    not RecordIO, or has a label without a name.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".idx")
        for file in (self.path, self.index_path):
            if not file.is_file():
                raise DataError(f"{file} is missing: RecordIO needs {self.path.name} and "
                                f"{self.index_path.name} side by side")
        self.offsets = read_index(self.index_path)
        names = self.path.with_name(self.path.stem + "_classes.txt")
        try:
            self.classes = names.read_text("utf-8").splitlines() if names.exists() else []
        except UnicodeDecodeError:
            raise DataError(f"{names} is no text in UTF-8") from None
        self.size = self.path.stat().st_size
        self.file = None
        self.parts(len(self) - 1)              # a file that was cut off lacks its last record
        some = min(256, len(self)) if self.classes else 0
        for i in np.linspace(0, len(self) - 1, some, dtype=int):
            start = os.pread(self.file.fileno(), FRAME.size + HEADER.size, int(self.offsets[i]))
            flag, label, _, _ = HEADER.unpack(start[FRAME.size:].ljust(HEADER.size, b"\0"))
            self.check_label(i, 0 if flag else label)

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i: int) -> tuple[float, bytes]:
        payload = b"".join(self.parts(i))
        if len(payload) < HEADER.size:
            raise DataError(f"{self.name(i)} is too short to hold an image")
        flag, label, _, _ = HEADER.unpack_from(payload)
        if flag:
            label, = struct.unpack_from("<f", payload, HEADER.size)
        self.check_label(i, label)
        return label, payload[HEADER.size + 4 * flag:]

    def __getstate__(self):
        return self.__dict__ | {"file": None}

    def name(self, i: int) -> str:
        """How a message calls record i."""
        return f"{self.path}: record {i} (byte {self.offsets[i]})"

    def check_label(self, i: int, label: float):
        """Raises DataError when the classes have names, but this label of record i has none."""
        if self.classes and not 0 <= label < len(self.classes):
            raise DataError(f"{self.name(i)} has the label {label:g}, but {self.path.stem}"
                            f"_classes.txt names {len(self.classes)} classes")

    def facts(self) -> bytes:
        """What tells this file from a changed one: its records' places and its length."""
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
    """Byte offsets of an .idx file in ascending order; DataError when a line is no index line."""
    try:
        offsets = np.array([int(line.split("\t")[1]) for line in path.read_text().splitlines()],
                           np.int64)
        if len(offsets) and offsets.min() < 0:
            raise ValueError
    except (ValueError, IndexError, OverflowError):
        raise DataError(f"{path} is no RecordIO index: its lines are not `key <tab> offset`"
                        ) from None
    if not len(offsets):
        raise DataError(f"{path} is empty: no record in the index")
    return np.sort(offsets)


def decode(encoded: bytes) -> Image.Image:
    """The image in RGB, wholly decoded; ValueError saying why when the bytes are no image."""
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as fault:                  # Pillow raises nearly anything for damaged files
        raise ValueError(reason(fault)) from None


def reason(fault: Exception) -> str:
    """Pillow's message in one line, without the address of the buffer that was no image."""
    return " ".join(str(fault).split("<_io")[0].split()) or type(fault).__name__
