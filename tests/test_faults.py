"""Faults from outside: kills, full disks, changed or harmful data, a second run, another clock."""
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from programs import Program, same, weights

from common import checkpoint, data
from common.errors import DataError
from sage import main as sage

SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 --arch "
         "preactresnet18 --initial_channels 4 --learning_rate 0.05 --rand_pos 0.02 --m_part 8 "
         "--device cpu").split()
PROGRAM = Program(sage, SMALL)
train, faults = PROGRAM.train, PROGRAM.faults
TINY = [*SMALL, "--image_size", "8", "--labels_per_class", "6", "--print_freq", "1"]


def whole_run(root, *words):
    return train(root, *TINY[len(SMALL):], *words)


def test_many_kills_lose_nothing(tmp_path):
    """KILLS=50 in the environment is the run whose result RESULTS.md records."""
    kills = int(os.environ.get("KILLS", 6))
    words = ["--method", "sage", "--update_ratio", "0.7", "--epochs", str(4 * kills), "--schedule",
             "4", "8", "--dropout", "True"]
    result = subprocess.run([sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), str(kills),
                             str(tmp_path / "killed"), *TINY, *words],
                            capture_output=True, text=True)
    assert f"killed while writing: {kills // 2}, at a random moment: {kills - kills // 2}; " \
        "ended with 0" in result.stdout, result.stdout + result.stderr[-2000:]
    whole = whole_run(tmp_path / "whole", *words)
    killed = tmp_path / "killed" / whole.name
    one, two = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, killed))
    assert same(one["model"], two["model"])
    assert len(one["history"]) == len(two["history"]) == 4 * kills
    for a, b in zip(one["history"], two["history"], strict=True):
        assert all(a[name] == b[name] for name in a if name not in ("seconds", "images_per_second"))
    assert same(weights(whole, "best.pt"), weights(killed, "best.pt"))
    assert len((killed / "log.csv").read_text().splitlines()) == 4 * kills + 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place],
                      capture_output=True).returncode:
        pytest.skip("mounting a small file system takes more rights")
    yield place
    subprocess.run(["umount", place])


def fill(disk, left: int):
    """Fills the disk but for about `left` bytes."""
    with open(disk / "filler", "wb") as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(max(0, free - left)))


@pytest.mark.parametrize("left, name", [(64 << 10, "checkpoint.pt"), (0, "log.csv")])
def test_full_disk_while_training(small_disk, tmp_path, left, name, capsys):
    words = ["--epochs", 6, "--schedule", 3, "--gammas", 0.1]
    folder = whole_run(small_disk, "--epochs", 2, *words[2:])
    before = (folder / "checkpoint.pt").read_bytes()
    fill(small_disk, left)
    code, error = faults(capsys, *TINY[len(SMALL):], *words, "--root_dir", small_disk, "--resume",
                         "auto")
    assert code == 1 and error.count("error:") == 1 and "Traceback" not in error
    assert "full" in error or "No space left" in error
    assert (folder / "checkpoint.pt").read_bytes() == before or name == "log.csv"
    assert checkpoint.load(folder / "checkpoint.pt")["epoch"] == 2
    assert not list(folder.glob(".*.new"))
    (small_disk / "filler").unlink()
    resumed = whole_run(small_disk, *words, "--resume", "auto")
    assert same(weights(resumed), weights(whole_run(tmp_path / "whole", *words)))


def test_full_disk_while_drawing(small_disk, capsys):
    fill(small_disk, 0)
    code, error = faults(capsys, "--preview", small_disk / "mixed.png")
    assert code == 1 and "mixed.png" in error and "No space left" in error
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_corrupt_newest_checkpoint_costs_no_exactness(tmp_path, capsys):
    words = ["--epochs", 5, "--schedule", 3, "--gammas", 0.1, "--method", "puzzle"]
    folder = whole_run(tmp_path / "a", "--epochs", 3, *words[2:])
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    resumed = whole_run(tmp_path / "a", *words, "--resume", "auto")
    assert "going on from" in capsys.readouterr().err
    assert same(weights(resumed), weights(whole_run(tmp_path / "b", *words)))


