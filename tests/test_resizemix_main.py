"""ResizeMix's program as users run it: every row of its table, ImageNet on two ranks, faults."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pictures import HAS_DALI, make_photos, pack
from PIL import Image
from programs import Program, same, weights
from torchvision.transforms import v2

from common import checkpoint, distributed, gradcam, models, plots
from common.data import Recipe
from common.errors import DataError, RunError
from common.mixing import draw_lambda, draw_pixels
from common.models.features import build_backbone
from resizemix import main as resizemix
from resizemix import mixing, randaugment

TINY = "--net_name wrn16_8 --initial_channels 4 --init_lr 0.05 --warmup_epochs 0 --device cpu"
SMALL = f"--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 {TINY}".split()
PROGRAM = Program(resizemix, SMALL)
train, arguments = PROGRAM.train, PROGRAM.arguments
faults = Program(resizemix, []).faults
STREAM = f"--dataset imagenet --image_size 32 --batch_size 16 --workers 1 {TINY}".split()
ROWS = {"baseline": "--resizemix False", "cutout": "--resizemix False --cutout 8",
        "cutmix": "--resizemix False --cutmix_prob 1",
        "randaugment": "--resizemix False --randaugment True",
        "autoaugment": "--resizemix False --autoaugment True",
        "resizemix": "", "randaugment-resizemix": "--randaugment True",
        "randaugment-resizemix-batch_aug": "--randaugment True --batch_aug True"}
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


@pytest.fixture
def no_pictures(monkeypatch):
    """Skips what takes most of a tiny run's time."""
    monkeypatch.setattr(resizemix, "draw_preview", lambda *args: None)
    monkeypatch.setattr(plots, "curves", lambda *args: None)


def batch(n=6, side=16):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, 3, side, side, generator=generator),
            torch.randint(10, (n,), generator=generator))


class Ten:
    num_classes, mean, std = 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


# -------------------------------------------------------------------------------------- in memory

@pytest.fixture(scope="module")
def trained():
    """Last layers of the rows trained so far."""
    return {}


@pytest.mark.parametrize("method", ROWS)
def test_every_row_trains_and_closes(tmp_path, method, capsys, trained):
    folder = train(tmp_path, *ROWS[method].split(), "--max_steps", 2, "--job_name", "mine")
    printed = capsys.readouterr().out
    assert "median of the last 1 epochs" in printed and f"method {method}\n" in printed
    assert re.search(r"[\d,]{6,} parameters; 4 steps of 30 .* [\d.]+ M multiply-adds", printed)
    assert folder.name == f"digits_wrn16_8_{method}_seed0_mine"
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "log.csv", "curves.png", "mixed.png", "evaluation.csv", "evaluation.png",
        "checkpoint.pt", "best.pt", ".lock"}
    assert json.loads((folder / "args.json").read_text())["multiply_adds"] > 1e5
    torch.manual_seed(0)
    start = resizemix.models.build("wrn16_8", 10, 16, initial_channels=4).fc.weight
    ends = {"none": start} | trained
    trained[method] = weights(folder)["fc.weight"]
    assert not any(torch.equal(trained[method], end) for end in ends.values())  # no flag is idle


@pytest.mark.parametrize("words", [
    "--clip_grad 0.1 --nesterov True --crop_test True --evaluation True",
    "--lr_schedule step --milestones 1 --padding 2 --amp bf16 --cutout 4 --cutmix_prob 0.5",
    "--loader dali --randaugment True --restart_epochs 1 2 --tb_path events --meas_lat True",
    "--net_name shakeshake26_2x32d", "--net_name resnet50 --initial_channels 8",
    "--config cifar10_ss.py --net_name preactresnet18"])
def test_variants_train(tmp_path, words, capsys):
    folder = train(tmp_path, *words.split(), "--max_steps", 1)
    assert torch.isfinite(weights(folder)["fc.weight"]).all()
    printed = capsys.readouterr().out
    assert ("latency: " in printed) == ("meas_lat" in words) == (folder / "tensorboard").exists()
    assert printed.count("test: accuracy") == ("evaluation" in words)


