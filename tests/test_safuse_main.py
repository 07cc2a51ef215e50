"""SAFuse's program as users run it: methods, recipes, resume after a kill, two ranks, faults."""
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Golden, golden_cases
from pictures import HAS_DALI, make_cub, make_dogs
from PIL import Image
from programs import Program, close, on_two_ranks, relabelled, same, weights

from common import checkpoint, distributed, plots, runtime
from common.data import Recipe
from common.errors import DataError, RunError
from safuse import main as safuse
from safuse import network, recipes
from safuse.network import SuperpixelAttention, superpixel_pool

TINY = "--initial_channels 16 --LR 0.05 --device cpu"
SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 "
         f"--schedule step {TINY}").split()
PROGRAM = Program(safuse, SMALL)
command, train, arguments = PROGRAM.command, PROGRAM.train, PROGRAM.arguments
CUB = f"--dataset cub200 --image_size 64 --batch_size 4 --workers 1 --pretrained none {TINY}"
SUPERPIXELS = ["safuse", "lgcoamix"]


class Ten:
    name, num_classes, mean, std = "ten", 10, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    classes = [f"class{i}" for i in range(10)]


def batch(n=8, side=16):
    """Normalised smooth pictures, so that superpixels are of many shapes."""
    generator = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (side, side),
                           mode="bilinear")
    images = (pixels - torch.tensor(Ten.mean).view(3, 1, 1)) / torch.tensor(Ten.std).view(3, 1, 1)
    return images, torch.randint(10, (n,), generator=generator)


def small_net(args, side=16):
    torch.manual_seed(0)
    return network.Network(args.arch, 10, side, initial_channels=16, score=args.attention_score,
                         decoder=safuse.DECODERS.get(args.method, "none"))


# --------------------------------------------------------------------------------- flags, recipes

@pytest.fixture(scope="module")
def trained():
    """What the methods' classifiers came to, so far."""
    return {}


@pytest.mark.parametrize("method", safuse.METHODS)
def test_every_method_trains_and_closes(tmp_path, method, capsys, trained):
    folder = train(tmp_path, "--method", method, "--max_steps", 2, "--tensorboard",
                   "--cutmix_prob", 1)
    printed = capsys.readouterr().out
    assert f"method {method}\n" in printed and "median of the last 1 epochs" in printed
    assert folder.name == f"digits_resnet18_{method}_seed0"
    assert {f.name for f in folder.iterdir()} >= {
        "args.json", "log.csv", "curves.png", "mixed.png", "checkpoint.pt", "tensorboard"}
    assert json.loads((folder / "args.json").read_text())["parameters"] > 6e5
    encoder = weights(folder)["encoder.conv1.weight"]
    start = small_net(arguments(f"--method {method}")).encoder.conv1.weight
    assert torch.isfinite(encoder).all()
    for other in (start, *trained.values()):                # no method is another under its name
        assert not torch.equal(encoder, other)
    trained[method] = encoder


@pytest.mark.parametrize("words", [
    "--superpixels skimage --attention_score pre_norm", "--method lgcoamix --amp bf16",
    "--method occamix --superpixels skimage --cells 1", "--arch resnext50 --image_size 32",
    "--arch resnet50 --image_size 64 --method lgcoamix", "--normalise --loader dali --nesterov",
    "--arch deit_b16 --image_size 32 --method lgcoamix --labels_per_class 3",
    "--p_binom 0 --schedule A", "--arch resnet18 --image_size 128 --batch_size 4"])
def test_variants_train(tmp_path, words):
    if "dali" in words and not HAS_DALI:
        pytest.skip("DALI is not installed")
    folder = train(tmp_path, *words.split(), "--max_steps", 1,
                   *([] if "p_binom" in words else ["--cutmix_prob", 1]))
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_the_papers_flags_by_their_names():
    args = safuse.parse_args(
        "--NUM_CLASS 100 --data_path d --RESUME True --START_EPOCH 5 --NB_EPOCH 7 --LR 0.3 "
        "--BATCH_SIZE 4 --gpu_ids [0,2] --p_binom 0.4 --topN_local_ratio 0.6 --loss_gamma_CE 1 "
        "--loss_gamma_SCL 2 --temp 0.5 --N_min 20.0 --N_max 22 --cutmix_prob 0.1".split())
    assert (args.NUM_CLASS, args.data_dir, args.resume, args.start_epoch, args.epochs, args.lr,
            args.batch_size, args.gpu_ids, args.p_binom, args.topN_local_ratio, args.loss_gamma_CE,
            args.loss_gamma_SCL, args.temp, args.N_min, args.N_max, args.cutmix_prob) == (
        100, "d", "auto", 5, 7, 0.3, 4, [0, 2], 0.4, 0.6, 1, 2, 0.5, 20, 22, 0.1)
    args = safuse.parse_args("-b 3 --Burn_prob 0.2 --RESUME False --pretrained".split())
    assert (args.batch_size, args.p_binom, args.resume, args.pretrained) == (
        3, 0.2, "", "torchvision")
    assert safuse.parse_args([]).start_epoch is None and not safuse.parse_args([]).resume


