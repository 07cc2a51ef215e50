"""RecordIO: the format, and make_recordio.py as its users run it, killed and damaged too."""
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import HAS_DALI, make_photos, pack
from PIL import Image

from common import runtime
from common.data import recordio
from common.data.recordio import RecordFile
from common.errors import DataError, RunError

PROGRAM = ROOT / "resizemix" / "make_recordio.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordio") / "photos"
    make_photos(folder, 5, (50, 90))
    return folder


@pytest.fixture(scope="module")
def records(photos):
    pack(photos, photos.parent / "train")
    return photos.parent / "train.rec"


def write(path, payloads, label=lambda i: i):
    """A record file of whole records."""
    data, index = b"", ""
    for i, payload in enumerate(payloads):
        index += f"{i}\t{len(data)}\n"
        data += recordio.pack(label(i), i, payload)
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(index)
    return path


# ----------------------------------------------------------------------------------------- format

def test_layout(tmp_path):
    record = recordio.pack(7, 5, b"abcdef")
    assert record == bytes.fromhex("0a23d7ce" "1e000000" "00000000" "0000e040" "0500000000000000"
                                   "0000000000000000") + b"abcdef\0\0"
    payloads = [os.urandom(n) for n in (1, 2, 3, 4, 1000)] + [struct.pack("<I", recordio.MAGIC) * 3]
    file = RecordFile(write(tmp_path / "a.rec", payloads))
    assert [file[i] for i in range(len(file))] == list(enumerate(payloads))
    assert file.classes == []


def test_several_labels_split_records_and_unsorted_index(tmp_path):
    magic = struct.pack("<I", recordio.MAGIC)
    header = struct.pack("<IfQQ3f", 3, 0, 1, 0, 2.0, 8.0, 9.0)          # three labels
    whole = header + b"left" + magic + b"middle.." + magic + b"right"
    pieces = [header + b"left", b"middle..", b"right"]
    split = b"".join(magic + struct.pack("<I", part << 29 | len(piece)) + piece +
                     bytes(-len(piece) % 4) for part, piece in zip((1, 2, 3), pieces, strict=True))
    first = recordio.pack(4, 0, b"first")
    (tmp_path / "a.rec").write_bytes(first + split)
    (tmp_path / "a.idx").write_text(f"9\t{len(first)}\n3\t0\n")
    file = RecordFile(tmp_path / "a.rec")
    assert file[0] == (4, b"first") and file[1] == (2, whole[len(header):])


def test_faults_name_the_file(tmp_path):
    path = write(tmp_path / "a.rec", [b"x" * 100] * 4)
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_text()
    for cut in (1, 60, 130):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match=r"a\.rec: record 3 \(byte 396\): .*truncated"):
            RecordFile(path)
    path.write_bytes(whole)
    file = RecordFile(path)
    path.write_bytes(whole[:132] + b"nonsense" + whole[140:])
    assert file[0][1] == b"x" * 100
    with pytest.raises(DataError, match=r"record 1 \(byte 132\): .*no magic number"):
        file[1]
    for text in ("", "hello\n", f"0\t{10 ** 20}\n"):
        path.with_suffix(".idx").write_text(text)
        with pytest.raises(DataError, match=r"a\.idx: damaged, or not a RecordIO index"):
            RecordFile(path)
    path.with_suffix(".idx").write_text(index)
    path.write_bytes(whole)
    names = tmp_path / "a_classes.txt"
    names.write_text("a\nb\nc\nd\n")
    file = RecordFile(path)
    assert file.classes == list("abcd") and file[3][0] == 3
    file.classes.pop()
    with pytest.raises(DataError, match="has the label 3, but there are 3"):    # not seen before
        file[3]
    names.write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"a\.rec: record 3 .* label 3, but .* in a_classes.txt"):
        RecordFile(path)
    names.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a_classes\.txt: damaged, or not a text"):
        RecordFile(path)
    names.unlink()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.rec: No such file"):
        RecordFile(path)


# ------------------------------------------------------------------------------- make_recordio.py

def pictures(folder):
    """{bytes of the file: label} of all images in class folders."""
    classes = sorted(place.name for place in folder.iterdir())
    return {path.read_bytes(): label for label, name in enumerate(classes)
            for path in (folder / name).iterdir()}


def contents(path):
    return [(image, int(label)) for label, image in RecordFile(path)]


