"""Soft Augmentation's program as users run it: recipes, losses, resume, two ranks, evaluation."""
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from programs import Program, same, two_processes, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import checkpoint, distributed, evaluation
from common.data import Recipe
from common.errors import RunError
from soft_aug import main as soft_aug
from soft_aug.losses import soft_target_loss

SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 --net resnet18 "
         "--initial_channels 4 --lr 0.05 --crop 5 --seed 0 --device cpu").split()
PROGRAM = Program(soft_aug, SMALL)
command, train, faults = PROGRAM.command, PROGRAM.train, PROGRAM.faults
RECIPE = "--da 2 --loss st --ra 1 --mixup 1"


def table(path):
    with open(path) as file:
        return [{name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)]


@pytest.fixture
def no_pictures(monkeypatch):
    """Skips what takes most of a tiny run's time; test_recipes_train_and_close draws."""
    monkeypatch.setattr(evaluation, "draw", lambda *args: None)
    monkeypatch.setattr(soft_aug, "draw_softening", lambda *args: None)
    monkeypatch.setattr(soft_aug, "draw_preview", lambda *args: None)
    monkeypatch.setattr("common.plots.curves", lambda *args: None)


@pytest.mark.parametrize("recipe", ["--da 2 --loss st --ra", "--da 0", "--da -1"])
def test_streamed_sets(tmp_path, no_pictures, recipe):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(
                tmp_path / "set" / name / f"{i}.png")
    words = (f"--dataset imagenet --data_dir {tmp_path / 'set'} --val_split 0.4 --image_size 16 "
             f"--batch_size 4 --net resnet18 --initial_channels 4 --epochs 1 --ft 0 --seed 0 "
             f"--workers 1 --device cpu --root_dir {tmp_path / 'runs'} {recipe}")
    soft_aug.main(words.split())
    if "ra" in recipe:              # test images of another seed are training images
        best = next((tmp_path / "runs").rglob("best.pt"))
        with pytest.raises(RunError, match="take its flags and --seed 0"):
            soft_aug.main(words.replace("--seed 0", f"--seed 5 --evaluate {best}").split())
        soft_aug.main(words.replace("--seed 0", f"--evaluate {best}").split())
    rows = table(next((tmp_path / "runs").rglob("log.csv")))
    assert len(rows) == 1 and math.isfinite(rows[0]["train_loss"]) and "test_accuracy" in rows[0]


@pytest.fixture(scope="module")
def info_and_batch():
    """Info, images and labels of 64 digits."""
    batches, _, info = soft_aug.data.load("digits", "", Recipe(padding=0), batch_size=64,
                                          image_size=16, device=torch.device("cpu"))
    return info, *next(iter(batches))


def mix(words, batch, epoch=0, seed=1):
    """(Mixed, args) of a batch under the flags `words`."""
    args = soft_aug.parse_args([*SMALL, *words.split()])
    generator = torch.Generator().manual_seed(seed)
    return soft_aug.mix_batch(batch[1], args, batch[0], epoch, generator), args


# ------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("words", [
    "--da -1", "--da 0 --loss ce --ra 0", "--da 1 --l 8 --ra 1",
    "--da 2 --loss st --ra 1 --pcrop 2 --crop 12 --tensorboard"])
def test_recipes_train_and_close(tmp_path, words, capsys):
    folder = train(tmp_path, *words.split(), "--max_steps", 2)
    printed, files = capsys.readouterr().out, {f.name for f in folder.iterdir()}
    assert "median of the last 1 epochs" in printed and f"checkpoints: {folder}" in printed
    assert re.search(r"clean: accuracy [\d.]+ %, .*ECE [\d.]+ % on 60 images", printed)
    names = {"args.json", "log.csv", "curves.png", "mixed.png", "checkpoint.pt", "best.pt", ".lock",
             "evaluation.csv", "evaluation.png"}
    if "--da 2" in words:
        names |= {"softening.png", "tensorboard"}
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert events.Tags()["images"] == ["mixed images"]
    assert files == names
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 2
    row, = table(folder / "log.csv")
    assert {"lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_ece"} <= set(
        row)
    before = soft_aug.models.build("resnet18", 10, 16, initial_channels=4)
    assert not torch.equal(weights(folder)["fc.weight"], before.fc.weight)


