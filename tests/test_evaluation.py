"""The evaluation that all programs share: counts, calibration, occlusion, FGSM, corruptions."""
import csv
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from programs import two_processes
from torch import nn

from common import corruptions, evaluation, gradcam, models
from common.errors import DataError, RunError
from safuse import main as safuse
from sage import main as sage

ALL = SimpleNamespace(amp="off", max_steps=None, cam="", corruptions=None, batch_size=7)
CPU = torch.device("cpu")


def facts(classes=8, side=8, mean=(0.501, 0.413, 0.307), std=(0.2, 0.25, 0.3)):
    return SimpleNamespace(num_classes=classes, image_size=side, width=side, mean=mean, std=std,
                           classes=[f"class {n}" for n in range(classes)], name="made")


class Fixed(nn.Module):
    """Logits are the image's own numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1) * self.weight


def in_batches(images, labels, size=5):
    return [(images[i:i + size], labels[i:i + size]) for i in range(0, len(labels), size)]


def rows_of(path):
    with open(path) as file:
        return {row.pop("condition"): {name: float(value) for name, value in row.items()}
                for row in csv.DictReader(file)}


# -------------------------------------------------------------------------------------- counting

def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    labels = torch.randint(8, (23,))
    images = torch.randn(23, 1, 1, 9) + 2 * torch.eye(9)[labels].view(23, 1, 1, 9)
    net = Fixed().train()
    result = evaluation.evaluate(net, in_batches(images, labels), ALL, facts())
    logits = images.flatten(1)[:, :8]                       # a ninth output is no class of the data
    order = logits.argsort(1, descending=True)
    assert result["count"] == 23 and net.training
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert result["top5"] == pytest.approx(
        100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert result["ece"] == pytest.approx(evaluation.expected_calibration_error(logits, labels))
    trial = SimpleNamespace(amp="off", max_steps=2)
    assert evaluation.evaluate(net, in_batches(images, labels), trial, facts())["count"] == 10


def test_calibration_error_by_hand():
    logits = torch.log(torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.85, 0.15], [0.5, 0.5]]))
    labels = torch.tensor([0, 1, 0, 0])
    confidence, hits, count = evaluation.bin_sums(logits, labels)
    assert count.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 2, 1]     # 0.5 belongs to (0.4, 0.5]
    assert hits[8] == 1 and confidence[8] == pytest.approx(2 * 0.85)
    expected = (2 * 0.35 + 0.05 + 0.5) / 4
    assert evaluation.expected_calibration_error(logits, labels) == pytest.approx(expected,
                                                                                  abs=1e-6)


# ------------------------------------------------------------------------------------ conditions

def test_occlusion_slides_each_image_its_own_way():
    info = facts(side=16)
    pixels = torch.randint(0, 256, (50, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    images = (pixels / 255 - mean) / std
    occluded = evaluation.occlude(images, 4, info)
    hidden = occluded == 0
    assert (hidden.float().mean((1, 2, 3)) == 1 - 0.75 ** 2).all()
    corners = torch.stack([hidden[:, 0, y, x] for y in (0, 15) for x in (0, 15)], 1)
    assert len(corners.unique(dim=0)) == 4                  # all four directions
    for one, moved, (y, x) in zip(images, occluded, ((~hidden[:, 0]).nonzero()[i * 144, 1:].tolist()
                                                     for i in range(50)), strict=True):
        top, left = 4 - y, 4 - x                            # what is seen begins there
        assert torch.equal(moved[:, y:y + 12, x:x + 12], one[:, top:top + 12, left:left + 12])
    parts = torch.cat([evaluation.occlude(images[i::2], 4, info) for i in (0, 1)])
    assert torch.equal(parts, torch.cat([occluded[::2], occluded[1::2]]))   # in any batch, alike
    plain = facts(side=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (evaluation.occlude(pixels / 255, 4, plain) == 0.5).float().mean() > 0.4


def test_fgsm_is_one_clipped_step_along_the_sign():
    torch.manual_seed(0)
    info = facts(10, 16)
    net = models.build("resnet18", 11, 16, initial_channels=8).eval()   # one output of no class
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    pixels, labels = torch.rand(30, 3, 16, 16), torch.arange(30) % 10
    images = (pixels - mean) / std
    names, outputs = evaluation.conditions(net, info)
    seen = []
    with torch.no_grad():
        net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        logits = list(outputs(images, labels))
    assert len(logits) == len(names) == len(seen) == 10
    leaf = images.clone().requires_grad_()
    F.cross_entropy(net(leaf)[:, :10], labels).backward()
    for moved, step in zip(seen[-3:-1], (4, 8), strict=True):           # the last is this test's
        expected = (pixels + step / 255 * leaf.grad.sign()).clamp(0, 1)
        assert torch.allclose(moved * std + mean, expected, atol=1e-6)
    assert (seen[-2] - images).abs().max() > 0


def test_no_condition_is_asked_twice():
    """Of images of 40×16 pixels, moved by more than 16 along both axes, nothing would be seen."""
    info = SimpleNamespace(**vars(facts(4, 40)) | {"width": 16})
    names, _ = evaluation.conditions(None, info)
    assert len(names) == len(set(names)) == 6 and "visible 0 %" not in names


def report(net, loader, info, folder, checkpoint=None, **flags):
    run = SimpleNamespace(writes=True, folder=folder)
    evaluation.report(net, loader, SimpleNamespace(**vars(ALL) | flags), info, run, checkpoint)
    return rows_of((checkpoint or folder / "x").with_name(
        f"{checkpoint.stem}_evaluation.csv" if checkpoint else "evaluation.csv"))


def test_report_writes_every_condition(tmp_path, capsys):
    torch.manual_seed(0)
    info = facts(4, 32)
    net = models.build("resnet18", 4, 32, initial_channels=8)
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 4
    rows = report(net, in_batches(images, labels), info, tmp_path)
    assert list(rows) == ["clean", "visible 82 %", "visible 66 %", "visible 47 %", "visible 35 %",
                          "visible 25 %", "visible 17 %", "visible 10 %", "fgsm 4/255",
                          "fgsm 8/255"]
    assert {row["count"] for row in rows.values()} == {20} and net.training
    assert rows["fgsm 8/255"]["loss"] > rows["fgsm 4/255"]["loss"] > rows["clean"]["loss"]
    assert "clean: accuracy" in capsys.readouterr().out
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.width > 1200 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    report(net, in_batches(images, labels), info, tmp_path, tmp_path / "best.pt", max_steps=1)
    assert rows_of(tmp_path / "best_evaluation.csv")["clean"]["count"] == 5
    assert (tmp_path / "best_evaluation.png").exists()


def test_other_data_are_normalised_as_the_run_s(tmp_path, capsys):
    """The same test images beside darker training images, and --normalise forgotten."""
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = draw.integers(0, 100, (40, 32, 32, 3), np.uint8) + np.uint8(30) * (
        labels[:, None, None, None] == 1)
    for name, factor in (("own", 1), ("other", 3)):
        np.savez(tmp_path / f"{name}.npz", train_images=images // factor, train_labels=labels,
                 test_images=images, test_labels=labels)
    words = "--dataset npz --initial_channels 16 --device cpu --batch_size 20 --epochs 1".split()
    for program, own, forgotten in (
            (sage, "--schedule 9 --gammas 1 --arch resnet18", ""),
            (safuse, "--method baseline", "--normalise True")):
        root = tmp_path / program.__name__
        own = [*words, *own.split()]
        program.main([*own, *forgotten.split(), "--data_dir", str(tmp_path / "own.npz"),
                      "--root_dir", str(root)])
        folder, = root.iterdir()
        wanted = rows_of(folder / "evaluation.csv")
        for data in ("other", "own"):
            program.main([*own, "--data_dir", str(tmp_path / f"{data}.npz"), "--evaluate",
                          str(folder / "checkpoint.pt")])
            assert rows_of(folder / "checkpoint_evaluation.csv") == wanted
            said = "normalised as the checkpoint's run" in capsys.readouterr().out
            assert said == (data == "other" or bool(forgotten))


def test_classes_in_another_order_are_an_error(tmp_path, capsys):
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    images += (80 * labels).astype(np.uint8)[:, None, None, None]
    for name, classes in (("own", "cat dog cow"), ("moved", "dog cat cow"), ("new", "cat dog owl")):
        np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=labels,
                 test_images=images, test_labels=labels, classes=classes.split())
    words = ["--dataset", "npz", "--initial_channels", "4", "--device", "cpu", "--batch_size", "6",
             "--arch", "preactresnet18", "--root_dir", str(tmp_path / "runs"), "--data_dir"]
    sage.main([*words, str(tmp_path / "own.npz"), "--epochs", "1"])
    file = next((tmp_path / "runs").glob("*/checkpoint.pt"))
    capsys.readouterr()
    sage.main([*words, str(tmp_path / "new.npz"), "--evaluate", str(file)])
    assert "warning: the checkpoint's classes have other names: cow (here owl)" in \
        capsys.readouterr().err
    with pytest.raises(RunError, match=r"another order: cat \(here dog\), dog \(here cat\)"):
        sage.main([*words, str(tmp_path / "moved.npz"), "--evaluate", str(file)])


def test_an_evaluation_goes_when_its_network_trains_on(tmp_path, monkeypatch):
    words = ["--dataset", "digits", "--image_size", "8", "--labels_per_class", "3", "--device",
             "cpu", "--batch_size", "30", "--initial_channels", "4", "--arch", "preactresnet18",
             "--root_dir", str(tmp_path)]
    sage.main([*words, "--epochs", "1"])
    folder, = tmp_path.iterdir()
    before = (folder / "args.json").read_text()
    sage.main([*words, "--epochs", "1", "--resume", "auto", "--workers", "1"])   # reports again
    assert (folder / "args.json").read_text() == before and (folder / "evaluation.csv").exists()
    monkeypatch.setattr(evaluation, "report", lambda *args: None)
    sage.main([*words, "--epochs", "2", "--resume", "auto"])
    assert not (folder / "evaluation.csv").exists() and not (folder / "evaluation.png").exists()
    assert (folder / "args.json").read_text() != before


def test_two_ranks_report_what_one_does(tmp_path):
    words = ("sage/main.py --dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 "
             "--arch preactresnet18 --initial_channels 8 --device cpu --epochs 1 --schedule 9 "
             f"--gammas 1 --root_dir {tmp_path}").split()
    sage.main(words[1:])
    folder, = tmp_path.iterdir()
    two_processes(*words, "--evaluate", folder / "checkpoint.pt")
    one, two = rows_of(folder / "evaluation.csv"), rows_of(folder / "checkpoint_evaluation.csv")
    assert one.keys() == two.keys() and one["clean"]["count"] == 355
    for name, row in one.items():
        assert two[name] == pytest.approx(row, rel=1e-4), name


# ----------------------------------------------------------------------------------- corruptions

@pytest.fixture
def corrupted(tmp_path):
    """Two corruptions of 12 images in both layouts, (folder, folder, images by name, labels)."""
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 4
    arrays = {name: rng.integers(0, 256, (60, 8, 8, 3), np.uint8) for name in ("fog", "snow storm")}
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    flat.mkdir()
    np.save(flat / "labels.npy", np.tile(labels, 5))
    for name, images in arrays.items():
        np.save(flat / f"{name}.npy", images)
        for i, image in enumerate(images):
            folder = deep / name / str(i // 12 + 1) / f"class {labels[i % 12]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    return flat, deep, arrays, labels


def test_corruptions_in_both_layouts(tmp_path, corrupted, capsys):
    flat, deep, arrays, labels = corrupted
    info = facts(4, 8)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    clean = [(torch.randn(12, 3, 8, 8), torch.from_numpy(labels))]
    found = [report(net, clean, info, tmp_path, corruptions=str(place)) for place in (flat, deep)]
    assert found[0] == found[1]
    errors = []
    for name, images in arrays.items():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        right = net((pixels - mean) / std).argmax(1).view(5, 12) == torch.from_numpy(labels)
        for severity, share in enumerate(right.double().mean(1).tolist(), 1):
            row = found[0][f"{name} {severity}"]
            assert row["accuracy"] == pytest.approx(100 * share, rel=1e-5) and row["count"] == 12
            errors.append(100 - 100 * share)
    line = f"mean corruption error: {np.mean(errors):.2f} % over 2 corruptions of 5 severities"
    assert capsys.readouterr().out.count(line) == 2


def test_corruptions_that_do_not_fit_are_named(tmp_path, corrupted):
    flat, deep, arrays, labels = corrupted

    def refused(place, words, info=None):
        with pytest.raises(DataError, match=words):
            for _, loader in corruptions.read(place, info or facts(4, 8), 7, CPU):
                list(loader)

    refused(tmp_path / "flat" / "none", "none: neither")
    refused(flat, r"fog.npy: uint8 images of \(8, 8, 3\).*\(32, 32, 3\)", facts(4, 32))
    refused(deep, r"fog/1/.*png: .*\(32, 32, 3\)", facts(4, 32))
    refused(flat, "60 labels in labels.npy or these 3 classes", facts(3, 8))
    refused(deep, "class 3: a class that made lacks", facts(3, 8))
    (flat / "__MACOSX").mkdir()
    assert len(corruptions.find(flat, facts(4, 8))) == 10
    for wrong in (labels, labels[::-1]):                    # severity 2 in another order
        np.save(flat / "labels.npy", np.concatenate([labels, np.roll(wrong, 1), *[labels] * 3]))
        refused(flat, "fog.npy: 60 images of five severities, each in the order")
    for wrong in (np.tile(labels, 5)[:, None] - 1, np.tile(labels, 6), labels[:0]):
        np.save(flat / "labels.npy", wrong)
        refused(flat, "fog.npy: 60 images")
    np.save(flat / "labels.npy", labels + 0.5)
    refused(flat, "labels.npy: damaged, or not integers")
    np.save(flat / "labels.npy", labels[:, None])           # a column of one severity's
    assert len(corruptions.find(flat, facts(4, 8))) == 10
    whole = (flat / "snow storm.npy").read_bytes()
    for wrong in (whole[:-1000], b"<html>"):
        (flat / "snow storm.npy").write_bytes(wrong)
        refused(flat, "snow storm.npy: damaged, or not images")
    np.save(flat / "fog.npy", arrays["fog"][:12])           # one severity alone
    refused(flat, "fog.npy: 12 images")
    np.save(flat / "fog.npy", arrays["fog"][:50])
    refused(flat, "fog.npy: 50 images")
    (deep / "fog" / "4").rename(deep / "fog" / "6")
    refused(deep, "fog/4: No such file")


def test_corruptions_are_looked_at_before_the_training(tmp_path, corrupted):
    _, deep, *_ = corrupted
    with pytest.raises(DataError, match="fog/1/class 0: a class that digits lacks"):
        sage.main(["--dataset", "digits", "--arch", "preactresnet18", "--initial_channels", "4",
                   "--epochs", "1", "--root_dir", str(tmp_path), "--corruptions", str(deep)])
    with pytest.raises(DataError, match="fog/1/class 0/.*png: uint8 images of .8, 8, 3."):
        corruptions.find(deep, facts(4, 32))
    assert not list(tmp_path.rglob("log.csv"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_of_nan_is_an_error(tmp_path, value):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    nn.init.constant_(net[1].bias, value)
    with pytest.raises(RunError, match="outputs are not finite .clean, visible"):
        report(net, [(torch.randn(12, 3, 8, 8), torch.arange(12) % 4)], facts(4, 8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wordnet_folders_are_classes_in_order(tmp_path):
    info, names = facts(2, 8), ["n00000002", "n00000010"]
    assert corruptions.class_index(tmp_path, names, info) == [0, 1]
    info.classes = ["n00000002", "n00000011"]               # another subset
    with pytest.raises(DataError, match="n00000010: a class that made lacks"):
        corruptions.class_index(tmp_path, names, info)


# -------------------------------------------------------------------------------------- Grad-CAM

@pytest.mark.parametrize("name", ["preactresnet18", "resnet18", "convnext_t", "swin_t"])
def test_the_last_feature_map_is_found(name):
    size = 64 if name in ("convnext_t", "swin_t") else 32
    net = models.build(name, 5, size, **({} if size == 64 else {"initial_channels": 8})).eval()
    images = torch.randn(2, 3, size, size)
    maps, logits = gradcam.grad_cam(net, gradcam.last_layer(net, images), images)
    assert maps.shape == (2, size, size) and 0 < maps.max() <= 1 and logits.shape == (2, 5)
    with pytest.raises(RunError, match="a ReLU gives no feature map"):     # it never runs
        gradcam.grad_cam(net, torch.nn.ReLU(), images)
    if name == "swin_t":                                    # of channels last, (B, h, w, C)
        with pytest.raises(RunError, match="gives no feature map"):
            gradcam.grad_cam(net, gradcam.find_layer(net, "features.5.1"), images)
    best = gradcam.grad_cam(net, gradcam.last_layer(net, images), images, num_classes=3)[1]
    assert torch.equal(best, logits[:, :3])
    with pytest.raises(RunError, match="outputs are not finite"):
        gradcam.grad_cam(net, gradcam.last_layer(net, images), images * math.nan)


@pytest.mark.parametrize("program, data", [
    *((name, "digits") for name in ("sage", "safuse", "samix", "resizemix", "soft_aug")),
    ("safuse", "s20"), ("samix", "s20")])
def test_every_program_evaluates_all_conditions_and_draws_grad_cam(program, data, tmp_path, capsys,
                                                                   request):
    main = importlib.import_module(f"{program}.main").main
    words = ("--labels_per_class 12 --batch_size 30 --device cpu --initial_channels 16 --seed 0 "
             f"--max_steps 1 --root_dir {tmp_path} --arch "
             + ("preactresnet18" if program == "sage" else "resnet18")).split()
    words += ["--dataset", "digits", "--image_size", "16"] if data == "digits" else \
        ["--dataset", "npz", "--data_dir", str(request.getfixturevalue("s20"))]
    main(words)
    main([*words, "--cam", str(tmp_path / "cam.png")])
    assert f"Grad-CAM: {tmp_path / 'cam.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.width > 800
    assert not list(tmp_path.rglob("best_evaluation.csv"))
    main([*words, "--evaluate"])
    written, = tmp_path.rglob("best_evaluation.csv")
    rows = rows_of(written)
    assert [name.split()[0] for name in rows] == ["clean"] + ["visible"] * 7 + ["fgsm"] * 2
    assert {row["count"] for row in rows.values()} == {30}
    assert all(np.isfinite([*row.values()]).all() for row in rows.values())
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--cam", "a.png", "--preview", "b.png"])
    assert "--preview: not allowed with argument --cam" in capsys.readouterr().err