def test_every_image_with_its_label(photos, records):
    found = contents(records)
    assert len(found) == 40 and dict(found) == pictures(photos)
    labels = [label for _, label in found]
    assert labels != sorted(labels)
    assert RecordFile(records).classes == [f"class {i}" for i in range(8)]
    assert {path.name for path in records.parent.iterdir()} == {
        "photos", "train.rec", "train.idx", "train_classes.txt"}


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dali_reads_labels_bytes_and_pixels_alike(photos, records):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=40, num_threads=2, device_id=None)
    def reader():
        encoded, labels = fn.readers.mxnet(path=str(records),
                                           index_path=str(records.with_suffix(".idx")))
        return encoded, labels, fn.decoders.image(encoded, adjust_orientation=False)

    encoded, labels, images = reader().run()
    found = contents(records)
    assert len(encoded) == len(found)
    for i, (data, label) in enumerate(found):
        assert encoded.at(i).tobytes() == data and labels.at(i) == label
        assert np.array_equal(images.at(i), np.asarray(Image.open(io.BytesIO(data))))


def test_order_is_independent_of_workers(photos, records, tmp_path):
    pack(photos, tmp_path / "one", "--workers", "1")
    assert (tmp_path / "one.rec").read_bytes() == records.read_bytes()
    assert (tmp_path / "one.idx").read_bytes() == records.with_suffix(".idx").read_bytes()


def test_resize_quality_and_foreign_formats(tmp_path):
    place = tmp_path / "images" / "a"
    place.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(place / "a.png")
    image.resize((30, 20)).save(place / "b.jpg")
    image.save(place / "c.bmp")
    image.convert("L").save(place / "d.jpeg")
    image.convert("CMYK").save(place / "e.JPG")

    def packed(name, *flags):
        pack(tmp_path / "images", tmp_path / name, *flags)
        return [data for data, _ in contents(tmp_path / f"{name}.rec")]

    shuffled = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    files = [sorted(place.iterdir())[i] for i in shuffled]

    kept = packed("kept")
    originals = [path.read_bytes() for path in files]
    bitmap = [path.suffix == ".bmp" for path in files].index(True)
    assert [a != b for a, b in zip(kept, originals, strict=True)].index(True) == bitmap
    assert Image.open(io.BytesIO(kept[bitmap])).format == "JPEG"
    assert sum(a == b for a, b in zip(kept, originals, strict=True)) == 4
    resized = [Image.open(io.BytesIO(data)) for data in packed("resized", "--resize", "40")]
    assert [picture.size for picture in resized] == [
        (30, 20) if path.name == "b.jpg" else (60, 40) for path in files]
    low, high = packed("low", "--quality", "20"), packed("high", "--quality", "90")
    assert all(Image.open(io.BytesIO(data)).format == "JPEG" for data in low + high)
    assert all(len(small) < len(large) for small, large in zip(low, high, strict=True))


def test_unreadable_images_are_listed(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "images")
    (tmp_path / "images" / "class 2" / "1.jpg").write_bytes(b"nothing")
    cut = tmp_path / "images" / "class 5" / "4.jpg"
    cut.write_bytes(cut.read_bytes()[:-900])
    pack(tmp_path / "images", tmp_path / "train")
    assert "left out 2 unreadable files" in capsys.readouterr().out
    listed = (tmp_path / "train_unreadable.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in listed) == ["class 2/1.jpg", "class 5/4.jpg"]
    expected = {data: label for data, label in pictures(tmp_path / "images").items()
                if data not in (b"nothing", cut.read_bytes())}
    assert dict(contents(tmp_path / "train.rec")) == expected


def test_classes_of_another_split(photos, records, tmp_path):
    for name in ("class 1", "class 6"):
        shutil.copytree(photos / name, tmp_path / "images" / name)
    names = records.with_name("train_classes.txt")
    pack(tmp_path / "images", tmp_path / "val", "--classes", names)
    assert {label for _, label in contents(tmp_path / "val.rec")} == {1, 6}
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="classes.txt: damaged, or not a text in UTF-8"):
        pack(tmp_path / "images", tmp_path / "o", "--classes", tmp_path / "classes.txt")
    (tmp_path / "images" / "class 6").rename(tmp_path / "images" / "unknown")
    with pytest.raises(DataError, match="unknown: no such class"):
        pack(tmp_path / "images", tmp_path / "other", "--classes", names)