@pytest.mark.parametrize("words", [
    "--da 2 --loss st --rw sample --other --mixup 1 --noise 0.5 --bgnoise 0.5 --pnoise 2",
    "--da 2 --loss st --rw off --no-soften --no-nag --decay l --warm 1 --loader dali --ra 1",
    "--da 0 --loss sce --max_p 0.9 --mixup 1 --a 0.2 --decay s --gamma 0.5",
    "--da 2 --loss fl --g 1 --mixup 1 --epochs 3 --amp bf16 --channels_last False",
    "--da 2 --loss ce --mixup 1 --nogpu --optimizer sgd --momentum 0"])
def test_variants_train(tmp_path, words, no_pictures):
    folder = train(tmp_path, *words.split(), "--max_steps", 2)
    model = weights(folder)
    assert torch.isfinite(model["fc.weight"]).all()
    assert len(model["fc.weight"]) == 10 + ("--other" in words)


@pytest.mark.parametrize("net", ["resnet50", "resnet101", "wideresnet28", "pyramidnet272",
                                 "preactresnet18"])
def test_every_network_trains(tmp_path, net, no_pictures):
    folder = train(tmp_path, "--net", net, *RECIPE.split(), "--batch_size", 4, "--max_steps", 1)
    assert torch.isfinite(weights(folder)["fc.weight"]).all()


def test_the_logs_follow_the_schedule(tmp_path, no_pictures):
    folder = train(tmp_path, *RECIPE.split(), "--epochs", 7, "--ft", 0, "--tensorboard",
                   "--batch_size", 60)
    rows = table(folder / "log.csv")
    assert [int(row["epoch"]) for row in rows if "test_ece" in row] == [1, 6, 7]
    rates = [0.025 * (1 + math.cos(math.pi * 2 * epoch / 15)) for epoch in range(1, 8)]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-4)    # of their last steps
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)]
              for tag in ("learning/lr", "Train/loss", "Test/Average loss", "Test/Accuracy",
                          "Test/ECE", "Test/Best Accuracy", "Test/Best Average loss",
                          "Train/Best Accuracy", "Train/Best Average loss")}
    assert logged["learning/lr"] == pytest.approx(rates, rel=1e-4)
    assert len(logged["Train/loss"]) == 7 and len(logged["Test/ECE"]) == 3
    tested = [row["test_accuracy"] for row in rows if "test_accuracy" in row]
    assert logged["Test/Best Accuracy"] == pytest.approx(
        [max(tested[:i]) for i in (1, 2, 3)], rel=1e-4)
    assert checkpoint.load(folder / "best.pt")["accuracy"] == pytest.approx(max(tested), rel=1e-4)


