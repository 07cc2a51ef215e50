"""SAMix's program as users run it: methods, configurations, flags, resume, two ranks, faults."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from pictures import make_cub, make_photos
from PIL import Image
from programs import Program, killed, on_two_ranks, same, weights
from torchvision.transforms import v2

from common import plots
from common.errors import RunError
from common.randaugment import randaugment
from samix import configs
from samix import main as samix
from samix.evaluation import HEADS
from samix.schedule import cosine, ema_momentum

TINY = "--initial_channels 8 --device cpu".split()
SMALL = ["--lr", "0.05", *TINY, *("--dataset digits --image_size 16 --labels_per_class 12 "
                                  "--batch_size 30").split()]
train = Program(samix, SMALL).train


def arguments(words="", method="samix"):
    return samix.parse_args([*SMALL, "--method", method, *words.split()])


@pytest.fixture
def drawn():
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Pictures take longer than the training here: made only for tests that look at them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(samix, "draw_preview", lambda path, *words: path)
        monkeypatch.setattr(samix.evaluation, "report", lambda *words: None)
        monkeypatch.setattr(plots, "curves", lambda *args: "curves.png")


# ---------------------------------------------------------------------------------------- methods

@pytest.mark.parametrize("method", configs.METHODS)
def test_every_method_trains_and_closes(tmp_path, method, capsys, drawn):
    folder = train(tmp_path, "--method", method, "--max_steps", 2, "--tensorboard")
    printed = capsys.readouterr().out
    heads = list(HEADS) if method in ("samix", "automix") else ["one_q"]
    assert (f"headline, {heads[0]} at the last epoch" in printed) == (len(heads) == 4)
    assert "median of the last 1 epochs" in printed and f"method {method}\n" in printed
    assert folder.name == f"digits_resnet18_{method}_seed0"
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "log.csv", "curves.png", "mixed_start.png", "mixed.png", "checkpoint.pt",
        "best.pt", ".lock", "tensorboard", "evaluation.csv", "evaluation.png"}
    header = (folder / "log.csv").read_text().splitlines()[0].split(",")
    assert [name for name in header if name[:4] in ("one_", "mix_")] == [
        f"{head}_accuracy" for head in heads]
    facts = json.loads((folder / "args.json").read_text())
    assert facts["args"]["method"] == method
    for name in ("mixed_start.png", "mixed.png"):
        with Image.open(folder / name) as picture:
            assert picture.height > (1000 if len(heads) == 4 else 300)
    state = weights(folder)
    assert ("k.one.weight" in state) == ("block.query.weight" in state) == (len(heads) == 4)
    assert not any(name.startswith("mix.") for name in state)
    if len(heads) == 4:             # all that learns has moved; k towards q
        torch.manual_seed(0)
        args = arguments(method=method)
        start = samix.build(args, Ten).state_dict()
        moved = {name for name in start if not torch.equal(start[name], state[name])}
        expected = {name for name, _ in samix.build(args, Ten).named_parameters()}
        still = expected - moved    # softmax over the keys does not see the key's bias
        assert still <= {"block.key.bias"}
        assert ("block.value.1.running_mean" in state) == (method == "samix")


class Ten:
    num_classes, image_size, width, mean, std = 10, 16, 16, (0.5,) * 3, (0.2,) * 3
    name = "ten"
    classes = list("0123456789")


def test_methods_share_one_network(tmp_path):
    """Baselines mix what the paper's tables mix, and train the head of clean images."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    for method in ("vanilla", "mixup", "cutmix"):
        args = arguments(method=method)
        mixed, targets, perm = samix.mix_baseline(images, labels, args, Ten, generator)
        own = targets[torch.arange(6), labels][perm != torch.arange(6)]
        if method == "vanilla":
            assert torch.equal(mixed, images) and (targets.max(1).values == 1).all()
        elif method == "mixup":
            assert torch.allclose(mixed, own[0] * images + (1 - own[0]) * images[perm], atol=1e-5)
        else:
            stays = (mixed == images).all(1).float().mean((1, 2))[perm != torch.arange(6)]
            assert torch.allclose(own, stays, atol=1e-5)
    args = arguments(method="vanilla")
    assert not hasattr(samix.build(args, Ten), "k")
    assert arguments(method="mixup").alpha == 1.0 and arguments(method="cutmix").alpha == 0.2


