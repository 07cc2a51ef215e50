"""Self-supervised SAMix as users run it: views, pretraining, probe, resume, two ranks, faults."""
import math
import re
from shlex import quote

import pytest
import torch
from pictures import HAS_DALI, make_photos
from PIL import Image
from programs import killed, on_two_ranks, same, weights
from torch import nn
from torchvision.transforms.v2 import functional as TF

from common import checkpoint, data, plots
from common.errors import RunError
from samix import linear_probe, pretrain, views
from samix import main as samix
from samix.contrast import Queue
from samix.evaluation import knn_accuracy, pooled_features

SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 --queue 90 "
         "--dim 16 --initial_channels 8 --device cpu").split()
PROBE = "--batch_size 30 --device cpu".split()


@pytest.fixture
def drawn():
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(pretrain, "draw_preview", lambda path, *words: path)
        monkeypatch.setattr(plots, "curves", lambda *args: "curves.png")


def train(root, *words):
    """Runs pretrain's main() in this process; returns the run's folder."""
    pretrain.main([*SMALL, "--root_dir", str(root), *map(str, words)])
    return next(folder for folder in root.iterdir())


def probe(root, *words):
    return linear_probe.main([*PROBE, "--root_dir", str(root), *map(str, words)])


# ------------------------------------------------------------------------------------------ views

def photograph(size=48):
    from skimage import data as pictures
    image = torch.from_numpy(pictures.astronaut()).permute(2, 0, 1)
    return TF.resize(image, [size, size], antialias=True)[None]


def plain_view(n=1, size=48):
    """Draws that change nothing."""
    box = torch.tensor([0, 0, size, size])[:, None].expand(4, n)
    return views.View(box, torch.zeros(n, dtype=torch.bool), torch.eye(3).expand(n, 3, 3),
                      torch.zeros(n), torch.zeros(n))


def colours(brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0):
    """Colour map and shift of one image, as draw_view makes them from its random numbers."""
    strength = [(brightness - 1) / views.JITTER, (contrast - 1) / views.JITTER,
                (saturation - 1) / views.JITTER, turn / views.HUE]

    def rand(*shape, generator=None):
        if shape == (5, 1):         # flip, jittered, grey, blurred, width
            return torch.tensor([[0.9], [0.0], [0.9], [0.9], [0.0]])
        if shape == (4, 1):
            return (torch.tensor(strength)[:, None] + 1) / 2
        return torch.full(shape, 0.5)
    before, torch.rand = torch.rand, rand
    try:
        return views.draw_view(1, (48, 48), None)
    finally:
        torch.rand = before