def smooth_network(*_, **__):
    """A network in which roundings stay small, unlike in a narrow ResNet's."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8),
                               torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10))


def loss_by_hand(net, images, labels, args, epoch, generator):
    """The loss of one step of the four recipes and of Mixup, from the paper's description."""
    shrink = args.r if epoch >= args.epochs - args.ft else 1
    sure = torch.ones(len(images))
    if args.da == 1:
        centres = [torch.randint(16, (len(images),), generator=generator) for _ in range(2)]
        half = args.l / shrink // 2
        for image, y, x in zip(images, *centres, strict=True):
            down, across = ((torch.arange(16) >= c - half) & (torch.arange(16) < c + half)
                            for c in (y, x))
            image[:, down[:, None] & across] = 0
    if args.da == 2:
        colour = torch.randn(len(images), 3, generator=generator) * args.bgcrop
        offsets = soft_aug.softcrop.draw_offsets(len(images), (16, 16), args.crop / shrink,
                                                 generator)
        images, visible = soft_aug.softcrop.soft_crop(images, offsets, colour)
        sure = 1 - 0.9 * (1 - visible) ** args.pcrop
    perm, lam = torch.arange(len(images)), 1.0
    if args.mixup:
        perm = soft_aug.draw_perm(len(images), generator)
        lam = float(soft_aug.draw_lambda(args.a, generator)) if shrink == 1 else 1.0
    logs = net(lam * images + (1 - lam) * images[perm]).log_softmax(1)
    total = 0
    for share, order in ((lam, torch.arange(len(images))), (1 - lam, perm)):
        label, p = F.one_hot(labels[order], 10), sure[order, None]
        if args.loss == "fl":
            log = (logs * label).sum(1)
            total += share * (-(1 - log.exp()) ** args.g * log).mean()
        elif args.loss == "st":
            target = label * p + (1 - label) * (1 - p) / 9
            total += share * F.kl_div(logs, target, reduction="batchmean") * p.mean()
        else:
            total -= share * (logs * label).sum(1).mean()
    return total