def smooth_network(*_, **__):
    """A network in which roundings stay small."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8),
                               torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10))


def half_cosine(share, low=0.0, high=0.1):
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("words, rate", [
    ("--warmup_epochs 1 --warmup_start_lr 0.02 --min_lr 0.03",
     lambda k: 0.02 + 0.08 * k / 2 if k < 2 else half_cosine((k - 2) / 4, 0.03)),
    ("--cutmix_prob 1 --cutmix_beta 0.3 --restart_epochs 1 2 --nesterov True --min_lr 0",
     lambda k: half_cosine(k / 2 if k < 2 else (k - 2) / 4)),
    ("--resizemix_low 0.4 --resizemix_high 0.6 --momentum 0.5 --lr_schedule step --milestones 1 2 "
     "--gamma 0.5", lambda k: 0.1 * 0.5 ** (k // 2))])
def test_training_is_the_recipe(tmp_path, words, rate, no_pictures, monkeypatch):
    """Mixing, loss, weight decay, momentum and learning rate, by hand."""
    words = [*words.split(), "--weight_decay", 0.01, "--epochs", 3, "--init_lr", 0.1,
             "--labels_per_class", 6]
    monkeypatch.setattr(resizemix.models, "build", smooth_network)
    trained = weights(train(tmp_path, *words))
    args = arguments(" ".join(map(str, words)))
    batches, _, _ = resizemix.data.load(
        "digits", "", Recipe(padding=4), batch_size=30, image_size=16,
        device=torch.device("cpu"), seed=0, labels_per_class=6, drop_last=True)
    torch.manual_seed(0)
    net = smooth_network()
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for epoch in range(3):
        batches.set_epoch(epoch)
        for step, (images, labels) in enumerate(batches):
            generator = distributed.step_generator(0, epoch, step)
            torch.rand((), generator=generator)             # CutMix or ResizeMix
            perm = torch.randperm(30, generator=generator)
            if args.cutmix_prob:
                lam = draw_lambda(args.cutmix_beta, generator)
                centre, = draw_pixels(1, (16, 16), generator)
                mixed, ratio = mixing.cutmix(images, perm, centre, lam)
            else:
                scale = args.resizemix_low + torch.rand(
                    (), generator=generator, dtype=torch.float64).item() * (
                    args.resizemix_high - args.resizemix_low)
                corners = mixing.draw_corners(30, (16, 16), scale, generator)
                mixed, ratio = mixing.resize_mix(images, perm, scale, corners)
            net.zero_grad()
            logits, ratio = net(mixed), ratio[0]
            (ratio * F.cross_entropy(logits, labels)
             + (1 - ratio) * F.cross_entropy(logits, labels[perm])).backward()
            with torch.no_grad():
                for name, p in net.named_parameters():
                    grad = p.grad + 0.01 * p
                    velocity[name] = args.momentum * velocity[name] + grad
                    ahead = velocity[name] * args.momentum + grad if args.nesterov else \
                        velocity[name]
                    p -= rate(2 * epoch + step) * ahead
    for name, value in net.state_dict().items():
        assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("words, expected", [
    ("--padding 3 --workers 5 --loader dali --batch_size 10 --seed 4 --data_path there",
     {"padding": 3, "workers": 5, "loader": "dali", "batch_size": 10, "seed": 4,
      "drop_last": True, "transform": None}),
    ("--dataset imagenet --min_scale 0.3 --color_jitter True", {"scale": (0.3, 1),
                                                                "color_jitter": 0.4}),
    ("--dataset imagenet --randaugment True", {
        "transform_first": False, "transform": randaugment.transform, "scale": (0.08, 1),
        "color_jitter": 0, "interpolation": "lanczos", "crop": None}),
    ("--randaugment True", {"transform_first": True, "transform": randaugment.transform}),
    ("--dataset cifar100", {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}),
    ("--dataset cifar10", {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)})])
def test_what_the_loader_is_asked_for(words, expected, monkeypatch):
    seen = PROGRAM.asks_for(monkeypatch, words)
    assert {name: seen[name] for name in expected} == expected
    assert seen["dataset"] == arguments(words).dataset
    assert seen["place"] == ("there" if "there" in words else "data")
    assert bool(seen["mean"]) == ("cifar" in words)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_precision(amp):
    class Spy(torch.nn.Linear):
        def forward(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(images.mean((2, 3)))

    args, seen = arguments(f"--amp {amp} --max_steps 1"), []
    resizemix.training_step(Spy(3, 10), *batch(), args, Ten, torch.Generator(),
                            torch.amp.GradScaler("cpu", enabled=False))
    _, test, info = resizemix.data.load("digits", "", batch_size=50, image_size=16,
                                        device=torch.device("cpu"))
    resizemix.evaluation.evaluate(Spy(3, 10), test, args, info)
    assert seen == [amp == "bf16"] * 2


def test_gradients_are_clipped(tmp_path):
    moved = []
    for norm in ("1e-9", "0"):
        folder = train(tmp_path / norm, "--clip_grad", norm, "--weight_decay", 0, "--max_steps", 1)
        torch.manual_seed(0)
        before = resizemix.models.build("wrn16_8", 10, 16, initial_channels=4).fc.weight
        moved.append((weights(folder)["fc.weight"] - before).abs().max().item())
    assert moved[0] < 1e-8 and moved[1] > 1e-4


def test_configurations_and_overrides():
    args = resizemix.parse_args(["--config", "cifar100_ss.py", "--init_lr", "0.3", "--resizemix",
                                 "False", "--data_path", "d", "--save", "s", "--report_freq", "7"])
    assert (args.arch, args.epochs, args.lr) == ("shakeshake26_2x96d", 1800, 0.3)
    assert (args.resizemix, args.weight_decay, args.image_size) == (False, 1e-4, 32)
    assert (args.data_dir, args.root_dir, args.print_freq) == ("d", "s", 7)
    args = resizemix.parse_args(["--config", "imagenet_res", "--load_path", "w.pt"])
    assert (args.dataset, args.arch, args.batch_size, args.resume) == (
        "imagenet", "resnet101", 512, "w.pt")
    assert resizemix.parse_args(["--dataset", "tiny-imagenet-200"]).image_size is None
    for config in resizemix.configs.CONFIGS.values():
        assert set(config) <= set(vars(args))               # every entry is a flag


@pytest.mark.parametrize("method, words", {
    "baseline": "--resizemix False", "cutout": "--resizemix False --cutout 16",
    "cutmix": "--resizemix False --cutmix_prob 0.5",
    "randaugment": "--resizemix f --randaugment t", "autoaugment": "--resizemix f --autoaugment t",
    "resizemix": "", "resizemix+": "--randaugment True",
    "cutmix --cutmix_prob 1": "--resizemix False --cutmix_prob 1"}.items())
def test_methods_are_short_for_flags(method, words):
    assert resizemix.parse_args(["--method", *method.split()]) == \
        resizemix.parse_args(words.split())


def test_learning_rates():
    args = arguments("--lr_schedule step --milestones 10 15 --init_lr 0.05")
    assert [resizemix.step_rate(args, epoch * 7, 7) for epoch in (0, 9, 10, 15, 19)] == \
        pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.0005])
    args = arguments("--epochs 10 --warmup_epochs 2 --init_lr 0.2")
    assert [resizemix.step_rate(args, step, 5) for step in (0, 5, 10, 30, 50)] == pytest.approx(
        [1e-5, 0.100005, 0.2, 0.100005, 1e-5])


# ----------------------------------------------------------------------------------------- mixing

def mix(words, number=0):
    images, labels = batch()
    args = arguments(words)
    mixed = resizemix.mix_batch(images, labels, args, Ten, torch.Generator().manual_seed(number))
    return images, labels, SimpleNamespace(**dict(zip(("images", "targets", "perm"), mixed,
                                                      strict=True)))


def test_mixed_batches_and_their_targets():
    images, labels, mixed = mix("--resizemix False")
    assert torch.equal(mixed.images, images)
    assert torch.equal(mixed.targets, F.one_hot(labels, 10).float())
    for words in ("", "--resizemix False --cutmix_prob 1"):
        images, labels, mixed = mix(words, 1)
        stays = (mixed.images == images).all(1).float().mean((1, 2))
        other = labels[mixed.perm] != labels
        own = mixed.targets[torch.arange(6), labels]
        assert other.any() and torch.allclose(own[other], stays[other], atol=1e-6)
        assert torch.allclose(mixed.targets.sum(1), torch.ones(6)) and own[other].max() < 1
    once, twice = mix("")[2], mix("--batch_aug True")[2]
    assert twice.images.shape == (12, 3, 16, 16)
    assert torch.equal(twice.targets, torch.cat([once.targets] * 2))
    shares = {bool((mix("--cutmix_prob 0.5", n)[2].images == mix("", n)[2].images).all())
              for n in range(12)}
    assert len(shares) == 2                                 # some batches by the one, some not


def test_loss_is_cross_entropy_with_two_labels():
    images, labels, mixed = mix("", 1)
    net = resizemix.models.build("wrn16_8", 10, 16, initial_channels=4)
    args = arguments()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, logits = resizemix.training_step(net, images, labels, args, Ten,
                                           torch.Generator().manual_seed(1), scaler)
    own = mixed.targets[torch.arange(6), labels]
    own = own[labels[mixed.perm] != labels][0]              # one ratio for all
    expected = own * F.cross_entropy(logits, labels) + \
        (1 - own) * F.cross_entropy(logits, labels[mixed.perm])
    assert torch.allclose(loss, expected, atol=1e-6)


def test_autoaugment_changes_each_image_by_its_own_policy():
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    kind = v2.AutoAugmentPolicy.CIFAR10
    transform = v2.AutoAugment(kind)
    changed = randaugment.autoaugment(images, torch.Generator().manual_seed(3), kind)
    generator = torch.Generator().manual_seed(3)
    policy = torch.randint(25, (40,), generator=generator)
    applied, negative = torch.rand(2, 40, 2, generator=generator)
    for i, image in enumerate(images):                      # torchvision's own loop, image by image
        for place, (name, probability, index) in enumerate(transform._policies[policy[i]]):
            if applied[i, place] > probability:
                continue
            settings, signed = transform._AUGMENTATION_SPACE[name]
            settings = settings(10, 16, 16)
            setting = 0.0 if settings is None else float(settings[index])
            image = transform._apply_image_or_video_transform(
                image, name, -setting if signed and negative[i, place] < 0.5 else setting,
                transform.interpolation, transform._fill)
        assert torch.equal(changed[i], image)
    assert (changed != images).flatten(1).any(1).float().mean() > 0.5


# ----------------------------------------------------------------------------- network, pictures

def test_costs():
    net = resizemix.models.build("wresnet40_2", 100, 32)
    assert resizemix.multiply_adds(net, 32, 32) == pytest.approx(356.8e6, rel=0.01)
    assert resizemix.multiply_adds(net, 32, 48) == pytest.approx(535.2e6, rel=0.01)
    line = resizemix.latency(net, 8, 16, torch.device("cpu"))
    assert re.fullmatch(r"[\d.]+ ms for a batch of 1 \(cpu\)", line)


def test_grad_cam_finds_the_class():
    """A network whose logit is the mean of one channel looks where this channel is large."""
    net = resizemix.models.build("wrn16_8", 10, 16, initial_channels=4).eval()
    layer = gradcam.find_layer(net, "layer3.1")
    images, _ = batch()
    kept = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    net(images)
    handle.remove()
    maps, logits = gradcam.grad_cam(net, layer, images)
    assert maps.shape == (6, 16, 16) and maps.min() >= 0 and maps.max() <= 1
    assert torch.allclose(logits, net(images))
    features = kept[0].detach().requires_grad_()
    logits = net.fc(net.tail(features).mean((2, 3)))
    grad, = torch.autograd.grad(logits.max(1).values.sum(), features)
    expected = torch.einsum("bchw,bc->bhw", features, grad.mean((2, 3))).relu()
    expected = (expected / expected.amax((1, 2), keepdim=True)).nan_to_num()
    assert torch.allclose(maps, F.interpolate(expected[:, None], (16, 16), mode="bilinear")[:, 0],
                          atol=1e-5)
    with pytest.raises(RunError, match="has no such block or module; its last ones: .*layer3.1"):
        gradcam.find_layer(net, "layer3.2")
    half = build_backbone("wrn16_8", 16, 1, initial_channels=4)         # SAMix's view of it
    assert gradcam.find_layer(half, "layer3.1") is half.after[1][1]
    assert gradcam.find_layer(half, "layer1.0") is half.before[1][0]
    whole = build_backbone("resnet18", 128, 3)
    assert isinstance(gradcam.find_layer(whole, "layer3.1"), torch.nn.Module)
    big = resizemix.models.build("resnet50", 10, 224)
    assert gradcam.find_layer(big, "layer4.2") is big.layer4[2]
    with pytest.raises(RunError, match="ConvNeXt has no such block"):
        gradcam.find_layer(models.build("convnext_t", 2, 32), "layer4.2")


def test_previews_evaluation_and_grad_cam(tmp_path, capsys, monkeypatch):
    titles = []
    drawing = resizemix.plots.preview
    monkeypatch.setattr(resizemix.plots, "preview", lambda path, title, rows, *more: (
        titles.append((title, rows["partner"] is not None)), drawing(path, title, rows, *more))[1])
    for words in ("", "--resizemix False", "--cutmix_prob 1 --batch_aug True --autoaugment True",
                  "--method cutmix --cutmix_prob 0.01"):
        resizemix.main([*SMALL, *words.split(), "--preview", str(tmp_path / "mixed.png"),
                        "--root_dir", str(tmp_path / "none")])
        with Image.open(tmp_path / "mixed.png") as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert [mixed for _, mixed in titles] == [True, False, True, True], titles
    monkeypatch.undo()
    assert not (tmp_path / "none").exists()
    words = ["--epochs", 8, "--labels_per_class", 60, "--resizemix", "False", "--cutout", 2]
    folder = train(tmp_path / "runs", *words)
    best = checkpoint.load(folder / "best.pt")["accuracy"]
    assert best > 60
    capsys.readouterr()
    train(tmp_path / "runs", *words, "--evaluate")
    accuracy = re.search(r"accuracy ([\d.]+) %, top-5 ([\d.]+) %, loss", capsys.readouterr().out)
    assert float(accuracy[1]) == pytest.approx(best, abs=0.01) and float(accuracy[2]) > best
    for crop_test in (False, True):                         # the centre is 24 pixels wide
        train(tmp_path / "runs", *words, "--image_size", 32, "--evaluate", "--crop_test", crop_test)
    assert len(set(re.findall(r"clean: accuracy .*", capsys.readouterr().out))) == 2
    train(tmp_path / "runs", *words, "--cam", tmp_path / "cam.png", "--target_layer", "layer2.0")
    assert "best.pt" in capsys.readouterr().out
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.width > 800


def test_killed_and_resumed_is_the_run_never_killed(tmp_path):
    words = ["--epochs", 4, "--autoaugment", "True", "--cutmix_prob", 0.5, "--warmup_epochs", 2]
    whole = train(tmp_path / "whole", *words)
    folder = tmp_path / "killed" / whole.name
    PROGRAM.killed(*words, root=tmp_path / "killed", steps=6)
    assert len((folder / "log.csv").read_text().splitlines()) < 5
    train(tmp_path / "killed", *words, "--resume", "auto")
    assert same(weights(whole), weights(folder))
    logs = [(place / "log.csv").read_text().splitlines() for place in (whole, folder)]
    assert len(logs[0]) == 5 and [line.split(",")[:7] for line in logs[0]] == [
        line.split(",")[:7] for line in logs[1]]
    args = arguments(" ".join(map(str, words)))             # the epochs' last steps, of 4
    assert [float(line.split(",")[1]) for line in logs[0][1:]] == pytest.approx(
        [resizemix.step_rate(args, 4 * epoch + 3, 4) for epoch in range(4)], rel=1e-5)


@pytest.mark.parametrize("words, code, line", [
    ("--config nothing", 2, "--config: invalid choice: 'nothing'"),
    ("--method nothing", 2, "--method: invalid choice: 'nothing'"),
    ("--net_name nonet", 2, "invalid choice: 'nonet'"),
    ("--randaugment True --autoaugment True", 2, "choose one of them"),
    ("--resizemix_low 0.9", 2, "--resizemix_low is above --resizemix_high 0.8"),
    ("--epochs 2 --warmup_epochs 2", 2, "--warmup_epochs 2 are not below the 2 epochs"),
    ("--milestones 3", 2, "--milestones is for --lr_schedule step"),
    ("--gamma 0.5", 2, "--gamma is for --lr_schedule step"),
    ("--lr_schedule step --min_lr 0.01", 2, "--min_lr is for --lr_schedule cosine"),
    ("--color_jitter", 2, "--color_jitter is for sets read from disk"),
    ("--dataset imagenet --padding 2", 2, "--padding is for sets in memory"),
    ("--launcher pytorch", 1, "--launcher pytorch: RANK is not set"),
    ("--launcher slurm", 1, "SLURM_PROCID is not set"),
    ("--dataset imagenet", 1, "is for sets that fit in memory"),
    ("--net_name resnet50 --image_size 128", 1,
     "resnet50 for 128 pixels has --initial_channels 64"),
    ("--cam a.png --preview b.png", 2, "--preview: not allowed with argument --cam"),
    ("--target_layer layer3.3", 2, "--target_layer is of --cam"),
    ("--corruptions . --preview a.png", 2, "--corruptions is of evaluations"),
    ("--corruptions . --cam a.png", 2, "--corruptions is of evaluations"),
    ("--init_lr 1e-7", 2, "--lr 1e-07 is below --min_lr 1e-05"),
    ("--load_path none.pt", 1, "none.pt: no such checkpoint"),
    ("--target_layer layer3.3 --cam cam.png --resume none.pt", 1, "none.pt: no such checkpoint"),
    ("--init_lr 1e30 --lr_schedule step --print_freq 1", 1, "at epoch 1, step")])
def test_bad_input_is_one_line(tmp_path, words, code, line, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    status, error = faults(capsys, *SMALL, "--root_dir", tmp_path, *words.split())
    lines = [text for text in error.splitlines() if "error:" in text]
    assert status == code and len(lines) == 1 and line in lines[0], error
    assert "Traceback" not in error and not list(tmp_path.rglob("*.pt"))


# -------------------------------------------------------------------------------------- streaming

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train and val of eight classes, as folders and as RecordIO."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 9), ("val", 3)):
        make_photos(root / "folders" / part, count, (48, 80))
        if part == "val":                   # 25 images: two ranks have unequal shares
            place = root / "folders" / part / "class 3"
            shutil.copy(place / "0.jpg", place / "odd.jpg")
        pack(root / "folders" / part, root / "records" / part)
    return root


@needs_dali
@pytest.mark.parametrize("source", ["folders", "records"])
def test_imagenet_trains_from_folders_and_records(photos, tmp_path, source, capsys):
    resizemix.main([*STREAM, "--data_dir", str(photos / source), "--root_dir", str(tmp_path),
                    "--epochs", "2", "--randaugment", "True"])
    printed = capsys.readouterr().out
    assert "8 classes, 32×32 pixels, 72 training and 25 test images" in printed
    assert "5 steps of 16 images an epoch" in printed and "class 3" not in printed
    folder = next(tmp_path.iterdir())
    assert len((folder / "log.csv").read_text().splitlines()) == 3
    assert (folder / "mixed.png").exists()


def test_imagenets_parts_must_agree(photos, tmp_path):
    shutil.copytree(photos / "folders", tmp_path / "set")
    os.rename(tmp_path / "set" / "val" / "class 2", tmp_path / "set" / "val" / "class x")
    with pytest.raises(DataError, match="val/class x: a class that the training images lack"):
        resizemix.main([*STREAM, "--data_dir", str(tmp_path / "set")])
    os.rename(tmp_path / "set" / "val", tmp_path / "set" / "other")
    with pytest.raises(DataError, match="holds neither val nor test"):
        resizemix.main([*STREAM, "--data_dir", str(tmp_path / "set")])


@needs_dali
@pytest.mark.parametrize("source, damaged, line", [
    ("folders", "train/class 4/3.jpg", r"train/class 4/3\.jpg: damaged, or not a readable image"),
    ("records", "train.rec", r"train\.rec: record 71 .*truncated"),
    ("records", "train.idx", r"train\.idx: No such file")])
def test_damaged_data_end_the_run_with_one_line(photos, tmp_path, source, damaged, line, capsys):
    shutil.copytree(photos / source, tmp_path / "set")
    words = [*STREAM, "--data_dir", str(tmp_path / "set"), "--root_dir", str(tmp_path / "runs")]
    resizemix.main([*words, "--epochs", "1", "--warmup_epochs", "0"])
    folder = next((tmp_path / "runs").iterdir())
    before = weights(folder)
    path = tmp_path / "set" / damaged
    if damaged.endswith("idx"):
        path.unlink()
    elif damaged.endswith("jpg"):           # of the same size, as if a disk had lost its contents
        path.write_bytes(b"nothing".ljust(path.stat().st_size))
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size * 2 // 3)
    code, error = faults(capsys, *words, "--epochs", 3, "--resume", "auto")
    lines = [text for text in error.splitlines() if "error:" in text]
    assert code == 1 and len(lines) == 1 and re.search(line, lines[0]), error
    assert "Traceback" not in error
    assert same(before, weights(folder)) and checkpoint.load(folder / "checkpoint.pt")["epoch"] == 1


def children(pid: int) -> dict:
    """Process ids of a process's children by their RANK."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        if rank:
            found[int(rank[1])] = int(child)
    return found


