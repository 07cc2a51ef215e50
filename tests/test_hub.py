"""torch.hub's mixers: in somebody else's folder, and step by step against the programs."""
import importlib
import subprocess
import sys

import pytest
import torch

from common import data, models
from common.distributed import step_generator
from common.mixing import soft_targets, softmax_bce
from safuse import network
from safuse.mixing import area_ratio
from tests.conftest import ROOT

STRANGER = """
import sys, torch
import common
torch.manual_seed(0)
load = lambda *args, **options: torch.hub.load({root!r}, *args, source="local", **options)
net = load("preactresnet18", num_classes=10, initial_channels=16)
net.stem.requires_grad_(False)
next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
before = {{name: value.clone() for name, value in net.state_dict().items()}}
ramp = torch.linspace(-1, 1, 32)
images = torch.randn(8, 3, 1, 1) + ramp * torch.randn(8, 1, 1, 1) + ramp[:, None]
images, labels = images / images.abs().max(), torch.arange(8)
for method in {methods!r}:
    mixer = load("mixer", method=method, num_classes=10, seed=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    mixed, targets = mixer(images, labels, net)
    again, _ = load("mixer", method=method, num_classes=10, seed=1, mean=(0.5,) * 3,
                    std=(0.5,) * 3)(images, labels, net)
    assert torch.equal(mixed, again) and not torch.equal(mixed, images), method
    assert mixed.shape == images.shape and targets.shape == (8, 10), method
    assert torch.allclose(targets.sum(1), torch.ones(8)), method
    if method != "softcrop":
        hard = torch.nn.functional.one_hot(labels, 10).float()
        assert load("mixer", method=method, num_classes=10, seed=1, mean=(0.5,) * 3,
                    std=(0.5,) * 3)(images, hard, net)[1].allclose(targets), method
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), method
    try:                                                    # of pixels, not normalised
        mixer((images * 127 + 128).byte(), labels, net)
        assert method in ("cutmix", "resizemix"), method
    except TypeError as fault:
        assert "images must be floating point" in str(fault), method
    grads = [p.grad for p in net.parameters()]
    assert torch.equal(grads[0], torch.ones_like(grads[0])) and not any(
        g is not None for g in grads[1:]), method
    assert net.training and not any(p.requires_grad for p in net.stem.parameters()), method
kept, targets = load("mixer", method="input", num_classes=10, prob=0)(images, labels)
assert kept is images and targets.equal(torch.nn.functional.one_hot(labels, 10).float())
assert load("slic", images / 2 + 0.5, 20).shape == (8, 32, 32)
import common as again
import common.data as theirs
assert again.mine and theirs.mine and "sage" not in sys.modules and not any(
    path.startswith({root!r}) for path in sys.path if path.count("/") == {root!r}.count("/"))
print("all of them")
"""
METHODS = ["input", "cutmix", "cutout", "saliencymix", "puzzle", "comix", "sage", "resizemix",
           "softcrop", "superpixels", "occamix"]


def mixer(method, **options):
    return torch.hub.load(str(ROOT), "mixer", source="local", method=method, num_classes=10,
                          **options)


def test_every_method_in_a_folder_with_a_common_of_its_own(tmp_path):
    for folder in (tmp_path / "common", tmp_path / "common" / "data"):
        folder.mkdir()
        (folder / "__init__.py").write_text("mine = True\n")
    (tmp_path / "loop.py").write_text(STRANGER.format(root=str(ROOT), methods=METHODS))
    end = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True)
    assert end.stdout.strip() == "all of them", end.stderr


def program_step(method, module, args, net, info):
    """A step of the program: images, labels, generator -> gradients."""
    scaler = torch.amp.GradScaler(enabled=False)
    arguments = {
        "sage": lambda i, y, g: (net, net, i, y, args, info, 0, g, scaler),
        "resizemix": lambda i, y, g: (net, i, y, args, info, g, scaler),
        "soft_aug": lambda i, y, g: (net, i, y, args, info, 0, g, scaler),
        "safuse": lambda i, y, g: (net, net, i, y, args, info, True, g, scaler),
    }[module.__name__.partition(".")[0]]
    return lambda *batch: module.training_step(*arguments(*batch))