# epochs, schedule, LR, batch, top-N, gamma CE, gamma SCL, N_min, N_max, compactness, label share
TABLE = {
    "safuse cifar100 resnet18": (600, "A", 0.02, 32, 0.7, 0.03, 0.05, 25, 30, 8, "both"),
    "safuse cifar100 resnext50": (600, "A", 0.02, 32, 0.764, 0.8, 0.08, 25, 30, 8, "both"),
    "safuse cub200 resnext50": (600, "A", 0.001, 8, 0.7, 0.8, 0.08, 30, 40, 8, "both"),
    "lgcoamix cifar100 resnet50": (600, "A", 0.02, 32, 0.7, 0.1, 0.05, 30, 35, 8, "both"),
    "lgcoamix cub200 resnet18": (300, "C", 0.001, 8, 0.7, 0.05, 0.05, 30, 40, 10, "attention"),
    "lgcoamix cub200 deit_b16": (600, "A", 0.001, 8, 0.7, 0.1, 0.05, 30, 38, 10, "attention"),
    "lgcoamix stanford_dogs resnet50": (
        600, "B", 0.01, 16, 0.7, 0.03, 0.05, 40, 60, 10, "attention"),
    # schedule A is all of SAFuse's and DeiT's
    "safuse stanford_dogs resnet18": (600, "A", 0.01, 16, 0.7, 0.03, 0.05, 40, 60, 8, "both"),
    "safuse tiny-imagenet-200 resnet18": (600, "A", 0.02, 100, 0.7, 0.03, 0.05, 30, 40, 8, "both"),
    "lgcoamix tiny-imagenet-200 resnet18": (
        600, "B", 0.02, 100, 0.7, 0.1, 0.05, 30, 40, 10, "attention"),
    "lgcoamix stanford_dogs deit_b16": (
        600, "A", 0.01, 16, 0.7, 0.03, 0.05, 40, 60, 10, "attention")}


@pytest.mark.parametrize("row", TABLE)
def test_the_papers_settings_are_the_defaults(row):
    method, dataset, arch = row.split()
    args = safuse.parse_args(["--method", method, "--dataset", dataset, "--arch", arch])
    assert (args.epochs, args.schedule, args.lr, args.batch_size, args.topN_local_ratio,
            args.loss_gamma_CE, args.loss_gamma_SCL, args.N_min, args.N_max, args.compactness,
            args.label_share) == TABLE[row]
    assert (args.momentum, args.weight_decay, args.nesterov) == (0.9, 5e-4, False)
    assert (args.p_binom, args.temp, args.cutmix_prob) == (0.5, 0.7, 0.5)
    assert args.attention_score == "post_norm" and not args.normalise and args.padding == 4
    assert args.pretrained == ("torchvision" if dataset == "cub200" else "")


def test_every_combination_has_settings_and_the_command_line_wins():
    for method, dataset, arch in itertools.product(safuse.METHODS, safuse.data.NAMES,
                                                   network.ARCHS):
        chosen = recipes.defaults(method, dataset, arch)
        assert set(chosen) == set(recipes.ROWS[-1][-1]) and chosen["N_min"] <= chosen["N_max"]
    chosen = recipes.defaults("occamix", "cifar100", "resnet18")
    assert (chosen["N_min"], chosen["N_max"], chosen["compactness"]) == (20, 40, 10)
    assert recipes.defaults("occamix", "tiny-imagenet-200", "resnet18")["N_max"] == 60
    assert recipes.defaults("safuse", "folder", "resnet18", 224)["N_min"] == 30
    args = safuse.parse_args("--dataset cub200 --LR 0.5 --N_min 3 --pretrained none".split())
    assert (args.lr, args.N_min, args.N_max, args.pretrained) == (0.5, 3, 40, "")


def test_schedules():
    def rates(schedule, epochs, **options):
        return [recipes.learning_rate(epoch, 1.0, schedule, **options) for epoch in epochs]

    assert rates("A", (0, 4, 9, 10, 159, 160, 200, 250, 300, 350, 400, 450, 500, 550, 599)) == \
        pytest.approx([0.1, 0.5, 1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 10, 1 / 20, 1 / 50, 1 / 100,
                       1 / 500, 1 / 1000, 1 / 1000])
    assert rates("B", (0, 9, 129, 130, 170, 220, 260, 310, 350, 390, 420, 470, 500, 530, 560,
                       580)) == pytest.approx(
        [0.1, 1, 1] + [1 / n for n in (2, 4, 8, 10, 20, 40, 80, 100, 200, 400, 800, 1000, 5000)])
    assert rates("C", (0, 59, 60, 90, 110, 120, 140, 160, 170, 180, 210, 230, 250, 270, 290)) == \
        pytest.approx([1, 1] + [1 / n for n in (2, 4, 8, 10, 20, 40, 80, 100, 200, 400, 800, 1000,
                                                5000)])
    assert rates("step", (0, 9, 10, 15), milestones=[10, 15]) == pytest.approx([1, 1, 0.1, 0.01])