def test_changed_data_are_said(tmp_path, capsys):
    file, rng = tmp_path / "set.npz", np.random.default_rng(0)
    arrays = {"train_images": rng.integers(0, 256, (300, 8, 8, 3), np.uint8),
              "train_labels": np.arange(300) % 10,
              "test_images": rng.integers(0, 256, (40, 8, 8, 3), np.uint8),
              "test_labels": np.arange(40) % 10}
    words = ["--dataset", "npz", "--data_dir", file, "--max_steps", 1, "--labels_per_class", 30]
    np.savez(file, **arrays)
    whole_run(tmp_path / "r", *words)
    arrays["train_images"][123, 4, 5, 1] ^= 1                   # one bit of one pixel
    np.savez(file, **arrays)
    code, error = faults(capsys, *TINY[len(SMALL):], *words, "--root_dir", tmp_path / "r",
                         "--resume", "auto")
    assert code == 1 and "is of another run: data " in error


def test_changed_image_folders_are_said(tmp_path):
    def fingerprint():
        return data.load("imagenet", str(tmp_path), batch_size=2, image_size=8, loader="torch",
                         device=torch.device("cpu"))[2].fingerprint

    from PIL import Image
    for part, name, i in itertools.product(("train", "val"), "ab", range(2)):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    seen = [fingerprint(), fingerprint()]
    Image.effect_noise((9, 9), 90).save(tmp_path / "train" / "a" / "1.png")
    seen.append(fingerprint())
    (tmp_path / "val" / "a" / "0.png").rename(tmp_path / "val" / "b" / "2.png")
    seen.append(fingerprint())
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    words = [*TINY, "--epochs", "1000", "--root_dir", str(tmp_path)]
    with subprocess.Popen([sys.executable, str(ROOT / "sage" / "main.py"), *words],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        try:
            next(line for line in first.stdout if "epoch 1 step 1/" in line)
            for wish in ([], ["--resume", "auto"]):
                code, error = faults(capsys, *words[len(SMALL):], *wish)
                assert code == 1 and "another run is writing there" in error
            assert first.poll() is None
        finally:
            first.kill()


def test_clock_set_back(tmp_path, monkeypatch):
    clock = itertools.count(2e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    folder = whole_run(tmp_path, "--epochs", 2)
    history = checkpoint.load(folder / "checkpoint.pt")["history"]
    assert len(history) == 2 and all(0 < row["seconds"] < 100 for row in history)


class Harm:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_cifar_pickles_are_opened_after_their_checksum_only(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(DataError, match="cifar-100-python: missing or damaged"):
        data.load("cifar100", str(tmp_path), batch_size=10, device=torch.device("cpu"))
    assert not (tmp_path / "harmed").exists()


def test_foreign_archives_are_not_unpacked(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    place = tmp_path / "data"
    place.mkdir()
    with tarfile.open(place / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(__file__, "../outside.py")
        archive.add(__file__, "cifar-100-python/train")
    with pytest.raises(DataError, match="missing or damaged.*no network"):
        data.load("cifar100", str(place), batch_size=10, device=torch.device("cpu"))
    assert not (tmp_path / "outside.py").exists() and not (place / "cifar-100-python").exists()


def test_odd_terminals(tmp_path):
    """A broken plotting backend, ASCII output, and no stdout at all."""
    words = [sys.executable, str(ROOT / "sage" / "main.py"), *TINY, "--max_steps", "1",
             "--root_dir", str(tmp_path)]
    odd = {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *words], env=os.environ | odd,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert next(tmp_path.glob("*/curves.png")).stat().st_size > 5000
    result = subprocess.run([*words, "--help"], env=os.environ | odd, capture_output=True)
    assert result.returncode == 0 and b"--solver" in result.stdout


def test_a_reader_that_leaves_is_one_line(tmp_path):
    words = [sys.executable, str(ROOT / "sage" / "main.py"), *TINY, "--max_steps", "1"]
    with open("/dev/full", "w") as full:
        result = subprocess.run([*words, "--root_dir", str(tmp_path)], stdout=full,
                                stderr=subprocess.PIPE, text=True)
    *warnings, error = result.stderr.splitlines()
    assert (result.returncode, error) == (1, "error: No space left on device")
    assert all("no effect" in line for line in warnings)


def test_ctrl_c_while_importing_is_silent(tmp_path):
    with subprocess.Popen([sys.executable, "-X", "importtime", str(ROOT / "sage" / "main.py"),
                           "--root_dir", str(tmp_path)], stderr=subprocess.PIPE,
                          text=True) as run:
        next(line for line in run.stderr if line.rstrip().endswith("torch.version"))
        run.send_signal(signal.SIGINT)
        assert "Traceback" not in run.stderr.read()
    assert run.returncode == -signal.SIGINT