FLAGS = ["--alpha 9", "--method automix", "--method automix --lam_concat True",
         "--lam_mul_k 5", "--mode nearest", "--dropout 0.5",
         "--mask_adjust 1", "--lam_margin 0.5", "--switch_off 0.01", "--no_repeat True",
         "--head bce", "--label_smoothing 0.3", "--one_weight 2", "--mix_q_weight 0.2",
         "--mix_k_weight 3", "--mask_loss 3", "--mask_loss_kind sparsity", "--mask_margin 0.45",
         "--mask_anneal True", "--min_lr 0.001", "--milestones 1",
         "--warmup_epochs 2", "--momentum 0.5", "--nesterov True", "--weight_decay 0.05",
         "--clip_grad 0.1", "--optimizer adamw", "--block_lr 0.5", "--block_min_lr 0.001",
         "--block_momentum 0", "--ema_base 0.5", "--ema_end 0.1 --ema_start 0", "--crop zero",
         "--padding 1", "--crop resized", "--randaugment True", "--mean 0.1 0.1 0.1 --std 1 1 1",
         "--drop_last True --batch_size 50", "--layer 2", "--seed 1", "--amp bf16",
         "--batch_size 60"]
PAIRS = [("--head bce", "--head bce --neg_weight 0.1"),
         ("--crop resized", "--crop resized --crop_scale 0.9"),
         ("--milestones 1", "--milestones 1 --gamma 0.5"),
         ("--warmup_epochs 2", "--warmup_epochs 2 --warmup_ratio 0.5"),
         ("--min_lr 0.001", "--min_lr 0.001 --lr_every step"),
         ("--method automix", "--method automix --lam_concat True"),
         ("--ema_start 0", "--ema_start 0 --ema_end 0.3"),
         ("--batch_size 50", "--batch_size 50 --drop_last True")]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """End weights of short runs by their flags."""
    known = {}

    def end(words):
        if words not in known:
            root = tmp_path_factory.mktemp("run")
            folder = train(root, "--epochs", 2, "--labels_per_class", 6, *words.split())
            known[words] = weights(folder)
        return known[words]
    return end


@pytest.mark.parametrize("before, words", [*(("", words) for words in FLAGS), *PAIRS])
def test_no_flag_is_idle(ends, monkeypatch, before, words):
    heads = {"one_k": {"loss": 1.0, "top1": 1.0, "top5": 1.0, "ece": 0.1}}
    monkeypatch.setattr(samix, "measure", lambda *words: heads)     # it takes long
    assert not same(ends(before), ends(words))
    assert all(value.isfinite().all() for value in ends(words).values())


def test_the_same_flags_give_the_same_run(ends, tmp_path):
    folder = train(tmp_path, "--epochs", 2, "--labels_per_class", 6)
    assert same(weights(folder), ends(""))


def test_switch_off():
    """mix_k's loss is skipped with probability 1 - P·cosine; branch q's learned masks stay."""
    args = arguments("--switch_off 0.8")
    generator = torch.Generator().manual_seed(0)

    def share(fall):
        return sum(samix.draw_mixing(2, args, generator, fall).switched_off
                   for _ in range(300)) / 300
    assert share(1.0) == pytest.approx(0.2, abs=0.07) and share(0.5) == pytest.approx(0.6, abs=0.1)
    assert share(0.0) == 1
    args = arguments()
    assert share(0.0) == 0
    torch.manual_seed(0)
    net, images = samix.build(args, Ten), torch.randn(4, 3, 16, 16)
    draws = samix.draw_mixing(4, args, generator, 1.0)
    steps = [net(images, torch.arange(4), draws._replace(switched_off=off), 0.1)
             for off in (False, True)]
    assert steps[0][0].keys() - steps[1][0].keys() == {"mix_k"} and len(steps[1][0]) == 3
    assert torch.equal(steps[0][2][1], steps[1][2][1])


def test_adjusted_masks_and_drawn_modes():
    """--mask_adjust gives q's masks their own lambda; of several modes each is drawn."""
    args = arguments("--mask_adjust 1 --lam_margin 0 --mode bilinear nearest")
    torch.manual_seed(0)
    net = samix.build(args, Ten)
    draws = samix.draw_mixing(5, args, torch.Generator().manual_seed(1), 1.0)
    mask = net.masks_for_q(torch.randn(5, 32, 4, 4), draws, 4)
    assert torch.allclose(mask[:, 0].mean((1, 2)), draws.lam_bb.expand(5), atol=1e-5)
    assert not mask.requires_grad
    generator = torch.Generator().manual_seed(2)
    modes = {tuple(samix.draw_mixing(5, args, generator, 1.0).modes) for _ in range(60)}
    assert len(modes) == 4 and set(sum(modes, ())) == {"bilinear", "nearest"}
    half = [samix.draw_mixing(3, arguments("--mask_adjust 0.5"), generator, 1.0).adjust
            for _ in range(200)]
    assert 0.35 < sum(half) / 200 < 0.65