def test_the_schedule_is_what_the_optimizer_gets(tmp_path):
    folder = train(tmp_path, "--epochs", 3, "--milestones", 1, 2, "--gamma", 0.5, "--method",
                   "baseline", "--labels_per_class", 3)
    rows = (folder / "log.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,lr") and [float(r.split(",")[1]) for r in rows[1:]] == [
        0.05, 0.025, 0.0125]


# --------------------------------------------------------------------------------- mixing and loss

@pytest.mark.parametrize("path", golden_cases("safuse", "bcd_local_"))
def test_loss_of_a_mixed_batch_golden(path, device):
    """The program's own loss, from decoder features on."""
    case = Golden(path)
    fused, from_b = relabelled(case.tensor("fused_map"))
    attention, fc_local = SuperpixelAttention(8), torch.nn.Linear(8, 10)
    with torch.no_grad():
        for name, module in (("q", attention.query), ("k", attention.key), ("v", attention.value),
                             ("ln", attention.norm), ("fc_local", fc_local)):
            module.weight.copy_(case.tensor(f"{name}_w"))
            module.bias.copy_(case.tensor(f"{name}_b"))
    means, counts = superpixel_pool(case.tensor("feats"), fused, from_b.shape[1])
    attended, scores = attention(means, counts)
    kind = "attention" if "cub" in path.name else "both"
    args = arguments(f"--method {'safuse' if 'safuse' in path.name else 'lgcoamix'} "
                     f"--label_share {kind} --topN_local_ratio {float(case['topN_ratio'])} "
                     f"--loss_gamma_CE {float(case['gamma_ce'])} --temp {float(case['temp'])} "
                     f"--loss_gamma_SCL {float(case['gamma_scl'])}")
    assert float(case["base_temp"]) == pytest.approx(0.07)
    outputs = case.tensor("global_logits"), fc_local(attended), scores, counts
    mixed = safuse.Mixed(case.tensor("feats"), case.tensor("rand_index"),
                         1 - case.tensor("lam0"), fused=fused, from_b=from_b)
    loss = safuse.superpixel_loss([t.to(device) for t in outputs], case.tensor("labels", device),
                                  safuse.Mixed(*(t if t is None else t.to(device)
                                                 for t in mixed)), args)
    close(loss, case.tensor("loss_total", device))


def test_weights_and_temperatures_of_the_loss_are_the_flags():
    images, labels = batch()
    net = small_net(arguments())
    mixed = safuse.mix_batch(net, images, arguments(), Ten, torch.Generator().manual_seed(1))
    outputs = net(mixed.images, mixed.fused, mixed.from_b.shape[1])

    def loss(ce, scl, words="--temp 0.3"):
        return safuse.superpixel_loss(outputs, labels, mixed, arguments(
            f"--method lgcoamix --loss_gamma_CE {ce} --loss_gamma_SCL {scl} {words}")).item()

    _, local, scores, counts = outputs
    index, selected = safuse.mixing.top_superpixels(scores, counts, 0.7, at_least_one=False)
    local = local.gather(1, index[..., None].expand(-1, -1, 10))
    own = torch.where(mixed.from_b, labels[mixed.perm][:, None], labels[:, None]).gather(1, index)
    cross = safuse.losses.local_cross_entropy(local, own, selected).item()
    contrast = safuse.losses.superpixel_contrastive(local, own, selected, temperature=0.3).item()
    assert loss(1, 0) - loss(0, 0) == pytest.approx(cross, rel=1e-4)
    assert loss(0, 2) - loss(0, 0) == pytest.approx(2 * contrast, rel=1e-4)

    def terms(words):                   # sums over the superpixels chosen
        return loss(1, 0, words) - loss(0, 0, words)

    assert terms("--topN_local_ratio 0.3") < 0.6 * terms("--topN_local_ratio 0.9")
    everything = terms("--topN_local_ratio 1")              # where the share is less than one:
    assert terms("--topN_local_ratio 0.01") == pytest.approx(everything, rel=1e-4)
    assert terms("--topN_local_ratio 0.01 --label_share attention") < 0.1 * everything


@pytest.mark.parametrize("method", ["safuse", "lgcoamix", "occamix", "cutmix"])
def test_mixed_images_come_from_both_by_whole_superpixels(method):
    images, _ = batch()
    args = arguments(f"--method {method}")
    net = small_net(args)
    mean = net.encoder.bn1.running_mean.clone()
    mixed = safuse.mix_batch(net, images, args, Ten, torch.Generator().manual_seed(1))
    again = safuse.mix_batch(net, images, args, Ten, torch.Generator().manual_seed(1))
    assert torch.equal(mixed.images, again.images) and net.training
    assert net.encoder.bn1.training and torch.equal(net.encoder.bn1.running_mean, mean)
    stays = (mixed.images == images).all(1)
    pasted = (mixed.images == images[mixed.perm]).all(1)
    assert (stays | pasted).all()
    moved = mixed.perm != torch.arange(8)
    assert torch.allclose(stays.float().mean((1, 2))[moved], mixed.ratio[moved], atol=0.005)
    if mixed.fused is not None:
        from_b = mixed.from_b.gather(1, mixed.fused.flatten(1)).view(mixed.fused.shape)
        assert torch.equal(from_b[moved], ~stays[moved])
    if method == "occamix":
        other = mixed.labels[mixed.perm]
        net.eval()
        scores = net.activation_maps(images).amax(1)
        chosen = safuse.mixing.attentive_superpixels(scores[mixed.perm], other)
        assert torch.equal(from_b, chosen.gather(1, other.flatten(1)).view(other.shape))
        for mask, labels in zip(from_b, other, strict=True):
            assert 1 <= len(labels[mask].unique()) <= 3
            assert not set(labels[mask].tolist()) & set(labels[~mask].tolist())     # whole ones