@pytest.mark.parametrize("method, room, words", [
    *((name, "sage", f"--method {name}") for name in ("input", "cutmix", "saliencymix", "sage")),
    ("puzzle", "sage", "--method puzzle --clean_lam 0"),
    ("comix", "sage", "--method comix --clean_lam 0"),
    ("cutout", "resizemix", "--resizemix False --cutout 16"),
    ("resizemix", "resizemix", "--resizemix True"),
    ("softcrop", "soft_aug", "--da 2 --loss st --rw off"),
    ("occamix", "safuse", "--method occamix")])
def test_a_loop_of_ones_own_trains_the_program_s_network(method, room, words):
    module = importlib.import_module(f"{room}.main")
    args = module.parse_args(words.split())
    loader, _, info = data.load("digits", "", batch_size=16, device=torch.device("cpu"), seed=1,
                                labels_per_class=8)
    build = network.Network if room == "safuse" else models.build
    more = {"decoder": "none"} if room == "safuse" else {}
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(build("resnet18", 10, 32, initial_channels=16, **more).train())
    steps = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    mix = mixer(method, mean=info.mean, std=info.std)
    loss = softmax_bce if room == "sage" else torch.nn.functional.cross_entropy
    theirs = program_step(method, module, args, nets[0], info)
    for step, (images, labels) in zip(range(3), loader, strict=False):
        for optimizer in steps:
            optimizer.zero_grad()
        theirs(images, labels, step_generator(1, 0, step))
        mixed, targets = mix(images, labels, nets[1], generator=step_generator(1, 0, step))
        loss(nets[1](mixed), targets).backward()
        for optimizer in steps:
            optimizer.step()
    # SoftCrop's program has a divergence for a loss: the same gradients but for rounding
    close = {"rtol": 0, "atol": 1e-4 if method == "softcrop" else 0}
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(first, second, **close)


def test_superpixels_are_pasted_as_safuse_does():
    from safuse import main as safuse
    loader, _, info = data.load("digits", "", batch_size=16, device=torch.device("cpu"), seed=1)
    images, labels = next(iter(loader))
    want = safuse.mix_batch(None, images, safuse.parse_args(["--method", "safuse"]), info,
                            torch.Generator().manual_seed(2))
    mixed, targets = mixer("superpixels", mean=info.mean, std=info.std)(
        images, labels, generator=torch.Generator().manual_seed(2))
    assert torch.equal(mixed, want.images)
    counts = network.superpixel_pool(images, want.fused, want.from_b.shape[1])[1]
    share = area_ratio(counts, want.from_b)
    assert torch.allclose(targets, soft_targets(labels, want.perm, 1 - share, 10), atol=1e-6)
    assert (share > 0).any()


def test_options_are_the_programs_and_wrong_ones_are_named(monkeypatch):
    assert mixer("sage", rand_pos=0.1, in_batch=True).args.rand_pos == 0.1
    for method, options, words in (
            ("sage", {"rand_pos": 2}, "--rand_pos: '2' is not a number"),
            ("sage", {"nonsense": 1}, "--nonsense"), ("sage", {"update_ratio": 0.5}, "program"),
            ("resizemix", {"randaugment": True}, "program"), ("softcrop", {"ra": 1}, "program"),
            ("nothing", {}, "no method 'nothing'")):
        with pytest.raises(ValueError, match=words):
            mixer(method, **options)
    monkeypatch.setenv("LOCAL_RANK", "1")                   # every rank says it, every time
    for _ in range(2):
        with pytest.raises(ValueError, match="--rand_pso.*did you mean --rand_pos?"):
            mixer("sage", rand_pso=1)
    with pytest.raises(ValueError, match="needs the model"):
        mixer("sage")(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))


def test_labels_of_other_integers_and_turned_images():
    images, labels = torch.rand(4, 3, 32, 40), torch.tensor([3, 1, 0, 2])
    for method in ("cutmix", "resizemix", "softcrop", "input"):
        mix = mixer(method)
        turned = torch.rot90(images, 1, (2, 3))
        draws = [torch.Generator().manual_seed(3) for _ in range(3)]
        whole, targets = mix(turned.contiguous(), labels, generator=draws[0])
        for kind, draw in zip((torch.int32, torch.uint8), draws[1:], strict=True):
            mixed, others = mix(turned, labels.to(kind), generator=draw)
            assert torch.equal(mixed, whole) and torch.equal(others, targets), method