def test_plain_view_is_the_image():
    image = photograph()
    torch.testing.assert_close(views.make_view(image, plain_view(), 48), image / 255)
    flipped = plain_view()._replace(flip=torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(views.make_view(image, flipped, 48), image.flip(3) / 255)


def test_colours_are_torchvisions():
    image = photograph() / 255
    expected = {
        "brightness": lambda f: TF.adjust_brightness(image, f),
        "contrast": lambda f: ((image - 0.5) * f + 0.5).clamp(0, 1),        # around mid-grey
        "saturation": lambda f: TF.adjust_saturation(image, f)}
    for name, change in expected.items():
        for factor in (0.6, 1.3):
            view = colours(**{name: factor})
            plain = plain_view()._replace(colours=view.colours, shift=view.shift)
            torch.testing.assert_close(views.make_view(photograph(), plain, 48), change(factor),
                                       atol=0.005, rtol=0)
    both = colours(brightness=1.3, contrast=0.7)            # contrast first
    pixels = views.make_view(photograph(), plain_view()._replace(
        colours=both.colours, shift=both.shift), 48)
    torch.testing.assert_close(pixels, (1.3 * ((image - 0.5) * 0.7 + 0.5)).clamp(0, 1), atol=0.005,
                               rtol=0)


def test_hue_turns_the_colours_and_keeps_the_luminance():
    image = photograph() / 255 * 0.4 + 0.3                  # no clipping
    turned = torch.einsum("ij,bjhw->bihw", colours(turn=0.1).colours[0], image)
    luma = torch.tensor(views.LUMA)[:, None, None]
    torch.testing.assert_close((turned * luma).sum(1), (image * luma).sum(1), atol=1e-3, rtol=0)
    # near to torchvision's turn in HSV, far from the other way round
    away = [(turned - TF.adjust_hue(image, sign * 0.1)).abs().mean() for sign in (-1, 1)]
    assert min(away) < 0.5 * max(away)


def test_blur_is_torchvisions_and_each_image_has_its_own():
    images = photograph().repeat(3, 1, 1, 1)
    view = plain_view(3)._replace(sigma=torch.tensor([0.0, 0.7, 2.0]))
    blurred = views.make_view(images, view, 48)
    torch.testing.assert_close(blurred[0], images[0] / 255, atol=1e-5, rtol=0)
    for i, sigma in ((1, 0.7), (2, 2.0)):
        inside = (..., slice(12, -12), slice(12, -12))      # 6 sigma from the borders
        expected = TF.gaussian_blur(images[i] / 255, 25, sigma)
        torch.testing.assert_close(blurred[i][inside], expected[inside], atol=1e-4, rtol=0)
    one = torch.full_like(images, 255)                      # no light is lost at the borders
    torch.testing.assert_close(views.make_view(one, view, 48), one / 255)


def test_draws_have_their_probabilities():
    view = views.draw_view(4000, (40, 40), torch.Generator().manual_seed(0), blur=0.25)
    assert (view.boxes[2:].prod(0) / 1600).min() >= 0.18
    same_colours = (view.colours - torch.eye(3)).abs().amax((1, 2)) < 1e-3
    grey = view.colours.std(1).amax(1) < 1e-3               # all channels alike
    for found, expected in ((view.flip, 0.5), (grey, views.GREY), (view.sigma > 0, 0.25),
                            (same_colours, (1 - views.JITTERED) * (1 - views.GREY))):
        assert found.float().mean() == pytest.approx(expected, abs=0.03)
    assert view.sigma.max() <= views.SIGMA[1]
    other = views.draw_view(4000, (40, 40), torch.Generator().manual_seed(0), blur=0.25)
    assert all(torch.equal(a, b) for a, b in zip(view, other, strict=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 4), ("val", 2)):
        make_photos(root / part, count, (70, 90))
    return root


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dalis_views_are_of_the_same_kind(photos):
    """Means, spreads and the views' likeness agree with those made in batches; draws differ."""
    def epoch(loader, number=0):
        stream, _, info = data.load(
            "imagenet", photos, data.Recipe(crop="random", flip=False), batch_size=16,
            device=torch.device("cpu"), image_size=48, loader=loader, workers=1)
        args = pretrain.parse_args([*SMALL, "--blur", "0.5", "--crop_scale", "0.9"])
        if loader == "dali":
            views.yield_two_crops(stream, (0.9, 1.0))
        stream.set_epoch(number)
        generator = torch.Generator().manual_seed(number)
        return [torch.cat(view) for view in zip(*(
            pretrain.two_views(images, args, info, generator) for images, _ in stream),
            strict=True)]
    sums = {}
    for loader in ("dali", "torch"):
        several = [epoch(loader, number) for number in range(4)]
        first, second = (torch.cat(part) for part in zip(*several, strict=True))
        assert first.shape == second.shape == (4 * 32, 3, 48, 48)
        assert (first - second).abs().mean((1, 2, 3)).min() > 0.01          # two of each
        grey = ((first * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
                 + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).std(1).amax((1, 2)) < 0.02)
        edges = first.diff(dim=3).abs().mean()
        sums[loader] = [first.mean(), first.std(), (first - second).abs().mean(), edges,
                        grey.float().mean()]
    for dali, ours in zip(*sums.values(), strict=True):
        assert dali == pytest.approx(ours.item(), rel=0.25, abs=0.15)
    assert torch.equal(epoch("dali", 1)[0], epoch("dali", 1)[0])


# ------------------------------------------------------------------------------------ pretraining

@pytest.mark.parametrize("method", ["samix", "moco"])
def test_pretrains_and_probes(tmp_path, method, drawn, capsys):
    folder = train(tmp_path, "--method", method, "--max_steps", 3)
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "log.csv", "curves.png", "mixed.png", "checkpoint.pt", ".lock"}
    assert folder.name == f"digits_resnet18_{method}_pretrained_seed0"
    with Image.open(folder / "mixed.png") as picture:
        assert picture.height > (1000 if method == "samix" else 200)
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state["queue"]["position"] == 0 and state["queue"]["keys"].shape == (90, 16)
    assert state["queue"]["keys"].norm(dim=1).sub(1).abs().max() < 1e-5
    assert any(name.startswith("block") for name in state["model"]) == (method == "samix")
    assert f"linear_probe.py --weights {quote(str(folder / 'checkpoint.pt'))} --data_dir" \
        in capsys.readouterr().out
    net = probe(tmp_path / "p", "--weights", folder / "checkpoint.pt")
    assert [file.name for file in (tmp_path / "p").iterdir()] == [      # a folder an encoder
        f"digits_resnet18_probe_{folder.name}_checkpoint_seed0"]
    for name, value in state["model"].items():              # frozen, statistics too
        if name.startswith("q.backbone."):
            assert torch.equal(net.state_dict()[name.removeprefix("q.")], value)
    assert net.one.weight.abs().max() > 0.03