def test_superpixels_are_of_the_pixels_not_of_normalised_images():
    images, _ = batch()
    args = arguments()
    mixed = safuse.mix_batch(None, images, args, Ten, torch.Generator().manual_seed(1))
    pixels = images * torch.tensor(Ten.std).view(3, 1, 1) + torch.tensor(Ten.mean).view(3, 1, 1)
    generator = torch.Generator().manual_seed(1)
    torch.randperm(8, generator=generator)
    segments = torch.randint(25, 31, (8,), generator=generator)
    assert torch.equal(mixed.labels, safuse.superpixels.slic(pixels, segments, 8.0))
    skimage = safuse.mix_batch(None, images, arguments("--superpixels skimage"), Ten,
                               torch.Generator().manual_seed(1)).labels
    assert torch.equal(skimage, safuse.superpixels.slic_skimage(pixels, segments, 8.0))


def test_share_of_mixed_batches():
    def mixed(words):
        args = arguments(words)
        return [safuse.is_mixed(args, epoch, step) for epoch in range(20) for step in range(20)]

    assert 160 < sum(mixed("")) < 240 and mixed("") == mixed("")
    assert sum(mixed("--cutmix_prob 1")) == 400 and sum(mixed("--cutmix_prob 0")) == 0
    assert sum(mixed("--method baseline")) == sum(mixed("--p_binom 0")) == 0
    assert all(sum(mixed(f"--method {name} --cutmix_prob 1 --p_binom 0")) == 400
               for name in ("cutmix", "occamix"))           # which have no use for --p_binom
    assert mixed("") != mixed("--seed 1")


@pytest.mark.parametrize("method, mixed_step", [
    (method, mixed_step) for method in safuse.METHODS for mixed_step in (False, True)
    if method != "baseline" or not mixed_step])
def test_a_step_is_cross_entropy_and_what_the_method_adds(method, mixed_step, monkeypatch):
    images, labels = batch()
    args, scaler = arguments(f"--method {method}"), torch.amp.GradScaler("cpu", enabled=False)
    net = small_net(args)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    loss, logits = safuse.training_step(net, net, images, labels, args, Ten, mixed_step,
                                        torch.Generator().manual_seed(1), scaler)
    used = {name for name, p in net.named_parameters() if p.grad is not None}
    net.load_state_dict(state)
    mixed = safuse.Mixed(images)
    if mixed_step:
        mixed = safuse.mix_batch(net, images, args, Ten, torch.Generator().manual_seed(1))
    everything = {name for name, _ in net.named_parameters()}
    local = mixed_step and method in SUPERPIXELS
    if local:
        assert used == everything                           # decoder, attention and all
        expected = safuse.superpixel_loss(net(mixed.images, mixed.fused, mixed.from_b.shape[1]),
                                          labels, mixed, args)
    else:
        unused = tuple(["attention", "fc_local"] + ["decoder"] * (method == "lgcoamix"))
        assert used == {name for name in everything if not name.startswith(unused)}
        expected = F.cross_entropy(net(mixed.images), labels, reduction="none")
        if mixed.ratio is not None:
            other = F.cross_entropy(logits, labels[mixed.perm], reduction="none")
            expected = mixed.ratio * expected + (1 - mixed.ratio) * other
        expected = expected.mean()
    assert torch.allclose(loss, expected, atol=1e-5)

    if not local:                       # among ranks idle parameters take part, without a gradient
        waited = []
        hooks = [p.register_hook(lambda grad: waited.append(float(grad.abs().max())))
                 for name, p in net.named_parameters() if name not in used]
        monkeypatch.setattr(distributed, "world", lambda: 2)
        monkeypatch.setattr(distributed, "share_buffers", lambda net: None)
        net.load_state_dict(state)
        net.zero_grad()
        among, _ = safuse.training_step(net, net, images, labels, args, Ten, mixed_step,
                                        torch.Generator().manual_seed(1), scaler)
        assert torch.equal(among, loss) and waited == [0.0] * len(hooks)
        assert used == {name for name, p in net.named_parameters() if p.grad is not None}