def test_saliency_under_fp16_is_of_float32():
    """Only a training loop's scaler would learn that fp16's gradients overflow."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    net[1].weight.data *= 3000                              # its gradients overflow in fp16
    images, labels, seen = 1e-3 * torch.randn(4, 3, 32, 32), torch.arange(4), []
    for inside in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=inside):
            seen.append(mixer("sage", seed=1)(images, labels, net)[0])
    assert torch.equal(*seen)


@pytest.mark.parametrize("method", ["cutmix", "resizemix", "softcrop", "superpixels"])
def test_slices_and_other_default_devices(method):
    """A batch that is a view mixes like its copy; draws are on the CPU whatever the default is."""
    mix, labels = mixer(method, prob=0.9), torch.arange(4)
    images = torch.rand(4, 3, 40, 40)[:, :, 4:36, 4:36] * 0.1
    draws = [torch.Generator().manual_seed(3) for _ in range(3)]
    whole, targets = mix(images.contiguous(), labels, generator=draws[0])
    assert torch.equal(mix(images, labels, generator=draws[1])[0], whole)
    torch.set_default_device("meta")
    try:
        again = mix(images, labels, generator=draws[2])
    finally:
        torch.set_default_device(None)
    assert torch.equal(again[0], whole) and torch.equal(again[1], targets)


def test_workers_and_epochs_draw_differently():
    """A seeded generator copied into workers would repeat itself in each epoch."""
    mix = mixer("input", seed=3)
    batches = [(torch.rand(3, 32, 32), k) for k in range(8)]
    loader = torch.utils.data.DataLoader(
        batches, 4, num_workers=2, collate_fn=lambda items: mix(
            *torch.utils.data.default_collate(items))[1].amax(1))
    shares = [tuple(share.tolist()) for _ in range(2) for share in loader]
    assert len(set(shares)) == 4


def test_ranks_draw_differently(monkeypatch):
    """One seed for all; each rank's draws are its own, and the same in every run."""
    images, labels, shares = torch.rand(4, 3, 32, 32), torch.arange(4), []
    for rank in (0, 1, 0):
        mix = mixer("input", seed=3)
        monkeypatch.setattr(sys.modules["mixup_zoo.common.distributed"], "rank", lambda r=rank: r)
        shares.append(mix(images, labels)[1])
    assert torch.equal(shares[0], shares[2]) and not torch.equal(shares[0], shares[1])


def test_samix_learns_in_a_loop():
    from common.models.features import build_backbone
    torch.manual_seed(0)
    net = torch.hub.load(str(ROOT), "samix", source="local", num_classes=10, total_steps=20, seed=1,
                         backbone=build_backbone("resnet18", 32, 3, initial_channels=16))
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.05)
    loader, _, _ = data.load("digits", "", batch_size=16, device=torch.device("cpu"), seed=1)
    k, block, q = ([p.clone() for p in part.parameters()] for part in
                   (net.net.k, net.net.block, net.net.q))
    for _, (images, labels) in zip(range(2), loader, strict=False):
        loss, logits = net(images, labels)
        assert logits.shape == (16, 10) and loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.update()
    for before, part in ((k, net.net.k), (block, net.net.block), (q, net.net.q)):
        assert any(not torch.equal(a, b) for a, b in zip(before, part.parameters(), strict=True))
    assert net.eval()(images).shape == (16, 10)
    automix = torch.hub.load(str(ROOT), "samix", source="local", num_classes=10, total_steps=20,
                             backbone=net.net.q.backbone, method="automix", lam_concat=False)
    assert (automix.net.block.variant, automix.net.block.lam_concat) == ("automix", False)
    assert automix.train()(images, labels)[0].isfinite()
    with pytest.raises(ValueError, match="method 'vanilla' is none of samix, automix"):
        torch.hub.load(str(ROOT), "samix", source="local", num_classes=10, total_steps=20,
                       backbone=net.net.q.backbone, method="vanilla")
    state, net.step = net.state_dict(), 0
    net.load_state_dict(state)
    assert net.step == 2