# -------------------------------------------------------------------------- schedules, optimizers

def test_learning_rates():
    args = samix.parse_args(["--config", "imagenet_r18"])
    ends = [samix.step_rates(args, step, 10) for step in (0, 9, 500, 999)]
    assert ends[0] == ends[1] == {"q": 0.1, "block": 0.1}           # once an epoch
    assert ends[2] == pytest.approx({"q": 0.05, "block": 0.0505})
    assert ends[3]["q"] == pytest.approx(0.05 * (1 + np.cos(np.pi * 0.99)))
    assert ends[3]["block"] == pytest.approx(1e-3, rel=0.05)
    args = samix.parse_args(["--config", "cifar100_deit_s"])
    first, warming, after = (samix.step_rates(args, step, 10) for step in (0, 100, 200))
    assert first == pytest.approx({"q": 7.5e-9, "block": 7.5e-4})   # the MixBlock never warms up
    assert warming["q"] == pytest.approx(0.5 * (1 + 1e-5) * warming["block"], rel=1e-6)
    assert after["q"] == after["block"] < 7.5e-4
    assert samix.step_rates(args, 205, 10)["q"] < after["q"]        # every step
    args = arguments("--milestones 2 3 --block_lr 0.2")
    assert [samix.step_rates(args, epoch * 7, 7)["q"] for epoch in (1, 2, 3)] == pytest.approx(
        [0.05, 0.005, 0.0005])
    assert samix.step_rates(args, 14, 7)["block"] == pytest.approx(0.02)


def test_momentum_and_mask_weight_follow_their_schedules(tmp_path, monkeypatch):
    seen = {"ema": [], "mask": [], "lr": []}
    update, forward = samix.momentum_update, samix.SAMix.forward
    step = torch.optim.SGD.step

    def updated(k, q, momentum):
        seen["ema"].append(momentum)
        update(k, q, momentum)

    def called(self, images, labels, draws, weight):
        seen["mask"].append(weight)
        return forward(self, images, labels, draws, weight)

    def stepped(self, *words, **options):
        seen["lr"].append(tuple(group["lr"] for group in self.param_groups))
        return step(self, *words, **options)
    monkeypatch.setattr(samix, "momentum_update", updated)
    monkeypatch.setattr(samix.SAMix, "forward", called)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    train(tmp_path, "--epochs", 3, "--mask_anneal", "True", "--ema_start", 0.4, "--block_lr", 0.2)
    assert seen["ema"] == pytest.approx([ema_momentum(t, 12, 0.999, 0.999999, 0.4)
                                         for t in range(12)])
    assert seen["mask"] == pytest.approx([0.1 * cosine(t, 12) for t in range(12)])
    args = arguments("--epochs 3 --block_lr 0.2")
    assert seen["lr"] == [tuple(samix.step_rates(args, t, 4).values()) for t in range(12)]


def test_parameter_groups():
    args = samix.parse_args([*SMALL, "--config", "cifar100_deit_s", "--image_size", "16"])
    net = samix.build(args, Ten)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, plain = set(), set()
    for group in samix.parameter_groups(net, args):
        where = decayed if group["weight_decay"] else plain
        found = {names[id(p)] for p in group["params"]}
        assert all(name.startswith("block") == (group["part"] == "block") for name in found)
        where |= found
    assert decayed | plain == {name for name in names.values() if not name.startswith("k.")}
    assert all(p.ndim > 1 for name, p in net.named_parameters() if name in decayed)
    assert {"q.backbone.before.class_token", "q.backbone.before.encoder.pos_embedding",
            "q.one.bias", "block.value.1.weight"} <= plain
    assert {"q.one.weight", "block.query.weight",
            "q.backbone.before.conv_proj.weight"} <= decayed
    args = arguments()
    groups = samix.parameter_groups(samix.build(args, Ten), args)
    assert [group["part"] for group in groups] == ["q", "block"]    # one optimizer, two groups
    args = samix.parse_args(["--config", "cifar100_wrn28_8", *SMALL])
    groups = samix.parameter_groups(samix.build(args, Ten), args)
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.9, 1e-3),
                                                                                (0, 1e-3)]