@pytest.mark.parametrize("words, rate", [
    ("--da -1 --no-nag --decay l --warm 1", lambda k: 0.1 * (1 - k / 7) * min(1, k / 2)),
    ("--da 2 --loss st --r 4 --pcrop 3 --bgcrop 0.5",
     lambda k: 0.05 * (1 + math.cos(math.pi * k / 7))),
    ("--da 0 --mixup 1 --a 0.3 --momentum 0",
     lambda k: 0.05 * (1 + math.cos(math.pi * k / 7))),
    ("--da 1 --l 8 --loss fl --g 1 --decay s --gamma 0.5 --milestones 1 2 --momentum 0.5",
     lambda k: 0.1 * 0.5 ** ((k - 1) // 2))])
def test_training_is_the_recipe(tmp_path, words, rate, no_pictures, monkeypatch):
    """Augmentation, fine-tune phase, losses, weight decay, momentum and learning rate, by hand."""
    words = [*words.split(), "--wd", 0.01, "--epochs", 3, "--ft", 1, "--lr", 0.1,
             "--labels_per_class", 6]
    monkeypatch.setattr(soft_aug.models, "build", smooth_network)
    trained = weights(train(tmp_path, *words))
    args = soft_aug.parse_args([*SMALL, *map(str, words)])
    padding = 4 if args.da in (0, 1) else 0
    batches, _, info = soft_aug.data.load(
        "digits", "", Recipe(padding=padding, flip=False), batch_size=30, image_size=16,
        device=torch.device("cpu"), seed=0, labels_per_class=6)
    torch.manual_seed(0)
    net = smooth_network()
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for epoch in range(3):
        batches.set_epoch(epoch)
        for step, (images, labels) in enumerate(batches):
            net.zero_grad()
            loss_by_hand(net, images, labels, args, epoch,
                         distributed.step_generator(0, epoch, step)).backward()
            with torch.no_grad():
                for name, p in net.named_parameters():
                    grad = p.grad + 0.01 * p
                    velocity[name] = args.momentum * velocity[name] + grad
                    ahead = velocity[name] if args.no_nag else grad + args.momentum * velocity[name]
                    p -= rate(2 * epoch + step + 1) * ahead
    for name, value in net.state_dict().items():
        assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("words, expected", [
    ("--da -1", {"padding": 0, "flip": False}), ("--da 0", {"padding": 4, "flip": None}),
    ("--da 1 --l 8", {"padding": 4, "flip": None}), ("--da 2", {"padding": 0, "flip": None}),
    ("--n 3 --loader dali --labels_per_class 5 --image_size 20 --b 10 --seed 4 --data_dir there",
     {"workers": 3, "loader": "dali", "labels_per_class": 5, "image_size": 20, "batch_size": 10,
      "seed": 4, "mean": None, "std": None, "transform": None}),
    ("--task cifar100", {"mean": soft_aug.STATISTICS["cifar100"][0],
                         "std": soft_aug.STATISTICS["cifar100"][1]})])
def test_what_the_loader_is_asked_for(words, expected, monkeypatch):
    seen = PROGRAM.asks_for(monkeypatch, words)
    assert {name: seen[name] for name in expected} == expected
    assert seen["dataset"] == ("cifar100" if "cifar100" in words else "digits")
    assert seen["place"] == ("there" if "there" in words else "data")
    if seen["mean"]:                                        # the original's figures
        assert (seen["mean"][0], seen["std"][2]) == (0.5070751592371323, 0.27615047132568404)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_precision(info_and_batch, amp):
    class Spy(torch.nn.Linear):
        def forward(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(images.mean((2, 3)))

    info, images, labels = info_and_batch
    args, seen = soft_aug.parse_args([*SMALL, "--amp", amp, "--max_steps", "1"]), []
    soft_aug.training_step(Spy(3, 10), images, labels, args, info, 0, torch.Generator(),
                           torch.amp.GradScaler("cpu", enabled=False))
    _, test, _ = soft_aug.data.load("digits", "", batch_size=50, image_size=16,
                                    device=torch.device("cpu"))
    evaluation.evaluate(Spy(3, 10), test, args, info)
    assert seen == [amp == "bf16"] * 2


def test_killed_and_resumed_is_the_run_never_killed(tmp_path, capsys):
    """Also without a seed: the run that was killed is found, and its seed."""
    words = [*RECIPE.split(), "--epochs", 4, "--ft", 2, "--warm", 1, "--eval_every", 1]
    for _ in range(2):                                      # SIGKILL inside two epochs
        PROGRAM.killed(*words, "--seed", -1, "--resume", "auto", root=tmp_path / "killed", steps=6)
    folder = train(tmp_path / "killed", *words, "--seed", -1, "--resume", "auto")
    printed = capsys.readouterr().out
    assert "resumed at epoch" in printed
    seed = checkpoint.load(folder / "checkpoint.pt")["args"]["seed"]
    assert seed >= 0 and f"seed: {seed}\n" in printed and folder.name.endswith(f"seed{seed}")
    whole = train(tmp_path / "whole", *words, "--seed", seed)
    one, two = checkpoint.load(whole / "checkpoint.pt"), checkpoint.load(folder / "checkpoint.pt")
    assert same(one["model"], two["model"]) and one["best"] == two["best"]
    momentum = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()]
                for c in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
    timed = {"seconds", "images_per_second"}
    histories = [[{k: v for k, v in row.items() if k not in timed} for row in c["history"]]
                 for c in (one, two)]
    assert histories[0] == histories[1] and len(histories[0]) == 4
    assert (folder / "evaluation.csv").read_text() == (whole / "evaluation.csv").read_text()


def test_a_signal_saves_inside_the_epoch(tmp_path):
    words = [*RECIPE.split(), "--epochs", 2, "--labels_per_class", 120, "--print_freq", 1]
    child = subprocess.Popen(command(*words, root=tmp_path), text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    for line in child.stdout:
        if "epoch 1 step 3/" in line:
            child.send_signal(signal.SIGTERM)
            break
    last = child.communicate()[0].splitlines()[-1]
    assert child.returncode == 128 + signal.SIGTERM
    step = re.fullmatch(r"SIGTERM: stopped at epoch 1, step (\d+); go on with --resume auto", last)
    folder, = tmp_path.iterdir()
    assert step and checkpoint.load(folder / "checkpoint.pt")["step"] == int(step[1])


def test_two_ranks_measure_what_one_does(tmp_path, capsys):
    """Also: both take the one seed that was drawn."""
    assert "2 processes" in two_processes(
        *command(*RECIPE.split(), "--epochs", 1, "--seed", -1, root=tmp_path)[1:])
    folder, = tmp_path.iterdir()
    row, = table(folder / "log.csv")
    train(tmp_path, *RECIPE.split(), "--evaluate", folder / "checkpoint.pt")        # alone
    found = re.search(r"clean: accuracy ([\d.]+) %.* loss ([\d.]+), ECE ([\d.]+) % on 355 images",
                      capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(row["test_accuracy"], abs=0.01)
    assert float(found[2]) == pytest.approx(row["test_loss"], abs=1e-3)
    assert float(found[3]) / 100 == pytest.approx(row["test_ece"], abs=1e-3)


# ------------------------------------------------------------------------- flags and augmentation

def test_flags_and_aliases():
    args = soft_aug.parse_args("--task cifar100 --b 64 --n 3 --nogpu --learning_rate 0.2".split())
    assert (args.dataset, args.batch_size, args.workers, args.device, args.lr) == (
        "cifar100", 64, 3, "cpu", 0.2)
    assert (args.epochs, args.seed, args.rw, args.eval_every) == (500, -1, "batch", 5)
    assert soft_aug.parse_args("--sch 0.29".split()).epochs == 57
    assert soft_aug.parse_args("--sch 0.29 --epochs 9".split()).epochs == 9
    assert soft_aug.parse_args(["--rw"]).rw == "batch"
    assert soft_aug.parse_args("--net pyramid272".split()).arch == "pyramidnet272"


def test_milestones_replace_the_originals():
    words = "--lr 0.05 --decay s --gamma 0.1 --epochs 20".split()
    args = soft_aug.parse_args([*words, "--milestones", "10", "15"])
    rates = [soft_aug.step_rate(args, 7 * epoch + 6, 7) for epoch in range(20)]
    assert rates == pytest.approx([0.05] * 10 + [0.005] * 5 + [0.0005] * 5)
    rates = [soft_aug.step_rate(soft_aug.parse_args(words), 7 * e, 7) for e in range(20)]
    assert rates == pytest.approx([0.05] * 10 + [0.005] * 5 + [0.0005] * 3 + [0.00005] * 2)


def test_confidence_follows_what_is_hidden(info_and_batch):
    images = info_and_batch[1]
    mixed, _ = mix("--da 2 --crop 2", info_and_batch)
    changed = (mixed.images != images).flatten(1).any(1)
    assert changed.any() and (~changed).any()
    assert (mixed.confidence[~changed] == 1).all() and (mixed.confidence[changed] < 1).all()
    both, _ = mix("--da 2 --crop 2 --noise 1", info_and_batch)
    assert (both.confidence < mixed.confidence).all() and both.confidence.min() >= 0.1
    floored, _ = mix("--da 2 --noise 1e6", info_and_batch)
    assert (floored.confidence == floored.confidence.clamp(min=0.1)).all()
    for words in ("--da 2 --crop 2 --loss st --max_p 0.7",
                  "--da 0 --noise 1e-9 --loss st --max_p 0.7"):
        assert mix(words, info_and_batch)[0].confidence.max() == pytest.approx(0.7, abs=1e-4)
    plain, _ = mix("--da 0", info_and_batch)
    assert torch.equal(plain.images, images) and (plain.confidence == 1).all()
    holes, _ = mix("--da 1 --l 8", info_and_batch)
    assert (images != 0).all() and (holes.images == 0).flatten(1).any(1).all()
    assert (holes.confidence == 1).all()


@pytest.mark.parametrize("words, flag, parts", [
    ("--da 1 --l 8", "--l 4", "images"), ("--da 2", "--crop 2", "images confidence"),
    ("--da 2", "--pcrop 4", "confidence"), ("--da 2", "--bgcrop 1", "images"),
    ("--da 2 --loss st", "--max_p 0.5", "confidence"),
    ("--noise 1", "--noise 2", "images confidence"),
    ("--noise 1", "--pnoise 3", "confidence"), ("--noise 1", "--bgnoise 2", "images"),
    ("--mixup 1", "--a 9", "images lam"), ("--da 0", "--mixup 1", "images")])
def test_every_flag_changes_its_part(words, flag, parts, info_and_batch):
    one, two = (mix(text, info_and_batch)[0] for text in (words, f"{words} {flag}"))
    for part in ("images", "confidence", "lam"):
        a, b = getattr(one, part), getattr(two, part)
        if torch.is_tensor(a) and torch.is_tensor(b):
            assert torch.equal(a, b) == (part not in parts.split()), part


def test_the_closing_epochs_augment_weakly(info_and_batch):
    for words in ("--da 2", "--da 1 --l 8", "--da 2 --mixup 1"):
        early, _ = mix(f"{words} --epochs 100", info_and_batch, epoch=79)
        late, _ = mix(f"{words} --epochs 100", info_and_batch, epoch=80)
        assert not torch.equal(early.images, info_and_batch[1])
        assert torch.equal(late.images, info_and_batch[1]) and (late.confidence == 1).all()
        partly, _ = mix(f"{words} --epochs 100 --r 2", info_and_batch, epoch=80)
        assert not torch.equal(partly.images, late.images)
    late, _ = mix("--noise 1 --epochs 100", info_and_batch, epoch=80)
    assert 0 < (late.images - info_and_batch[1]).abs().max() < 0.02
    strong, _ = mix("--da 2 --epochs 100 --ft 0", info_and_batch, epoch=99)
    assert not torch.equal(strong.images, info_and_batch[1])


def test_confidence_reaches_the_loss_also_through_mixup(info_and_batch):
    info, _, labels = info_and_batch
    logits = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(2))

    def loss(words):
        mixed, args = mix(words, info_and_batch)
        return float(soft_aug.mixed_loss(logits, labels, mixed, args)), mixed

    value, mixed = loss("--da 2 --loss st --rw sample")
    assert value == pytest.approx(float(soft_target_loss(logits, labels, mixed.confidence,
                                                         reweight="sample")))
    value, mixed = loss("--da 2 --loss st --rw off --mixup 1")
    lam, perm = float(mixed.lam), mixed.perm
    assert 0 < lam < 1 and not torch.equal(perm, torch.arange(len(perm)))
    parts = [float(soft_target_loss(logits, labels[order], mixed.confidence[order], reweight=None))
             for order in (torch.arange(len(perm)), perm)]
    assert value == pytest.approx(lam * parts[0] + (1 - lam) * parts[1], rel=1e-5)
    values = {words: loss(f"--da 2 {words}")[0] for words in (
        "--loss ce", "--loss fl", "--loss sce --max_p 0.9", "--loss st", "--loss st --other",
        "--loss st --no-soften", "--loss st --rw off", "--loss ce --mixup 1")}
    assert len({round(value, 5) for value in values.values()}) == len(values)


def test_randaugment_works_on_the_loaders_pixels(tmp_path, monkeypatch, no_pictures):
    seen = []
    monkeypatch.setattr(soft_aug, "randaugment", lambda images, generator: seen.append(
        (images.dtype, len(images))) or images)
    train(tmp_path, "--ra", 1, "--max_steps", 2)
    assert seen[:2] == [(torch.uint8, 30)] * 2


# ------------------------------------------------------------------- evaluation, preview, bad input

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a short run that has learned something."""
    return train(tmp_path_factory.mktemp("trained"), "--da", 2, "--loss", "st", "--other",
                 "--epochs", 8, "--ft", 2, "--labels_per_class", 60)


def test_evaluation_alone(trained, capsys):
    soft_aug.main([*SMALL, "--da", "2", "--loss", "st", "--other", "--root_dir",
                   str(trained.parent), "--evaluate"])
    best = checkpoint.load(trained / "best.pt")
    with open(trained / "best_evaluation.csv") as file:
        rows = {row["condition"]: row for row in csv.DictReader(file)}
    accuracy = {name: float(row["accuracy"]) for name, row in rows.items()}
    assert accuracy["clean"] == pytest.approx(best["accuracy"], abs=0.01)
    assert accuracy["clean"] > 40 and accuracy["visible 10 %"] < accuracy["clean"] - 20
    for name in ("best_evaluation", "softening"):
        with Image.open(trained / f"{name}.png") as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    # ECE by another way: the data's own classes, softmax over these
    _, test, info = soft_aug.data.load("digits", "", batch_size=50, image_size=16,
                                       device=torch.device("cpu"))
    net = soft_aug.models.build("resnet18", 11, 16, initial_channels=4).eval()
    net.load_state_dict(best["model"])
    with torch.no_grad():
        outputs = [(net(images)[:, :10], labels) for images, labels in test]
    logits, labels = (torch.cat(part) for part in zip(*outputs, strict=True))
    assert float(rows["clean"]["ece"]) == pytest.approx(
        evaluation.expected_calibration_error(logits, labels), abs=1e-5)
    assert float(rows["clean"]["count"]) == info.num_test


def test_visible_share_of_images_that_are_not_square(tmp_path, no_pictures):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 16, 32, 3), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "wide.npz", train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    soft_aug.main(["--dataset", "npz", "--data_dir", str(tmp_path / "wide.npz"), "--batch_size",
                   "5", "--initial_channels", "4", "--device", "cpu", "--max_steps", "1",
                   "--root_dir", str(tmp_path / "runs")])
    text = next(tmp_path.rglob("evaluation.csv")).read_text()
    assert re.findall(r"visible (\d+) %", text) == [
        f"{100 * (1 - n / 16) * (1 - n / 32):.0f}" for n in (2, 3, 5, 6, 8, 10, 11)]


def test_mixup_ends_with_the_fine_tuning(info_and_batch):
    for epoch, ends in ((10, False), (99, True)):
        mixed, _ = mix("--mixup 1 --r 1 --epochs 100", info_and_batch, epoch)
        assert (float(mixed.lam) == 1) == ends


@pytest.mark.parametrize("words", ["--da 1 --l 8 --ra 1", "--da 2 --loss st --other --mixup 1",
                                   "--da 0 --loss sce --max_p 0.8"])
def test_previews_are_drawn(tmp_path, words):
    path = tmp_path / "mixed.png"
    soft_aug.main([*SMALL, *words.split(), "--preview", str(path),
                   "--root_dir", str(tmp_path / "r")])
    with Image.open(path) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert not (tmp_path / "r").exists()


def test_preview_shows_the_targets_of_the_loss(info_and_batch):
    labels = info_and_batch[2]
    for words, outputs in ((RECIPE, 10), (RECIPE + " --other", 11), ("--da 2 --loss ce", 10),
                           ("--loss sce --max_p 0.8", 10)):
        mixed, args = mix(words, info_and_batch)
        shares = soft_aug.implied_targets(labels, mixed, args, outputs)
        torch.testing.assert_close(shares.sum(1), torch.ones(len(labels)))
    assert shares.max() == pytest.approx(0.8)
    mixed, args = mix("--da 2 --loss st --other", info_and_batch)
    shares = soft_aug.implied_targets(labels, mixed, args, 11)
    torch.testing.assert_close(shares[:, 10], 1 - mixed.confidence)


@pytest.mark.parametrize("words, code, line", [
    ("--da 3", 2, "invalid choice: 3"), ("--net nonet", 2, "invalid choice: 'nonet'"),
    ("--loss ols", 2, "invalid choice: 'ols'"),
    ("--loss st --max_p 0.8", 2, "--max_p is for --loss sce, or for --loss st with --da 2"),
    ("--dataset digits --image_size 128 --initial_channels 16", 1, "has --initial_channels 64"),
    ("--decay c --milestones 3", 2, "--milestones is for --decay s"),
    ("--nogpu --device cuda", 2, "--device is for runs without --nogpu"),
    ("--da 1", 2, "--da 1 (Cutout) and --l"), ("--l 8", 2, "--da 1 (Cutout) and --l"),
    ("--loss ce --other", 2, "--other is for --loss st"),
    ("--resume none.pt --seed -1", 1, "none.pt: no such checkpoint"),
    ("--evaluate none.pt", 1, "none.pt: no such checkpoint"),
    ("--epochs 1 --lr 1e30 --print_freq 1", 1, "at epoch 1, step")])
def test_bad_input_is_one_line(tmp_path, words, code, line, capsys):
    status, error = faults(capsys, "--root_dir", tmp_path, *words.split())
    lines = [text for text in error.splitlines() if "error:" in text]
    assert status == code and len(lines) == 1 and line in lines[0], error
    assert "Traceback" not in error and not list(tmp_path.rglob("*.pt"))


def test_a_copied_run_does_not_hide_the_run(tmp_path, no_pictures, capsys):
    folder = train(tmp_path, "--seed", 7, "--max_steps", 1, "--prefix", "lr[1]")
    assert folder.name == "digits_resnet18_da0_ce_seed7_lr[1]"
    shutil.copytree(folder, folder.with_name(folder.name + "_backup"))
    os.utime(folder / "args.json", (1, 1))                  # the older of the two
    soft_aug.main([*SMALL, "--root_dir", str(tmp_path), "--seed", "-1", "--prefix", "lr[1]",
                   "--max_steps", "1", "--evaluate"])
    assert "seed: 7\n" in capsys.readouterr().out


def test_checkpoints_of_others_are_refused(trained):
    before = (trained / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError, match=r"other True \(here False\)"):
        soft_aug.main([*SMALL, "--da", "2", "--loss", "st", "--labels_per_class", "60", "--resume",
                       str(trained / "checkpoint.pt"), "--root_dir", str(trained.parent)])
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_commands_of_the_comparison():
    from bench.compare_methods import COMMANDS
    found = {name: line for name, line in COMMANDS.items() if name.startswith("softaug")}
    assert set(found) == {f"softaug_{recipe}{ra}" for recipe in ("standard", "hard", "soft")
                          for ra in ("", "_ra")}
    for name, line in found.items():
        line = line.format(data="s20.npz", epochs=20, schedule="10 15", seed=3)
        args = soft_aug.parse_args(line.split()[1:])
        assert (args.milestones, args.epochs, args.eval_every, args.ft) == ([10, 15], 20, 1, 0)
        assert args.ra == name.endswith("_ra") and args.seed == 3
        assert (args.loss == "st") == name.startswith("softaug_soft") and not args.no_nag
        assert args.da == (0 if "standard" in name else 2)


def test_every_flag_is_in_the_run(trained):
    facts = json.loads((trained / "args.json").read_text())
    assert facts["args"]["crop"] == 5 and facts["args"]["other"] is True


@pytest.mark.parametrize("method, words", {
    "standard": "", "standard+ra": "--ra t", "hard": "--da 2", "soft": "--da 2 --loss st",
    "soft+ra": "--da 2 --loss st --ra 1", "weighted": "--da 2 --loss st --no-soften",
    "cutout": "--da 1 --l 16", "soft --da 0": "--da 0 --loss st"}.items())
def test_methods_are_short_for_flags(method, words):
    assert soft_aug.parse_args(["--method", *method.split()]) == soft_aug.parse_args(words.split())


@pytest.mark.parametrize("words, ours", [
    ("--decay step", "--decay s"), ("--decay cosine", ""), ("--ra t --mixup f", "--ra True"),
    ("--eval_every 7.0", "--eval_every 7")])
def test_words_of_the_original_are_taken(words, ours):
    assert soft_aug.parse_args(words.split()) == soft_aug.parse_args(ours.split())