def test_script_trains_cifar_in_one_process_and_imagenet_on_all_gpus(tmp_path):
    """The interpreter of this test prints what it is asked for; it sees three GPUs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3 || echo "$@"\n')
    python.chmod(0o755)
    script = ["sh", str(ROOT / "resizemix" / "scripts" / "train_dist.sh")]
    script += ["--root_dir", "imagenet_and_cifar"]
    for given, wanted in (({}, "main.py --config cifar100_wrs"),
                          ({"CONFIG": "imagenet_res"}, "--nproc_per_node=3"),
                          ({"CONFIG": "cifar10_ss", "NPROC": "2"}, "--nproc_per_node=2")):
        environment = os.environ | {"PYTHON": str(python)} | given
        printed = subprocess.run(script, env=environment, text=True, capture_output=True).stdout
        assert wanted in printed and ("run --standalone" in printed) == ("nproc" in wanted), printed


@needs_dali
def test_script_two_ranks_one_killed_and_resumed(photos, tmp_path, capsys):
    words = ["sh", str(ROOT / "resizemix" / "scripts" / "train_dist.sh"), *STREAM]
    options = {"text": True, "cwd": tmp_path, "env": os.environ | {
        "DATA": str(photos / "records"), "OUT": "runs", "NPROC": "2", "PYTHON": sys.executable}}
    with open(tmp_path / "stderr", "w") as errors:
        run = subprocess.Popen([*words, "--epochs", "500"], stdout=subprocess.PIPE, stderr=errors,
                               **options)
        for text in run.stdout:
            if text.startswith("epoch   1/500  loss"):
                break
        ranks = children(run.pid)
        os.kill(ranks[1], signal.SIGKILL)
        run.communicate(timeout=3600)
    assert run.returncode == 1
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert "was another process stopped? then go on with --resume auto" in \
        (tmp_path / "stderr").read_text()
    folder = tmp_path / "runs" / "imagenet_wrn16_8_resizemix_seed0"
    done = checkpoint.load(folder / "checkpoint.pt")["epoch"]
    assert done >= 1
    result = subprocess.run([*words, "--epochs", str(done + 1)], capture_output=True, timeout=3600,
                            **options)
    assert result.returncode == 0, result.stderr
    assert f"resumed at epoch {done + 1}, step 0" in result.stdout
    assert "2 processes" in result.stdout
    log = (folder / "log.csv").read_text().splitlines()
    assert len(log) == done + 2
    capsys.readouterr()                     # one process measures what the two did
    resizemix.main([*STREAM, "--data_dir", str(photos / "records"), "--root_dir",
                    str(tmp_path / "runs"), "--evaluate", str(folder / "checkpoint.pt")])
    row = dict(zip(log[0].split(","), map(float, log[-1].split(",")), strict=True))
    found = re.search(r"accuracy ([\d.]+) %.* loss ([\d.]+).* on 25 images",
                      capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(row["test_accuracy"], abs=0.01)
    assert float(found[2]) == pytest.approx(row["test_loss"], abs=1e-3)


@pytest.mark.parametrize("holds, config, expected", [
    ((), {}, "cifar100_wrs --data_dir data"), (("train", "test"), {}, "cifar100_wrs"),
    (("train", "val"), {}, "imagenet_res"), (("train.rec", "val.rec"), {}, "imagenet_res"),
    (("train", "val"), {"CONFIG": "cifar10_ss"}, "cifar10_ss")])
def test_script_chooses_the_configuration(tmp_path, holds, config, expected):
    """With nothing set it trains on CIFAR-100; echo stands in for the interpreter."""
    for name in holds:
        (tmp_path / "data" / name).mkdir(parents=True)
    script = ROOT / "resizemix" / "scripts" / "train_dist.sh"
    found = subprocess.run(["sh", str(script), "--amp", "bf16"], text=True, capture_output=True,
                           cwd=tmp_path, env=os.environ | config | {"PYTHON": "echo", "NPROC": "1"})
    assert f"--config {expected}" in found.stdout and found.stdout.endswith("--amp bf16\n")


def test_slurm_script_starts_the_ranks(tmp_path, capsys):
    """srun and scontrol are stood in for: two tasks, with the variables that slurm sets.

    The two ranks evaluate every image once, and with one and the same network.
    """
    (tmp_path / "srun").write_text(
        '#!/bin/sh\n[ "$SRUN_CPUS_PER_TASK $1" = "3 --kill-on-bad-exit=1" ] || exit 3\nshift\n'
        "for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_STEP_NUM_TASKS=2 "
        '"$@" & pids="$pids $!"; done\nfor pid in $pids; do wait $pid || exit 1; done\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    words = [*SMALL, "--epochs", "1"]
    result = subprocess.run(
        ["sh", str(ROOT / "resizemix" / "scripts" / "train_slurm.sh"), *words, "--evaluation",
         "True"], text=True, capture_output=True, timeout=3600, cwd=tmp_path, env=os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "3", "SLURM_SUBMIT_DIR": str(ROOT), "DATA": "data",
            "OUT": "runs", "CONFIG": "cifar100_wrs", "PYTHON": sys.executable,
            "MASTER_PORT": str(20000 + os.getpid() % 9000)})
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and "curves, pictures and checkpoints" in result.stdout
    assert "on 355 images" in result.stdout
    folder, = (tmp_path / "runs").iterdir()
    names, row = ((folder / "log.csv").read_text().splitlines()[i].split(",") for i in (0, 1))
    row = dict(zip(names, map(float, row), strict=True))
    resizemix.main([*words, "--evaluate", str(folder / "checkpoint.pt")])
    found = re.search(r"accuracy ([\d.]+) %.* loss ([\d.]+), ECE .* on 355 images",
                      capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(row["test_accuracy"], abs=0.01)
    assert float(found[2]) == pytest.approx(row["test_loss"], abs=1e-3)