def test_gradients_are_clipped(tmp_path):
    folders = [train(tmp_path / norm, "--clip_grad", norm, "--weight_decay", 0, "--max_steps", 1)
               for norm in ("1e-9", "0")]
    torch.manual_seed(0)
    start = samix.build(arguments(), Ten).q.one.weight
    moved = [(weights(folder)["q.one.weight"] - start).abs().max() for folder in folders]
    assert moved[0] < 1e-8 and moved[1] > 1e-5


def test_randaugment_is_torchvisions_image_by_image():
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    transform = v2.RandAugment()
    changed = randaugment(images, torch.Generator().manual_seed(3), level=21, std=1.5)
    generator, names = torch.Generator().manual_seed(3), list(transform._AUGMENTATION_SPACE)
    drawn = torch.randint(len(names), (2, 40), generator=generator)
    negative = torch.rand(2, 40, generator=generator) < 0.5
    levels = 7 + 0.5 * torch.randn(2, generator=generator)
    for i, image in enumerate(images):
        for which, minus, level in zip(drawn[:, i], negative[:, i], levels, strict=True):
            settings, signed = transform._AUGMENTATION_SPACE[names[which]]
            settings = settings(31, 16, 16)
            setting = 0.0 if settings is None else float(settings[round(float(level) * 3)])
            image = transform._apply_image_or_video_transform(
                image, names[which], -setting if signed and minus else setting,
                transform.interpolation, transform._fill)
        assert torch.equal(changed[i], image)
    assert (changed != images).flatten(1).any(1).float().mean() > 0.5