def test_samix_learns(tmp_path):
    """Digits: k-NN accuracy of the features rises above an untrained network's by four standard
    errors of 355 images; seeds other than 1 gain less, on one kind of processor nothing."""
    words = ("--dataset digits --image_size 16 --initial_channels 8 --batch_size 50 --queue 250 "
             "--blur 0 --crop_scale 0.9 --temperature 0.1 --ema 0.99 --neck 128 --lr 0.02 "
             "--epochs 8 --device cpu").split()
    args = pretrain.parse_args(words)
    _, test, info = data.load("digits", "", batch_size=50, device=torch.device("cpu"), seed=1,
                              image_size=16)
    torch.manual_seed(1)
    untrained = knn_accuracy(pretrain.build(args, info).q.backbone, test, 10, args)
    pretrain.main([*words, "--seed", "1", "--root_dir", str(tmp_path)])
    log = next(tmp_path.rglob("log.csv")).read_text().splitlines()
    rows = [dict(zip(log[0].split(","), line.split(","), strict=True)) for line in log[1:]]
    assert float(rows[-1]["knn_accuracy"]) > untrained + 8, untrained
    assert 0.3 < float(rows[-1]["mask_mean"]) < 0.7 and float(rows[-1]["mask_std"]) > 0


FLAGS = ["--method moco", "--alpha 9", "--lam_mul_k 5", "--mask_margin 0.5", "--block_loss bce",
         "--neck 64",
         "--extend_weight 2", "--mask_loss 2", "--temperature 0.5", "--ema 0.5", "--queue 120",
         "--crop_scale 0.9", "--blur 1", "--lr 0.1", "--momentum 0.5", "--weight_decay 0.1",
         "--seed 1", "--layer 2", "--amp bf16"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    known = {}

    def end(words):
        if words not in known:
            known[words] = weights(train(tmp_path_factory.mktemp("run"), "--epochs", 1,
                                         *words.split()))
        return known[words]
    return end


@pytest.mark.parametrize("words", FLAGS)
def test_no_flag_is_idle(ends, words):
    assert not same(ends(""), ends(words))
    assert all(value.isfinite().all() for value in ends(words).values())


def test_losses_are_weighed_and_fall(tmp_path, monkeypatch):
    """One step's loss is the weighed sum; the auxiliary and the masks' weights end at 0."""
    args = pretrain.parse_args([*SMALL, "--extend_weight", "0.7"])

    class Fixed(nn.Module):
        def forward(self, view_q, view_k, draws, negatives, order, extension):
            assert not torch.allclose(view_q, view_k, atol=0.1)     # two views, not one twice
            values = {"moco": 1.0, "mix": 10.0, "block": 100.0, "extend": 1000.0, "mask": 10000.0}
            self.p = torch.ones((), requires_grad=True)
            keys = torch.ones(len(view_q), 16) / 4
            return {name: value * self.p for name, value in values.items()}, keys, keys

    class Info:
        mean, std, image_size = (0.5,) * 3, (0.2,) * 3, 16
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for fall in (1.0, 0.5, 0.0):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        queue = Queue(90, 16)
        loss, logits, _ = pretrain.training_step(Fixed(), torch.rand(6, 3, 16, 16), queue, args,
                                                 Info, *generators, scaler, fall)
        assert loss.item() == pytest.approx(111 + 0.7 * 1000 * fall + 0.1 * 10000 * fall, rel=1e-5)
        assert logits.shape == (6, 2) and logits[0, 0].item() == pytest.approx(1 / 0.2)


def test_the_rate_falls_along_a_cosine(tmp_path):
    folder = train(tmp_path, "--epochs", 3, "--method", "moco", "--lr", 0.1)
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    rates = [float(row[rows[0].index("lr")]) for row in rows[1:]]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * (4 * epoch + 3) / 12))
                                   for epoch in range(3)], rel=1e-4)