def test_a_run_is_the_recipe_step_by_step(tmp_path):
    """Two epochs of the program against SGD by hand on the same batches and draws."""
    words = ("--momentum 0.8 --weight_decay 0.01 --milestones 1 --epochs 2 --LR 0.001 "
             "--attention_score pre_norm").split()          # rounding decides nothing
    folder = train(tmp_path, *words)
    args = arguments(" ".join(words))
    loader, _, info = safuse.data.load(
        "digits", "", Recipe(padding=4, mean=(0.0,) * 3, std=(1.0,) * 3), batch_size=30,
        device=torch.device("cpu"), image_size=16, labels_per_class=12)
    net = small_net(args).to(memory_format=torch.channels_last)
    velocity, scaler = {}, torch.amp.GradScaler("cpu", enabled=False)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader):
            net.zero_grad()
            safuse.training_step(net, net, images, labels, args, info,
                                 safuse.is_mixed(args, epoch, step),
                                 distributed.step_generator(0, epoch, step), scaler)
            with torch.no_grad():
                for name, p in net.named_parameters():
                    if p.grad is not None:                  # momentum lives through the run
                        grad = p.grad + 0.01 * p
                        velocity[name] = 0.8 * velocity[name] + grad if name in velocity else grad
                        p -= 0.001 * 0.1 ** epoch * velocity[name]
    ours = weights(folder)
    moved = {name: (ours[name] - value).abs().max().item() for name, value in
             net.named_parameters()}
    assert max(moved.values()) < 5e-4, max(moved, key=moved.get)


def plain_occamix(net, images, labels, segments, perm):
    """The loss of OcCaMix as the paper tells it, image by image, in the net's precision."""
    net.eval()
    with torch.no_grad():
        features = net.encoder(images)[0][-1]
    net.train()
    mixed, shares = images.clone(), []
    n, size = len(images), images.shape[-1]
    for i, other in enumerate(perm.tolist()):
        maps = torch.relu(torch.einsum("kc,chw->khw", net.fc.weight.detach(), features[other]))
        scores, cell = maps.amax(0), size // maps.shape[-1]
        pasted = torch.zeros(size, size, dtype=torch.bool)
        for index in scores.flatten().topk(3).indices.tolist():
            y, x = (cell * part for part in divmod(index, maps.shape[-1]))
            inside = segments[other][y:y + cell, x:x + cell]
            best = max(inside.unique().tolist(),            # the first, lowest, of equals
                       key=lambda s: (inside == s).sum().item() / (segments[other] == s).sum())
            pasted |= segments[other] == best
        mixed[i] = torch.where(pasted, images[other], images[i])
        shares.append(pasted.double().mean())
    log_p = net(mixed).log_softmax(1)
    return -sum((1 - lam) * log_p[i, labels[i]] + lam * log_p[i, labels[perm[i]]]
                for i, lam in enumerate(shares)) / n


def test_ranks_share_the_statistics_that_occamix_asks_with(monkeypatch):
    args, events = arguments("--method occamix"), []
    net = small_net(args)
    net.encoder.register_forward_pre_hook(lambda *_: events.append("forward"))
    monkeypatch.setattr(distributed, "share_buffers", lambda net: events.append("shared"))
    images, labels = batch()
    for mixed_step in (True, False):
        safuse.training_step(net, net, images, labels, args, Ten, mixed_step, torch.Generator(),
                             torch.amp.GradScaler("cpu", enabled=False))
    safuse.mix_batch(net, images, args, Ten, torch.Generator())         # a picture: of rank 0 alone
    assert events == ["shared", *["forward"] * 4]


def test_occamix_is_the_paper_in_float64():
    """Three of the program's steps, with SGD's momentum and decay, against a plain rendering."""
    args = arguments("--method occamix --cutmix_prob 1")
    net, scaler = small_net(args, 32).double(), torch.amp.GradScaler("cpu", enabled=False)
    plain = copy.deepcopy(net).double()
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.02, 0.9, weight_decay=5e-4)
                    for m in (net, plain))
    images, labels = batch(side=32)
    images = images.double()            # in float32 rounding decides which cells are chosen
    for step in range(3):
        ours.zero_grad()
        loss, _ = safuse.training_step(net, net, images, labels, args, Ten, True,
                                       torch.Generator().manual_seed(step), scaler)
        ours.step()
        generator = torch.Generator().manual_seed(step)
        perm = torch.randperm(8, generator=generator)
        segments = safuse.superpixels.slic(
            images * torch.tensor(Ten.std).view(3, 1, 1) + torch.tensor(Ten.mean).view(3, 1, 1),
            torch.randint(20, 41, (8,), generator=generator), 10.0)
        theirs.zero_grad()
        expected = plain_occamix(plain, images, labels, segments, perm)
        expected.backward()
        theirs.step()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=3e-5, msg=name)