# --------------------------------------------------------------------------------- configurations

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Small sets in the layouts that the configurations read: data_dir by data set."""
    root, generator = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        make_photos(root / "imagenet" / part, count, (70, 90))
    labels = np.arange(100)
    pictures = generator.integers(0, 256, (100, 32, 32, 3), np.uint8)
    np.savez(root / "cifar100.npz", train_images=pictures, train_labels=labels,
             test_images=pictures[:8], test_labels=labels[:8])
    for part, count in (("train", 2), ("val", 1)):
        make_photos(root / "tiny" / "tiny-imagenet-200" / part, count, (64, 65))
    make_cub(root / "cub")
    return {"imagenet": root / "imagenet", "cifar100": root, "tiny-imagenet-200": root / "tiny",
            "cub200": root / "cub"}


@pytest.mark.parametrize("alias", configs.CONFIGS)
def test_every_configuration_trains(sets, tmp_path, alias, capsys):
    values = configs.config(alias)
    size = min(values["image_size"], 64)
    samix.main(["--config", alias, "--data_dir", str(sets[values["dataset"]]), "--device", "cpu",
                "--image_size", str(size), "--batch_size", "4", "--max_steps", "1",
                "--initial_channels", "16", "--pretrained", "False", "--workers", "1",
                "--root_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{size}×{size} pixels" in printed and "headline, one_k" in printed
    folder = next(tmp_path.iterdir())
    assert folder.name.startswith(f"{values['dataset']}_{values['arch']}_samix")
    args = json.loads((folder / "args.json").read_text())["args"]
    ours = {"image_size": size, "batch_size": 4, "pretrained": ""}
    for name, value in (values | ours).items():             # every value reached the program
        if value is None:                                   # of the MixBlock: the network's
            value = args[name.removeprefix("block_")]
        assert args[name] == (list(value) if isinstance(value, tuple) else value), name


def test_configurations_values_are_flags(capsys):
    stem = "r18_l2_a2_bili_val_dp01_mul_mb_mlr1e_3_bb_mlr0_4xb64"
    for name in (stem, f"{stem}.py", f"configs/classification/imagenet/samix/basic/{stem}.py"):
        args = samix.parse_args(["--config", name, "--epochs", "300", "--lam_mul_k", "0.5"])
        assert (args.arch, args.epochs, args.lam_mul_k, args.lr) == ("resnet18", 300, 0.5, 0.1)
    config = configs.config("tiny_r18")
    assert config.keys() <= vars(samix.parse_args(["--config", "tiny_r18"])).keys()
    args = samix.parse_args(["--config", "imagenet_r18", "--dataset", "digits"])
    assert args.image_size is None and args.mean is None            # the data set's own
    args = samix.parse_args(["--config", "cub_rx50", "--method", "automix"])
    assert (args.mask_loss, args.pretrained, args.drop_last) == (0.1, "torchvision", True)


def test_data_are_cropped_as_configured(monkeypatch):
    seen = {}
    monkeypatch.setattr(samix.data, "load", lambda name, place, recipe, **options: seen.update(
        vars(recipe) | options))
    samix.load_data(samix.parse_args(["--config", "cifar100_r18"]), "cpu")
    assert (seen["crop"], seen["padding"], seen["padding_mode"], seen["transform"]) == (
        "padded", 4, "reflect", None)
    samix.load_data(samix.parse_args(["--config", "cifar100_swin_t"]), "cpu")
    assert (seen["crop"], seen["scale"], seen["interpolation"]) == ("resized", (0.8, 1), "bicubic")
    assert seen["transform"].func is randaugment and seen["image_size"] == 224
    assert seen["transform"].keywords == {"level": 21, "std": 1.5}      # of 30, as 7 ± 0.5 of 10
    samix.load_data(samix.parse_args(["--config", "cub_r18"]), "cpu")
    assert (seen["crop"], seen["scale"], seen["resize"]) == ("resized", (0.5, 1), "shorter")
    assert seen["drop_last"] is True
    samix.load_data(samix.parse_args(["--dataset", "imagenet"]), "cpu")
    assert (seen["crop"], seen["resize"]) == ("resized", None)


def test_pretrained_weights(tmp_path, capsys):
    """A state_dict of torchvision's reaches both branches, statistics included."""
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18()
    theirs.train()(torch.randn(2, 3, 64, 64))               # statistics worth copying
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    words = "--config cub_r18 --dataset digits --image_size 128 --batch_size 4".split()

    class Big(Ten):
        image_size = width = 128
    def pretrained(*more):
        args = samix.parse_args([*words, *more])
        net = samix.build(args, Big)
        samix.load_pretrained(net, args)
        return net
    net = pretrained("--pretrained", str(tmp_path / "weights.pt"))
    state = theirs.state_dict()
    for branch in ("q", "k"):
        for name, value in state.items():
            if not name.startswith("fc"):
                assert torch.equal(net.state_dict()[f"{branch}.backbone.before.{name}"], value)
    (tmp_path / "text.pt").write_text("nothing")
    for wrong, line in (("none.pt", "none.pt: no such file"), ("text.pt", "not a readable")):
        with pytest.raises(RunError, match=line):
            pretrained("--pretrained", str(tmp_path / wrong))
    with pytest.raises(RunError, match="weights.pt does not fit resnet34"):
        pretrained("--arch", "resnet34", "--pretrained", str(tmp_path / "weights.pt"))
    with pytest.raises(RunError, match="no ImageNet weights of resnet200"):
        pretrained("--arch", "resnet200", "--pretrained")
    assert torch.equal(net.q.one.weight, net.k.one.weight)
    pretrained("--pretrained", "none")


# ---------------------------------------------------------------------------- evaluation, previews

def test_four_heads_are_measured_and_reported(tmp_path, capsys):
    words = ["--epochs", 6, "--labels_per_class", 60, "--ema_base", 0.7, "--ema_end", 0.7,
             "--lr", 0.1, "--milestones", 4, "--seed", 1]
    folder = train(tmp_path, *words)
    printed = capsys.readouterr().out
    rows = [dict(zip(*(line.split(",") for line in pair), strict=True)) for pair in
            zip([(folder / "log.csv").read_text().splitlines()[0]] * 6,
                (folder / "log.csv").read_text().splitlines()[1:], strict=True)]
    last = rows[-1]
    assert float(last["test_accuracy"]) == float(last["one_k_accuracy"]) > 20
    medians = {head: np.median([float(row[f"{head}_accuracy"]) for row in rows])
               for head in HEADS}
    found = re.search(r"headline, one_k at the last epoch: ([\d.]+) %; the best of 4 heads by the "
                      r"median of the last 6 epochs: ([\d.]+) % \((\w+)\)", printed)
    assert float(found[1]) == pytest.approx(float(last["one_k_accuracy"]), abs=0.01)
    assert float(found[2]) == pytest.approx(max(medians.values()), abs=0.01)
    assert medians[found[3]] == max(medians.values())
    train(tmp_path, *words, "--evaluate", folder / "checkpoint.pt")
    printed = capsys.readouterr().out
    for head in HEADS:
        value = re.search(rf"^{head}: accuracy ([\d.]+) %.* on 355 images", printed, re.M)[1]
        assert float(value) == pytest.approx(float(last[f"{head}_accuracy"]), abs=0.01)
    args = arguments()                                      # the heads are not one another's
    net = samix.build(args, Ten)
    net.load_state_dict(weights(folder))
    images = torch.randn(8, 3, 16, 16)
    net.eval()
    with torch.no_grad():
        outputs = [getattr(net, branch)(images, head) for branch, head in HEADS.values()]
        for i, one in enumerate(outputs):
            assert all(not torch.allclose(one, other) for other in outputs[:i])

        class Loader(list):
            device = "cpu"
        labels = torch.arange(8) % 10
        result = samix.measure(net, Loader([(images, labels)]), args, Ten)
        for name, logits in zip(HEADS, outputs, strict=True):
            assert result[name]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(),
                                                         rel=1e-5)