def test_killed_and_resumed_is_the_run_never_killed(tmp_path):
    words = [*SMALL, "--epochs", 5, "--blur", 0.5]
    pretrain.main([*map(str, words), "--root_dir", str(tmp_path / "whole")])
    whole = next((tmp_path / "whole").iterdir())
    folder = tmp_path / "killed" / whole.name
    killed("samix.pretrain", words, tmp_path / "killed", 6)
    assert len((folder / "log.csv").read_text().splitlines()) < 6
    pretrain.main([*map(str, words), "--root_dir", str(tmp_path / "killed"), "--resume", "auto"])
    first, second = (checkpoint.load(place / "checkpoint.pt") for place in (whole, folder))
    assert same(first["model"], second["model"]) and same(first["queue"], second["queue"])


def test_two_ranks_end_alike(tmp_path):
    printed = on_two_ranks(tmp_path, "samix.pretrain", [*SMALL, "--epochs", 2, "--root_dir",
                                                  tmp_path / "runs"])
    assert "2 processes" in printed and "ranks agree: True" in printed
    state = checkpoint.load(next((tmp_path / "runs").iterdir()) / "checkpoint.pt")
    assert state["queue"]["position"] == 60                 # 8 steps of both ranks' 15 keys, of 90


def test_imagenet_pretrains(photos, tmp_path, capsys):
    for loader in ("dali", "torch") if HAS_DALI else ("torch",):
        pretrain.main(f"--config imagenet_r18 --data_dir {photos} --image_size 32 --batch_size 8 "
                      f"--initial_channels 8 --queue 16 --workers 1 --device cpu --max_steps 2 "
                      f"--loader {loader} --root_dir {tmp_path / loader}".split())
        printed = capsys.readouterr().out
        assert "8 classes, 32×32 pixels" in printed and "16 keys" in printed
    folder = next((tmp_path / loader).iterdir())
    probe(tmp_path / "p", "--weights", folder / "checkpoint.pt", "--data_dir", photos,
          "--workers", 1, "--max_steps", 1, "--batch_size", 8)


def test_views_whose_sides_the_features_do_not_divide(tmp_path):
    train(tmp_path, "--image_size", 18, "--max_steps", 1)


# -------------------------------------------------------------------------------------- the probe

def test_probe_is_scikit_learns_logistic_regression(tmp_path, capsys):
    from sklearn.linear_model import LogisticRegression
    words = ["--weights", "random", "--dataset", "digits", "--arch", "resnet18",
             "--initial_channels", 8, "--image_size", 16, "--weight_decay", 0.01]
    net = probe(tmp_path, *words)
    folder = tmp_path / "digits_resnet18_probe_random_seed0"
    assert {file.name for file in folder.iterdir()} == {"evaluation.csv", "evaluation.png"}
    found = re.search(r"clean: accuracy ([\d.]+) %.* on 355 images", capsys.readouterr().out)
    assert float(found[1]) > 80                             # chance: 10
    train, test, _ = data.load("digits", "", data.Recipe(crop="padded", padding=0),
                               batch_size=50, device=torch.device("cpu"), image_size=16)
    args = linear_probe.parse_args([*PROBE, *map(str, words)])
    (features, labels), (others, answers) = (
        pooled_features(net.backbone, loader, args) for loader in (train, test))
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
    theirs = LogisticRegression(C=1 / (0.01 * len(labels)), max_iter=1000).fit(
        (features - mean) / std, labels)
    expected = theirs.decision_function((others - mean) / std)
    ours = net.one(others).detach()
    assert (ours.argmax(1).numpy() == expected.argmax(1)).mean() > 0.99
    assert 100 * (ours.argmax(1) == answers).float().mean() == pytest.approx(float(found[1]),
                                                                             abs=0.01)


def test_probe_of_two_ranks_is_that_of_one(tmp_path):
    words = [*PROBE, "--weights", "random", "--dataset", "digits", "--arch", "resnet18",
             "--initial_channels", 8, "--image_size", 16, "--weight_decay", 0.01]
    printed = on_two_ranks(tmp_path, "samix.linear_probe", [*words, "--root_dir", tmp_path / "two"])
    assert "ranks agree: True" in printed
    linear_probe.main([*map(str, words), "--root_dir", str(tmp_path / "one")])
    rows = [next((tmp_path / name).rglob("evaluation.csv")).read_text().splitlines()[1].split(",")
            for name in ("one", "two")]
    assert float(rows[0][1]) == pytest.approx(float(rows[1][1]), abs=1)