def test_post_norm_is_blind_at_initialisation_and_pre_norm_is_not():
    images, _ = batch()
    spread, gap = {}, {}
    for score in ("post_norm", "pre_norm"):
        args = arguments(f"--attention_score {score}")
        net = small_net(args)
        mixed = safuse.mix_batch(net, images, args, Ten, torch.Generator().manual_seed(1))
        _, _, scores, counts = net(mixed.images, mixed.fused, mixed.from_b.shape[1])
        spread[score] = scores[counts > 0].abs().max().item()
        area = safuse.mixing.area_ratio(counts, mixed.from_b)
        attention = safuse.mixing.attention_ratio(scores.sigmoid(), counts, mixed.from_b)
        gap[score] = (area - attention).abs().max().item()
    assert spread["post_norm"] < 1e-4 and gap["post_norm"] < 1e-4
    assert spread["pre_norm"] > 0.1 and gap["pre_norm"] > 1e-3


# ----------------------------------------------------------------------------- pictures, evaluation

@pytest.mark.parametrize("method", safuse.METHODS)
def test_previews_are_drawn(tmp_path, method, monkeypatch):
    seen = {}
    grid = plots.grid
    monkeypatch.setattr(plots, "grid", lambda *args, **more: seen.update(
        rows=args[2], below=args[3]) or grid(*args, **more))
    safuse.main([*SMALL, "--method", method, "--preview", str(tmp_path / "p.png"),
                 "--root_dir", str(tmp_path / "none")])
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert not (tmp_path / "none").exists()
    if method in ("cutmix", "baseline"):
        return
    rows = seen["rows"]
    assert list(rows) == ["image", "partner", "mask", "mixed"]
    for name in ("image", "partner", "mixed"):              # each of the eight has borders
        yellow = (rows[name] == np.array([255, 255, 0])).all(-1)
        assert (yellow.mean((1, 2)) > 0.02).all() and rows[name].shape[:3] == (8, 224, 224)
    for mask, text in zip(rows["mask"], seen["below"], strict=True):
        shares = re.findall(r"^\d: (\d+) %$", text, re.M)   # of two classes
        assert len(shares) == 2 and sum(map(int, shares)) in (99, 100, 101)
        # at first the attention's share is the area's
        assert 100 * max(mask.mean(), 1 - mask.mean()) == pytest.approx(int(shares[0]), abs=1)


def test_attention_of_a_trained_network_shows_in_the_preview(tmp_path, monkeypatch):
    folder = train(tmp_path, "--attention_score", "pre_norm", "--epochs", 2, "--cutmix_prob", 1)
    texts = []
    monkeypatch.setattr(plots, "grid", lambda path, *args, **more: texts.append(args[2]) or path)
    for share in ("both", "attention"):
        train(tmp_path, "--attention_score", "pre_norm", "--preview", tmp_path / "p.png",
              "--label_share", share, "--resume", folder / "checkpoint.pt")
    assert texts[0] != texts[1]


def test_evaluation_finds_the_accuracy_again(tmp_path, capsys):
    words = ["--epochs", 6, "--labels_per_class", 60, "--method", "lgcoamix"]
    folder = train(tmp_path, *words)
    best = checkpoint.load(folder / "best.pt")["accuracy"]
    assert best > 30                    # chance: 10; rounding moves so short a training
    capsys.readouterr()
    train(tmp_path, *words, "--evaluate")
    printed = capsys.readouterr().out
    accuracy = re.search(r"accuracy ([\d.]+) %, top-5 ([\d.]+) %, loss", printed)
    assert float(accuracy[1]) == pytest.approx(best, abs=0.01) and float(accuracy[2]) > best
    assert "localisation" not in printed


# ---------------------------------------------------------------------------- sets read from disk

@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return make_cub(tmp_path_factory.mktemp("cub"))


def test_cub_trains_and_localises(birds, tmp_path, capsys, monkeypatch):
    words = [*CUB.split(), "--data_dir", str(birds), "--root_dir", str(tmp_path)]
    safuse.main([*words, "--epochs", "1"])
    printed = capsys.readouterr().out
    assert "cub200, 3 classes, 64×64 pixels, 12 training and 6 test images" in printed
    safuse.main([*words, "--evaluate"])
    found = re.search(r"localisation \(IoU at least 0.5\): ([\d.]+) % with the right class, "
                      r"([\d.]+) % with the class given", capsys.readouterr().out)
    assert found and float(found[1]) <= float(found[2])

    # a network whose maps are the red boxes and that takes all for class 1
    def red(net, images):
        maps = ((images[:, :1] > 0.8) & (images[:, 1:].amax(1, keepdim=True) < 0.25)).float()
        return maps.expand(-1, 3, -1, -1)

    def class_1(net, images):
        return torch.tensor([0.0, 1.0, 0.0]) + 0 * images.mean((1, 2, 3))[:, None]

    seen = []
    monkeypatch.setattr(safuse, "box_iou", lambda found, true, exact=safuse.box_iou:
                        seen.append(true) or exact(found, true))
    monkeypatch.setattr(network.Network, "activation_maps", red)
    monkeypatch.setattr(network.Network, "forward", class_1)
    safuse.main([*words, "--evaluate"])
    assert [len(boxes) for boxes in seen] == [4, 2] and len(torch.cat(seen).unique(dim=0)) == 6
    assert "33.33 % with the right class, 100.00 % with the class given" in capsys.readouterr().out
    safuse.main([*words, "--evaluate", "--max_steps", "1"])
    assert "50.00 % with the right class, 100.00 %" in capsys.readouterr().out


