"""From the bytes of an image file to RGB pixels, the same for all loaders."""
import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.errors import DataError, RunError

# What Pillow lists, but does not decode by itself, or decodes by running another program
FOREIGN = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"}
Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in FOREIGN}


@contextlib.contextmanager
def reading(path, what: str = "readable"):
    """Turn whatever fails inside into a DataError that names the file; what: "an .npz file", …"""
    try:
        yield
    except RunError:
        raise
    except Exception as fault:          # the readers of damaged files raise nearly anything
        if getattr(fault, "strerror", None):
            raise DataError(f"{fault.filename or path}: {fault.strerror}") from None
        raise DataError(f"{path}: damaged, or not {what} ({reason(fault)})") from None


def reason(fault: Exception) -> str:
    """Return an exception's message in one line, without the address of a buffer."""
    return " ".join(str(fault).split("<_io")[0].split())[:120] or type(fault).__name__


def read_text(path: Path) -> str:
    """Return a UTF-8 text file. Raises DataError."""
    with reading(path, "a text in UTF-8"):
        return path.read_bytes().decode()


def table(file: Path, separator: str | None = None) -> dict[str, list[str]]:
    """Return a text file of lines `key value …`. Raises DataError."""
    rows = [line.split(separator) for line in read_text(file).splitlines() if line.strip()]
    return {key: values for key, *values in rows}


def decode(encoded: bytes) -> Image.Image:
    """Return the image in RGB, turned by its EXIF orientation; of several frames the first.
    16-bit samples are scaled to 8; transparent pixels lie on white."""
    image = Image.open(io.BytesIO(encoded))
    kind, deep = image.format, image.mode.startswith("I")
    if image.mode == "F" or image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError(f"samples of mode {image.mode} have no agreed range; convert them to 8 "
                         "or 16 bits")
    if deep and "transparency" in image.info:
        raise ValueError("16-bit samples with a transparent one; convert them to RGBA")
    image = ImageOps.exif_transpose(image)
    if deep:
        samples = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((samples + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_plain_jpeg(encoded: bytes) -> bool:
    """Return whether this is a JPEG of 8-bit grey or colour, which DALI decodes as Pillow does."""
    at = 2
    while encoded[:2] == b"\xff\xd8" and at + 9 < len(encoded) and encoded[at] == 0xFF:
        if encoded[at + 1] in (0xC0, 0xC1, 0xC2):       # the frame: precision, height, width, …
            return encoded[at + 4] == 8 and encoded[at + 9] in (1, 3)
        at += 2 + int.from_bytes(encoded[at + 2:at + 4], "big")
    return False


def for_dali(encoded: bytes) -> np.ndarray:
    """Return bytes that DALI decodes to what `decode` returns: a plain JPEG's own, else a PPM's."""
    if not is_plain_jpeg(encoded):
        image = decode(encoded)
        encoded = b"P6 %d %d 255\n" % image.size + image.tobytes()
    return np.frombuffer(encoded, np.uint8)
