"""The measuring programs run; what they print is not judged."""
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from bench import make_s20, write_tables
from conftest import ROOT, SHARED

from common.errors import RunError


@pytest.mark.parametrize("words, line", [
    ("sage.py --initial_channels 16 --batch_size 20 --rounds 1 --methods sage comix", "comix"),
    ("sage.py --loop --dataset npz --data_dir few.npz --initial_channels 16 --batch_size 5 "
     "--rounds 1", "epoch / bare step"),
    ("resizemix.py mixing --repeats 1", "0.45"),
    ("soft_aug.py --batch_size 8 --repeats 1", "RandAugment"),
    ("safuse.py --rounds 1 --rounds_step 1 --no_table --sizes 32 --initial_channels 16 --batch 4",
     "mixed / plain step"),
    ("samix.py --initial_channels 16 --batch_size 4 --rounds 1", "samix step"),
    ("evaluation.py --arch resnet18 --initial_channels 16 --images 9 --batch_size 5 --rounds 1 "
     "--threads 1", "resnet18, 9 images, 10 conditions"),
    ("hub.py --data digits --steps 2 --batch_size 8 --methods softcrop samix", "the same weights")])
def test_benches_run(words, line, monkeypatch, capsys, tmp_path):
    script, *flags = words.split()
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10) % 2
    np.savez("few.npz", train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        runpy.run_path(str(ROOT / "tests" / "bench" / script), run_name="__main__")
    except SystemExit as end:                               # of runtime.launch
        assert end.code == 0
    assert line in capsys.readouterr().out


# ----------------------------------------------------------------------------------- make_s20.py

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """All of CIFAR-100 in another order, as arrays; skips where it is absent."""
    tool = SHARED / "tools" / "unpack_cifar100.py"
    if not tool.exists():
        pytest.skip("CIFAR-100 lies outside the project")
    file = tmp_path_factory.mktemp("cifar") / "cifar100.npz"
    subprocess.run([sys.executable, str(tool), str(file)], check=True, capture_output=True)
    with np.load(file) as stored:
        arrays = dict(stored)
    for part, seed in (("train", 0), ("test", 1)):
        order = np.random.default_rng(seed).permutation(len(arrays[f"{part}_labels"]))
        for what in ("images", "labels"):
            arrays[f"{part}_{what}"] = arrays[f"{part}_{what}"][order]
    return arrays


def test_s20_from_a_shuffled_cifar(cifar, s20, tmp_path, capsys):
    np.savez(tmp_path / "cifar100.npz", **cifar)
    make_s20.main([str(tmp_path / "cifar100.npz"), str(tmp_path / "s20.npz")])
    assert "4000 training and 2000 test images of 20 classes" in capsys.readouterr().out
    with np.load(s20) as ours, np.load(tmp_path / "s20.npz") as made:
        assert set(made.files) == set(ARRAYS)
        for name in ARRAYS:
            assert made[name].dtype == ours[name].dtype
            assert made[name].tobytes() == ours[name].tobytes(), name


def test_s20_refuses_a_changed_pixel(cifar, s20, tmp_path):
    with np.load(s20) as ours:
        wanted = ours["test_images"][250]
    place, = np.flatnonzero((cifar["test_images"] == wanted).all((1, 2, 3)))
    images = cifar["test_images"].copy()
    images[place, 31, 31, 2] ^= 1
    np.savez(tmp_path / "cifar100.npz", **cifar | {"test_images": images})
    with pytest.raises(RunError, match="1 of S20's 6000 images are not there pixel by pixel, "
                       "first a test image of baby"):
        make_s20.main([str(tmp_path / "cifar100.npz"), str(tmp_path / "s20.npz")])
    assert not (tmp_path / "s20.npz").exists()


def test_s20_of_a_file_that_is_not_there_downloads_nothing(tmp_path):
    with pytest.raises(RunError, match="nosuch.npz: No such file"):
        make_s20.main([str(tmp_path / "nosuch.npz"), str(tmp_path / "s20.npz")])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- write_tables.py

def test_documents_show_what_the_committed_logs_say():
    """RESULTS.md, README.md and the five papers' READMEs, by compare.py."""
    found = write_tables.documents()
    assert len(found) == 7
    for path, text in found.items():
        assert path.read_text() == text, path


def test_a_readmes_row_by_hand():
    """Plain training has a third seed, which the method's row leaves out."""
    def group(*runs):
        return [SimpleNamespace(seed=seed, numbers={"ECE": ece, "visible 47 %": visible,
                "FGSM 8/255": fgsm}) for seed, ece, visible, fgsm in runs]

    groups = {"safuse: baseline": group((1, 0, 0, 0)),
              "sage: vanilla": group((1, 19, 18, 3), (2, 21, 18, 3), (3, 50, 50, 50)),
              "sage: sage": group((1, 5.6, 25.3, 6.1), (2, 5.6, 25.3, 6.0))}
    rows = {"sage: sage": {"run": "sage: sage", "seeds": 2, "accuracy": 68.85, "gain": 5.94,
                           "gain spread": 0.66}}
    assert write_tables.front_row("| SAGE | sage | 2 / 3 | ? | ? | 7 |", groups, rows) == \
        "| SAGE | sage | 2 / 3 | 2 | 68.9 | +5.9 ± 0.7 | 20.0 → 5.6 | 18.0 → 25.3 | 3.0 → 6.1 | 7 |"