def test_probe_of_main_has_its_layer_and_statistics(tmp_path, monkeypatch):
    words = ["--dataset", "digits", "--image_size", 16, "--initial_channels", 8, "--arch",
             "wrn28_2", "--layer", 2, "--labels_per_class", 6, "--batch_size", 30, "--mean", 0.1,
             0.2, 0.3, "--std", 0.4, 0.5, 0.6, "--max_steps", 1, "--device", "cpu", "--crop",
             "zero", "--root_dir", tmp_path / "a", "--seed", 3]
    monkeypatch.setattr(samix, "draw_preview", lambda path, *words: path)
    samix.main([*map(str, words)])
    seen = []
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args, **words: seen.append((args[2], words)) or
                        load(*args, **words))
    probe(tmp_path / "b", "--weights", next((tmp_path / "a").rglob("best.pt")), "--max_steps", 1)
    state = checkpoint.load(next((tmp_path / "a").rglob("best.pt")))
    del state["args"]["statistics"]                         # as in older ones
    state["args"] |= {"val_split": 0.25, "data_dir": "data"}
    checkpoint.save(tmp_path, state, "older.pt")
    monkeypatch.setattr(data, "load", lambda *args, **words: seen.append((args[2], words)) or
                        load(*args, **words | {"val_split": None}))
    probe(tmp_path / "b", "--weights", tmp_path / "older.pt", "--max_steps", 1)
    for recipe, _ in seen:
        assert tuple(recipe.mean) == (0.1, 0.2, 0.3) and tuple(recipe.std) == (0.4, 0.5, 0.6)
    assert seen[1][1]["val_split"] == 0.25
    probe(tmp_path / "c", "--weights", tmp_path / "older.pt", "--max_steps", 1, "--data_dir", "x")
    assert seen[2][1]["val_split"] is None                  # other data: of their own
    assert seen[0][1]["seed"] == 3 and next((tmp_path / "b").iterdir()).name.endswith("seed3")


@pytest.mark.parametrize("program, words, line", [
    (pretrain, "--queue 20", "--queue 20 is less than a batch of 30"),
    (pretrain, "--alpha 0", "'0' is not a number"),
    (pretrain, "--evaluate", "--evaluate: of samix/linear_probe.py"),
    (pretrain, "--cam x.png", "--cam: of samix/linear_probe.py"),
    (pretrain, "--layer 9", "no layer 9 before the last"),
    (pretrain, "--config nothing", "invalid choice: 'nothing'"),
    (linear_probe, "--weights none.pt", "none.pt: no such checkpoint"),
    (linear_probe, "--weights random", "--weights random needs --dataset and --arch"),
    (linear_probe, "--weights {baseline}", "holds no encoder of pretrain.py"),
    (linear_probe, "--weights {trained} --arch resnet34", "encoder does not fit this run's"),
    (linear_probe, "--weights x --evaluate", "--evaluate: the regression takes none"),
    (linear_probe, "--weights x --epochs 3", "--epochs: the regression takes none")])
def test_bad_input_is_one_line(tmp_path_factory, program, words, line, capsys):
    root = tmp_path_factory.mktemp("faults")
    if "{trained}" in words:
        words = words.format(trained=train(root / "t", "--max_steps", 1) / "checkpoint.pt")
    if "{baseline}" in words:
        samix.main(f"--dataset digits --image_size 16 --initial_channels 8 --method vanilla "
                   f"--max_steps 1 --device cpu --root_dir {root / 't'}".split())
        words = words.format(baseline=next((root / "t").rglob("best.pt")))
    capsys.readouterr()
    common = SMALL if program is pretrain else PROBE
    with pytest.raises((SystemExit, RunError)) as fault:
        program.main([*common, "--root_dir", str(root / "runs"), *words.split()])
    assert line in f"{fault.value} {capsys.readouterr().err}" and "\n" not in str(fault.value)
    assert not (root / "runs").exists()


@pytest.mark.parametrize("program, flags, other", [
    (pretrain, "cam evaluate corruptions target_layer", "--epochs"),
    (linear_probe, "epochs lr momentum resume preview print_freq tensorboard evaluate", "--cam")])
def test_help_leaves_out_the_flags_that_are_refused(program, flags, other, capsys):
    with pytest.raises(SystemExit):
        program.parse_args(["--help"])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert other in shown and not {f"--{name}" for name in flags.split()} & set(shown)