def test_dogs_train(tmp_path, capsys):
    make_dogs(tmp_path / "dogs")
    words = CUB.replace("cub200", "stanford_dogs").split()
    safuse.main([*words, "--data_dir", str(tmp_path / "dogs"), "--root_dir", str(tmp_path),
                 "--max_steps", "1", "--method", "lgcoamix", "--cutmix_prob", "1"])
    assert "stanford_dogs, 3 classes, 64×64 pixels, 9 training" in capsys.readouterr().out


def test_recipes_crop_as_the_papers_do(birds, tmp_path, monkeypatch):
    seen = []
    load = safuse.data.load
    monkeypatch.setattr(safuse.data, "load", lambda *args, **options: seen.append(args[2])
                        or load(*args, **options))
    words = [*CUB.split(), "--data_dir", str(birds), "--preview", str(tmp_path / "p.png")]
    safuse.main([*words, "--method", "baseline"])
    assert (seen[0].crop, seen[0].resize, seen[0].test_crop, seen[0].interpolation) == (
        "random", "square", "whole", "bilinear")
    assert seen[0].mean == (0, 0, 0) and seen[0].std == (1, 1, 1)
    assert recipes.CROPS["stanford_dogs"]["ratio"] == (1, 1.3)
    safuse.main([*words, "--method", "baseline", "--normalise"])
    assert seen[1].mean is None


def test_pretrained_weights_begin_a_run_and_never_overwrite_one(birds, tmp_path, capsys):
    source = network.Network("resnet18", 10, 64, initial_channels=16).encoder.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}}, tmp_path / "w.pth")
    words = [*CUB.split(), "--data_dir", str(birds), "--root_dir", str(tmp_path), "--method",
             "baseline", "--LR", "1e-9", "--weight_decay", "0"]
    words[words.index("none")] = str(tmp_path / "w.pth")
    safuse.main([*words, "--max_steps", "1"])
    folder = next(tmp_path.glob("cub200*"))
    assert torch.allclose(weights(folder)["encoder.conv1.weight"], source["conv1.weight"],
                          atol=1e-6)
    (tmp_path / "w.pth").unlink()                           # not asked for again
    safuse.main([*words, "--resume", "auto", "--max_steps", "1"])
    safuse.main([*words, "--evaluate", str(folder / "checkpoint.pt")])
    capsys.readouterr()
    with pytest.raises(DataError, match=r"w\.pth: no such file"):
        safuse.main([*words, "--max_steps", "1", "--seed", "1"])


def test_previews_begin_with_pretrained_weights(tmp_path):
    with pytest.raises(DataError, match="none.pth: no such file of weights"):
        safuse.main([*SMALL, "--root_dir", str(tmp_path), "--pretrained", "none.pth", "--preview",
                     str(tmp_path / "a.png")])


def test_gpu_ids_are_of_those_that_a_scheduler_gave(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_VISIBLE_DEVICES": "4,5"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="torch sees no such GPU"):
        safuse.main(["--gpu_ids", "1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_images_need_not_be_square(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", **{
        f"{part}_images": rng.integers(0, 256, (24, 16, 32, 3), np.uint8)
        for part in ("train", "test")}, **{
        f"{part}_labels": np.arange(24) % 3 for part in ("train", "test")})
    words = [*TINY.split(), "--dataset", "npz", "--data_dir", str(tmp_path / "wide.npz"),
             "--cutmix_prob", "1", "--batch_size", "12", "--max_steps", "1", "--root_dir",
             str(tmp_path)]
    for method in SUPERPIXELS + ["occamix"]:
        safuse.main([*words, "--method", method])
    assert "16×32 pixels" in capsys.readouterr().out


# ------------------------------------------------------------------------- resume, ranks, bad input

@pytest.mark.parametrize("method", ["safuse", "lgcoamix", "occamix"])
def test_killed_and_resumed_is_the_run_never_killed(tmp_path, method, capsys):
    words = ["--method", method, "--epochs", 3, "--milestones", 2]
    whole = train(tmp_path / "whole", *words)
    folder = tmp_path / "killed" / whole.name
    PROGRAM.killed(*words, root=tmp_path / "killed", steps=6)
    assert len((folder / "log.csv").read_text().splitlines()) < 4
    capsys.readouterr()
    train(tmp_path / "killed", *words, "--RESUME", "True")
    assert "other flags than before" not in capsys.readouterr().err
    one, two = checkpoint.load(whole / "checkpoint.pt"), checkpoint.load(folder / "checkpoint.pt")
    assert same(one["model"], two["model"]) and one["best"] == two["best"]
    momentum = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()]
                for c in (one, two)]
    assert len(momentum[0]) > 60 and all(torch.equal(a, b)
                                         for a, b in zip(*momentum, strict=True))
    assert len(one["history"]) == len(two["history"]) == 3
    assert all(a["train_loss"] == b["train_loss"] and a["test_loss"] == b["test_loss"]
               for a, b in zip(one["history"], two["history"], strict=True))