def test_bad_input_gets_one_line(photos, records, tmp_path, capsys):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "bad" / "class").mkdir(parents=True)
    (tmp_path / "bad" / "class" / "a.jpg").write_bytes(b"nothing")
    (tmp_path / "file").write_text("")
    (tmp_path / "lone.rec").write_bytes(b"precious")
    (tmp_path / "lone2.idx").write_bytes(b"precious")
    for message, *command in (
            ("holds no class folders with images", tmp_path / "empty", tmp_path / "out"),
            ("not one of 1 files is a readable image", tmp_path / "bad", tmp_path / "bad" / "o"),
            ("train.idx is there already", photos, records.with_suffix("")),
            ("lone.rec is there already", photos, tmp_path / "lone"),
            ("lone2.idx is there already", photos, tmp_path / "lone2")):
        with pytest.raises(DataError, match=message):
            pack(*command)
    assert (tmp_path / "lone.rec").read_bytes() == b"precious"
    assert not (tmp_path / "lone.idx").exists()
    for message, *command in (
            ("nowhere' is no folder", tmp_path / "nowhere", tmp_path / "out"),
            ("'0' is not an integer of at least 1", photos, tmp_path / "out", "--quality", "0"),
            ("'0' is not an integer of at least 1", photos, tmp_path / "out", "--resize", "0")):
        with pytest.raises(SystemExit) as stop:
            pack(*command)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        runtime.launch(lambda: pack(photos, tmp_path / "file" / "out"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and str(tmp_path / "file") in error


def many(photos, folder, copies):
    """Enough images for a run to be killed in the middle."""
    for place in sorted(photos.iterdir()):
        (folder / place.name).mkdir(parents=True)
        for path in place.iterdir():
            for copy in range(copies):
                shutil.copy(path, folder / place.name / f"{path.stem}_{copy}.jpg")
    for name in ("0_0.jpg", "no utf-8 \udcff.jpg"):
        (folder / "class 0" / name).write_bytes(b"nothing")


def test_killed_run_goes_on(photos, tmp_path, capsys):
    many(photos, tmp_path / "images", 30)
    command = [sys.executable, PROGRAM, tmp_path / "images",
               tmp_path / "out" / "train", "--workers", "2", "--resize", "30"]
    part = tmp_path / "out" / "train.rec"
    rng, kills, seen = random.Random(0), 0, 0
    while kills < 2:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   start_new_session=True)
        wanted = seen + rng.randrange(100_000, 300_000)     # bytes
        while process.poll() is None and (not part.exists() or part.stat().st_size < wanted):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGSTOP)
        with pytest.raises(RunError, match="another run is writing there"):
            pack(*command[2:])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        seen = part.stat().st_size
        with open(part, "ab") as file:                      # half a record, what a crash leaves
            file.write([recordio.pack(0, 0, b"x" * 500)[:rng.randrange(500)], bytes(99)][kills - 1])
    assert kills and not (tmp_path / "out" / "train.idx").exists()
    pack(tmp_path / "images", tmp_path / "out" / "train", "--resize", "30")
    assert "going on after" in capsys.readouterr().out
    pack(tmp_path / "images", tmp_path / "whole" / "train", "--resize", "30")
    for name in ("train.rec", "train.idx", "train_classes.txt", "train_unreadable.txt"):
        one, other = ((tmp_path / place / name).read_bytes() for place in ("out", "whole"))
        assert one == other, name
    listed = (tmp_path / "out" / "train_unreadable.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in listed) == [
        "class 0/0_0.jpg", "class 0/no utf-8 \ufffd.jpg"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_an_unfinished_file_of_other_flags_is_refused(photos, tmp_path, capsys):
    pack(photos, tmp_path / "train")
    (tmp_path / "train.idx").unlink()           # as if that run had been killed just before its end
    with pytest.raises(DataError, match=r"train\.rec is there already, of other images or flags"):
        pack(photos, tmp_path / "train", "--quality", "50")
    whole = (tmp_path / "train.rec").read_bytes()
    pack(photos, tmp_path / "train")
    assert "going on after 40 of 40" in capsys.readouterr().out
    assert (tmp_path / "train.rec").read_bytes() == whole and len(contents(
        tmp_path / "train.rec")) == 40