def test_previews(tmp_path, drawn):
    for method in configs.METHODS:
        path = tmp_path / f"{method}.png"
        samix.main([*SMALL, "--method", method, "--preview", str(path), "--root_dir",
                    str(tmp_path / "none")])
        with Image.open(path) as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert not (tmp_path / "none").exists()


# -------------------------------------------------------------------- resume, ranks, script, faults

def test_killed_and_resumed_is_the_run_never_killed(tmp_path):
    words = [*SMALL, "--epochs", 4, "--dropout", 0.2, "--ema_start", 0.5, "--lr_every", "step",
             "--mask_anneal", "True", "--randaugment", "True", "--switch_off", 0.9]
    samix.main([*map(str, words), "--root_dir", str(tmp_path / "whole")])
    whole = next((tmp_path / "whole").iterdir())
    folder = tmp_path / "killed" / whole.name
    killed("samix.main", words, tmp_path / "killed", 6)
    assert len((folder / "log.csv").read_text().splitlines()) < 5
    samix.main([*map(str, words), "--root_dir", str(tmp_path / "killed"), "--resume", "auto"])
    assert same(weights(whole), weights(folder))
    logs = [[line.split(",")[:-2] for line in (place / "log.csv").read_text().splitlines()]
            for place in (whole, folder)]
    assert len(logs[0]) == 5 and logs[0] == logs[1]


def test_two_ranks_end_alike(tmp_path):
    printed = on_two_ranks(tmp_path, "samix.main", [
        *SMALL, "--method", "samix", "--epochs", 2, "--switch_off", 0.5, "--root_dir",
        tmp_path / "runs"])
    assert "2 processes" in printed and "ranks agree: True" in printed
    assert "test accuracy, median" in printed


def test_script_trains_on_two_ranks(sets, tmp_path):
    words = ["sh", str(ROOT / "samix" / "scripts" / "train_imagenet_dist.sh"), *TINY,
             *"--image_size 32 --batch_size 8 --workers 1 --job_name x".split()]
    options = {"text": True, "cwd": tmp_path, "capture_output": True, "timeout": 3600,
               "env": os.environ | {"DATA": str(sets["imagenet"]), "OUT": "runs", "NPROC": "2",
                                    "PYTHON": sys.executable, "CONFIG": "imagenet_r18"}}
    for epochs in ("1", "2"):
        options["env"]["EPOCHS"] = epochs
        result = subprocess.run(words, **options)
        assert result.returncode == 0, result.stderr
        assert "2 processes" in result.stdout and "headline, one_k" in result.stdout
    assert "resumed at epoch 2, step 0" in result.stdout
    folder = tmp_path / "runs" / "imagenet_resnet18_samix_seed0_x"
    assert len((folder / "log.csv").read_text().splitlines()) == 3
    options["env"].pop("DATA")
    assert "set DATA" in subprocess.run(words, **options).stderr