def test_start_epoch_repeats_from_there(tmp_path, capsys):
    words = ["--epochs", 3, "--method", "baseline", "--labels_per_class", 3]
    folder = train(tmp_path, *words)
    capsys.readouterr()
    train(tmp_path, *words, "--RESUME", "True", "--START_EPOCH", 1)
    assert re.findall(r"^epoch (\d)/3  loss", capsys.readouterr().out, re.M) == ["2", "3"]
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]
    train(tmp_path / "new", *words, "--RESUME", "True", "--START_EPOCH", 2)
    assert "warning: --start_epoch 2, after 0 trained epochs" in capsys.readouterr().err


@pytest.mark.parametrize("method", [*SUPERPIXELS, "occamix"])
def test_two_ranks_agree(tmp_path, method):
    """Mixed and plain steps, the latter without a gradient for the decoder or its like."""
    words = ["--method", method, "--epochs", 1, "--labels_per_class", 24]
    args = arguments(" ".join(map(str, words)))
    steps = [safuse.is_mixed(args, 0, step) for step in range(8)]
    assert True in steps and False in steps
    printed = on_two_ranks(tmp_path, "safuse.main", [
        *SMALL, "--root_dir", tmp_path / "runs", *words, "--loss_gamma_SCL", 0.5])
    assert "ranks agree: True" in printed and "2 processes" in printed
    folder = next((tmp_path / "runs").iterdir())
    assert (folder / "mixed.png").exists()                  # which rank 0 draws alone
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state["epoch"] == 1 and math.isfinite(state["history"][0]["train_loss"])


@pytest.mark.parametrize("words, code, line", [
    ("--method nomix", 2, "invalid choice: 'nomix'"),
    ("--arch resnet34", 2, "invalid choice: 'resnet34'"),
    ("--N_min 31", 2, "--N_min 31 is more than --N_max 30"),
    ("--gpu_ids x", 2, "argument --gpu_ids: 'x' is not an integer"),
    ("--schedule A --milestones 3", 2, "--milestones is for --schedule step"),
    ("--schedule A --gamma 0.3", 2, "--gamma is for --schedule step"),
    ("--dataset cub200 --padding 2", 2, "--padding is for sets in memory"),
    ("--epochs 5 --START_EPOCH 5", 0, ""), ("--nesterov --momentum 0 --max_steps 1", 0, ""),
    ("--attention_score mean", 2, "invalid choice: 'mean'"),
    ("--NUM_CLASS 100", 1, "--NUM_CLASS 100: digits has 10 classes"),
    ("--image_size 20", 1, "resnet18 takes images whose sides are multiples of 8 pixels"),
    ("--pretrained none.pth", 1, "none.pth: no such file of weights"),
    ("--batch_size 500", 0, ""),
    ("--dataset cub200 --data_dir nowhere", 1, "is for sets that fit in memory"),
    ("--arch deit_b16 --initial_channels 40", 1, "--initial_channels 40 is no multiple of 16"),
    ("--evaluate", 1, "best.pt: no such checkpoint"),
    ("--LR 1e30 --print_freq 1", 1, "at epoch 1, step")])
def test_bad_input_is_one_line(tmp_path, words, code, line, capsys):
    with pytest.raises(SystemExit) as end:
        runtime.launch(lambda: safuse.main([*SMALL, "--root_dir", str(tmp_path), "--max_steps",
                                            "3", *words.split()]))
    errors = capsys.readouterr().err
    assert end.value.code == code and line in errors and "Traceback" not in errors
    faults = [text for text in errors.splitlines() if "error:" in text]
    assert len(faults) == (code > 0)
    assert code == 0 or not list(tmp_path.rglob("*.pt"))


def test_gpu_ids_choose_the_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [word for word in SMALL if word not in ("--device", "cpu")]
    with pytest.raises(RunError, match=r"--gpu_ids \[1\]: torch sees no such GPU"):
        safuse.main([*words, "--gpu_ids", "1", "--root_dir", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(runtime, "use_gpus", asked.append)
    monkeypatch.setattr(runtime, "setup", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        safuse.main([*words, "--gpu_ids", "[1, 3]"])
    assert asked == [2] and os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    safuse.choose_gpus([1, 3])                              # torchrun's processes choose again
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_runs_from_its_own_folder(tmp_path):
    result = subprocess.run([sys.executable, "main.py", *SMALL, "--method", "baseline",
                             "--max_steps", "1", "--root_dir", str(tmp_path)],
                            cwd=ROOT / "safuse", capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr


def test_a_resumed_run_keeps_its_weights_from_epoch_0_on(tmp_path, monkeypatch):
    words = ["--method", "baseline", "--epochs", 1]
    train(tmp_path, *words)
    monkeypatch.setattr(safuse, "load_pretrained", lambda *args: pytest.fail("loaded again"))
    train(tmp_path, *words, "--pretrained", "weights.pth", "--resume", "auto", "--start_epoch", 0)
