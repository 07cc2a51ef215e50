"""Weights from elsewhere and for elsewhere: --pretrained in all programs, export.py."""
import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT

from common import checkpoint, models
from common.errors import DataError, RunError
from common.models import export
from common.models.weights import load_pretrained
from resizemix import main as resizemix
from safuse import main as safuse
from safuse import network
from sage import main as sage
from samix import main as samix
from soft_aug import main as soft_aug


def load_weights(network, source, arch):
    load_pretrained(network, argparse.Namespace(pretrained=source, arch=arch))


class Harm:
    """Pickled, a file that leaves a mark when code in it runs."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder to work in, and torch.hub's cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


def theirs(name="resnet18", classes=1000):
    torch.manual_seed(1)
    return torchvision.models.get_model(name, num_classes=classes).eval()


def put(cache, monkeypatch, content):
    """Writes `content` as torchvision's cached resnet18, and lets its hash agree."""
    path = cache / "new.pth"
    torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    path.rename(cache / f"resnet18-{digest}.pth")
    monkeypatch.setattr(type(weights), "url", f"https://example.org/resnet18-{digest}.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "best": 0.5},
                                  lambda s: {"model": s, "optimizer": {"state": {}}},
                                  lambda s: {"model": {"state_dict": s}}])
def test_files_of_weights(prefix, wrap):
    """Wrapped or bare, whoever saved them; a classifier of other classes stays as it was."""
    state = theirs().state_dict()
    torch.save(wrap({f"{prefix}{name}": value for name, value in state.items()} | {"step": 7}),
               "w.pth")
    ours = models.build("resnet18", 10, 224)
    before = ours.fc.weight.clone()
    load_weights(ours, "w.pth", "resnet18")
    assert torch.equal(ours.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert torch.equal(ours.bn1.running_var, state["bn1.running_var"])
    assert torch.equal(ours.fc.weight, before)
    whole = models.build("resnet18", 1000, 224)
    load_weights(whole, "w.pth", "resnet18")
    assert torch.equal(whole.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("content, line", [
    ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "it holds no state_dict"),
    ([torch.zeros(2)], "it holds no state_dict"), ({"epoch": 3}, "it holds no state_dict"),
    (Harm(), "more than tensors .*would run code")])
def test_files_that_are_none(content, line):
    torch.save(content, "w.pth")
    with pytest.raises(DataError, match=f"w.pth.*{line}"):
        load_weights(theirs(), "w.pth", "resnet18")
    assert not Path("harm").exists()


def test_files_that_do_not_fit():
    torch.save(theirs().state_dict(), "w.pth")
    Path("text.pth").write_text("nothing")
    torch.save(torchvision.models.resnet34().state_dict(), "deeper.pth")
    torch.save({0: torch.zeros(1)}, "numbers.pth")
    encoder = {size: network.Network("resnet18", 5, size).encoder for size in (32, 224)}
    load_weights(encoder[224], "w.pth", "resnet18")
    for net, source, line in [
            (encoder[32], "w.pth", r"conv1.weight: \(64, 3, 7, 7\), \(64, 3, 3, 3\) needed"),
            (network.Network("resnet50", 5, 224).encoder, "w.pth",
             r"conv1.weight: \(64, 64, 3, 3\)"),
            (models.build("resnet18", 5, 224), "deeper.pth", "larger network.*layer1.2.conv1"),
            (encoder[224], "numbers.pth", "numbers.pth does not fit"),
            (encoder[224], "absent.pth", "no such file"),
            (encoder[224], "text.pth", "text.pth: not a readable")]:
        with pytest.raises(DataError, match=line):
            load_weights(net, source, "resnet18")


def test_parts_that_are_of_no_network_here_are_named(capsys):
    state = theirs().state_dict() | {"projection_head.0.weight": torch.zeros(2, 2)}
    torch.save(state, "w.pth")
    load_weights(models.build("resnet18", 10, 224), "w.pth", "resnet18")
    assert "left out: projection_head.0.weight" in capsys.readouterr().out


def test_torchvisions_weights(cache, monkeypatch):
    """From the cache, whose hash counts and whose code never runs; else a download."""
    put(cache, monkeypatch, theirs().state_dict())
    net = models.build("resnet18", 10, 224)
    load_weights(net, "torchvision", "resnet18")
    assert torch.equal(net.conv1.weight, theirs().conv1.weight)
    put(cache, monkeypatch, Harm())
    with pytest.raises(DataError, match="more than tensors"):
        load_weights(net, "torchvision", "resnet18")
    assert not Path("harm").exists()
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(DataError, match="SHA-256 begins otherwise; delete it"):
        load_weights(net, "torchvision", "resnet18")
    for file in cache.iterdir():
        file.unlink()

    def refuse(*args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(DataError, match=r"resnet18-.*could not be downloaded \(no route\).*FILE"):
        load_weights(net, "torchvision", "resnet18")
    with pytest.raises(DataError, match="no ImageNet weights of wrn28_2"):
        load_weights(net, "torchvision", "wrn28_2")


PROGRAMS = {"sage": (sage, "--arch {} --method vanilla --schedule 1 2"),
            "resizemix": (resizemix, "--config imagenet_res --arch {} --warmup_epochs 0"),
            "soft_aug": (soft_aug, "--arch {}"), "safuse": (safuse, "--arch {} --schedule step"),
            "samix": (samix, "--config cub_r18 --arch {} --method vanilla")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_flag_means_the_same_everywhere(program):
    module, words = PROGRAMS[program]
    words = words.format("wrn28_2" if program == "sage" else "resnet18").split()
    for given, expected in (([], None), (["--pretrained"], "torchvision"),
                            (["--pretrained", "True"], "torchvision"),
                            (["--pretrained", "none"], ""), (["--pretrained", "false"], ""),
                            (["--pretrained", "w.pth"], "w.pth")):
        args = module.parse_args(["--dataset", "digits", *words, *given])
        assert args.pretrained == expected or expected is None and args.pretrained in (
            "", "torchvision")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_begins_with_the_file(program, capsys):
    """In every program; a resumed run does not read it again. Exported, the network is another
    program's, and torchvision's where it is."""
    module, words = PROGRAMS[program]
    small = program in ("sage", "soft_aug", "resizemix")    # a ResNet of our own names
    arch = "wrn28_2" if program == "sage" else "resnet18"
    options = {"initial_channels": 16}
    net = models.build(arch, 10, 32, **options) if small else network.Network(
        arch, 10, 16, decoder="joint", **options).encoder
    if program == "samix":
        net = torch.nn.Sequential(*(lambda m: (m.stem, *m.stages[:3]))(
            models.build(arch, 10, 32, **options)))
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "w.pth")
    lr = ["--lr", "0"] + ["--min_lr", "0"] * (program in ("samix", "resizemix")) \
        + ["--block_lr", "0", "--block_min_lr", "0"] * (program == "samix")
    words = [*"--dataset digits --image_size 16 --labels_per_class 4 --batch_size 20 --epochs 1 "
             "--initial_channels 16 --device cpu --max_steps 1 --seed 1".split(),
             *words.format(arch).split(), *lr, "--pretrained", "w.pth"]
    module.main(words)
    Path("w.pth").unlink()
    module.main([*words, "--resume", "auto"])
    with pytest.raises(DataError, match="w.pth: no such file"):
        module.main([*words, "--job_name", "again"])
    saved = next(Path("experiments").glob("*/checkpoint.pt"))
    state = torch.load(saved, weights_only=True)["model"]
    name = {"safuse": "encoder.", "samix": "backbone.before."}.get(program, "")
    for key, value in net.state_dict().items():
        if key.endswith("weight") and not key.startswith("fc"):
            torch.testing.assert_close(state[name + key], value)
    capsys.readouterr()
    export.main([str(saved), "out.pth"])
    assert re.search(r"images: RGB in \[0, 1\], minus \(0\.\d{4}, .*divided by",
                     capsys.readouterr().out)
    out = torch.load("out.pth", weights_only=True)
    assert out.keys() == state.keys()
    if small:
        models.build(arch, 10, 32, **options).load_state_dict(out)


def checkpoint_of(net, arch, tmp_path, **args):
    identity = {"arch": arch, "classes": 7, "initial_channels": 64, "dataset": "digits"}
    checkpoint.save(tmp_path, {"model": net.state_dict(), "identity": identity, "args": args,
                               "epoch": 1})
    return str(tmp_path / "checkpoint.pt")


def test_export_in_torchvisions_names(tmp_path, capsys):
    """Networks of all kinds load into torchvision's model, and say the same."""
    images = torch.rand(2, 3, 128, 128)
    ours = models.build("resnet18", 7, 224, dropout=0.0).eval()
    export.main([checkpoint_of(ours, "resnet18", tmp_path), "out.pth"])
    assert "out.pth: resnet18 in torchvision's names, 122 tensors" in capsys.readouterr().out
    model = theirs(classes=7)
    model.load_state_dict(torch.load("out.pth", weights_only=True))
    torch.testing.assert_close(model(images), ours(images))

    args = samix.parse_args("--config cub_r18 --dataset digits --image_size 128".split())
    info = argparse.Namespace(num_classes=7, image_size=128, width=128)
    net = samix.build(args, info).eval()
    export.main([checkpoint_of(net, "resnet18", tmp_path), "out.pth"])
    model.load_state_dict(torch.load("out.pth", weights_only=True))
    torch.testing.assert_close(model(images), net.q.one(net.q.backbone(images)[1]))

    for arch, decoder, what in (("resnet18", "local", "resnet18 in torchvision's names, 122"),
                                ("resnext50", "joint", "50_32x4d in torchvision's names, without")):
        net = network.Network(arch, 7, 224, decoder=decoder)
        export.main([checkpoint_of(net, arch, tmp_path), "out.pth"])
        assert what in capsys.readouterr().out
        out = torch.load("out.pth", weights_only=True)
        missing, unknown = theirs(
            arch.replace("50", "50_32x4d"), 7).load_state_dict(out, strict=False)
        assert not unknown and set(missing) <= {"fc.weight", "fc.bias"}
        assert torch.equal(out["layer3.1.conv1.weight"], net.encoder.layer3[1].conv1.weight)

    export.main([checkpoint_of(models.build("wrn28_2", 7), "wrn28_2", tmp_path), "out.pth"])
    assert "wrn28_2 in this project's names" in capsys.readouterr().out


def test_export_as_onnx(tmp_path, monkeypatch):
    """One line where onnx is not installed or the network is a paper's own; else the network goes
    to torch's exporter."""
    ours = models.build("wrn28_2", 8).eval()
    words = [checkpoint_of(ours, "wrn28_2", tmp_path, other=True), "out.onnx"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: (
        None if name in ("onnx", "onnxscript") else find(name, *more)))
    with pytest.raises(RunError, match="out.onnx: pip install onnx onnxscript"):
        export.main(words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    seen = []
    monkeypatch.setattr(torch.onnx, "export", lambda net, inputs, path, **more: seen.append(net))
    export.main(words)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(seen[0](images), ours(images))
    large = models.build("preactresnet18", 7, 64).eval()    # whose stem has stride 2
    export.main([checkpoint_of(large, "preactresnet18", tmp_path, pixels=64), "out.onnx"])
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(seen[1](images), large(images))
    monkeypatch.setattr(torch.onnx, "export", lambda net, inputs, path, **more: seen.append(inputs))
    export.main([checkpoint_of(ours, "wrn28_2", tmp_path, pixels=24, width=16, other=True),
                 "out.onnx"])
    assert seen[2][0].shape == (2, 3, 24, 16)
    with pytest.raises(SystemExit, match="2"):
        export.main([words[0], words[0]])                   # would be the end of the checkpoint
    with pytest.raises(RunError, match="ONNX is for the networks of sage"):
        export.main([checkpoint_of(network.Network("resnet18", 7), "resnet18", tmp_path), "o.onnx"])


def test_export_of_safuses_large_network_has_no_classifier(tmp_path, capsys):
    """Its last stage has stride 1: torchvision's network would answer otherwise."""
    net = network.Network("resnet18", 7, 224, decoder="none")
    export.main([checkpoint_of(net, "resnet18", tmp_path), "out.pth"])
    state = torch.load("out.pth", weights_only=True)
    assert "layer4.1.conv2.weight" in state and "fc.weight" not in state
    assert "without the classifier; its layer4 has stride 1" in capsys.readouterr().out


def test_export_runs_as_a_program():
    result = subprocess.run([sys.executable, str(ROOT / "common/models/export.py"), "none.pt",
                             "out.pth"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "error: none.pt: no such checkpoint\n")