@pytest.mark.parametrize("words, line", [
    ("--config imagnet_r18", "none of imagenet_r18"),
    ("--config r18_l2_a2_bili_val_dp01_mb_mlr5e_4_1xb16_ep200", "aircraft_r18: give the path"),
    ("--method nothing", "invalid choice: 'nothing'"),
    ("--arch nonet", "invalid choice: 'nonet'"),
    ("--head bce --label_smoothing 0.1", "--label_smoothing is of --head ce"),
    ("--mean 0.5 0.5 0.5", "--mean and --std: give both"),
    ("--optimizer adamw --nesterov", "--nesterov is of --optimizer sgd"),
    ("--drop_path 0.1", "resnet18 has no option 'drop_path'"),
    ("--layer 4", "no layer 4 before the last: there are 4"),
    ("--padding 16", "cannot be padded by 16 of their reflection"),
    ("--arch swin_t --image_size 32 --initial_channels 5", "swin_t cannot have"),
    ("--arch deit_s --image_size 20", "deit_s takes images of a multiple of 16 pixels, not 20"),
    ("--resume none.pt", "none.pt: no such checkpoint"),
    ("--lr 0.01", "--lr 0.01 is below --min_lr 0.05"),
    ("--milestones 1 --min_lr 0", "--min_lr is for runs without --milestones"),
    ("--gamma 0.3", "--gamma is for --milestones"),
    ("--crop zero --crop_scale 0.3", "--crop_scale is for --crop resized"),
    ("--crop resized --padding 2", "--padding is for --crop zero and reflect"),
    ("--resize_first True", "--resize_first is for sets read from disk"),
    ("--image_size 128", "resnet18 for 128 pixels has --initial_channels 64"),
    ("--evaluate --preview a.png", "--preview: not allowed with argument --evaluate"),
    ("--lr 1e30 --print_freq 1", "at epoch 1, ")])
def test_bad_input_is_one_line(tmp_path, words, line, capsys):
    with pytest.raises((SystemExit, RunError)) as fault:
        samix.main([*SMALL, "--root_dir", str(tmp_path), *words.split()])
    assert line in f"{fault.value} {capsys.readouterr().err}" and "\n" not in str(fault.value)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("size", [18, 21])
def test_sides_that_the_features_do_not_divide(tmp_path, size, drawn):
    """Masks of 5 or 6 features a side, four times as large, are cut to the images."""
    folder = train(tmp_path, "--image_size", size, "--max_steps", 1)
    assert (folder / "mixed_start.png").exists() and (folder / "mixed.png").exists()


def test_transformers_keep_their_size_on_other_data():
    size = {words: samix.parse_args(f"--config {words}".split()).image_size for words in (
        "cifar100_swin_t --dataset cifar10", "cifar100_r18 --dataset npz",
        "cifar100_swin_t --dataset cifar10 --arch resnet18",
        "cifar100_deit_s --dataset folder --image_size 64")}
    assert list(size.values()) == [224, None, None, 64]


def test_milestones_leave_the_warm_up(tmp_path):
    args = samix.parse_args("--milestones 5 --warmup_epochs 4 --lr 0.4 --warmup_ratio 0".split())
    assert [samix.step_rates(args, step, 1)["q"] for step in (0, 2, 4, 5)] == pytest.approx(
        [0, 0.2, 0.4, 0.04])
    assert samix.step_rates(args, 0, 1)["block"] == args.block_lr


def test_weights_are_read_once(tmp_path, monkeypatch):
    """ImageNet weights begin a run; neither resuming nor evaluating asks for them again."""
    asked = []
    monkeypatch.setattr(samix, "load_pretrained", lambda net, args: asked.append(1))
    folder = train(tmp_path, "--max_steps", 1)
    train(tmp_path, "--max_steps", 1, "--resume", "auto")
    train(tmp_path, "--evaluate", folder / "checkpoint.pt", "--max_steps", 1)
    assert asked == [1]


def test_preview_shows_the_network_of_the_run(tmp_path, drawn):
    words = ["--method", "samix", "--root_dir", str(tmp_path)]
    samix.main([*SMALL, *words, "--max_steps", "3", "--block_lr", "1"])
    pictures = []
    newest = next(tmp_path.rglob("checkpoint.pt"))
    for more in ([], ["--resume", "auto"], ["--resume", str(newest)]):
        samix.main([*SMALL, *words, *more, "--preview", str(tmp_path / "a.png")])
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]


def test_a_run_of_another_method_is_not_resumed(tmp_path):
    folder = train(tmp_path / "a", "--max_steps", 1)
    with pytest.raises(RunError, match="method samix .here automix."):
        train(tmp_path / "b", "--method", "automix", "--resume", folder / "checkpoint.pt")


