"""The GPU path without a GPU: devices agree, the host does not wait in a step, kernels are counted.

`watch` runs a program's own main() on a pretended device and ends it after two training steps.
"""
import importlib
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import AutoAugmentPolicy

from common import data, evaluation, mixing
from common.data.recipe import _on_device, to_uint8
from common.randaugment import _sources, draw_randaugment, rand_augment
from common.run import Run, StepSums
from resizemix import mixing as resizemix
from resizemix import randaugment
from safuse import mixing as safuse
from safuse import network, superpixels
from sage import comixup, puzzlemix, rearrange, saliencymix
from sage.graphcut import _lifted_grid
from samix import mixblock, views
from soft_aug import softcrop
from tests.pretend_cuda import CUDA, Mismatch, pretend_cuda

SMALL = ("--device cuda --dataset digits --labels_per_class 4 --epochs 10 --initial_channels 16 "
         "--batch_size 20 --seed 3 ")
SAGE = "sage.main", "--arch preactresnet18 --schedule 6 8 --method "
SOFT = "soft_aug.main", "--arch resnet18 "
RESIZE = "resizemix.main", "--arch wresnet40_2 --config cifar100_wrs --cutout 0 --resizemix False "
SAFUSE = "safuse.main", "--schedule step --cutmix_prob 1 --method "
SAMIX = "samix.main", ("--lr 0.05 --block_lr 0.05 --min_lr 0 --block_min_lr 0 --arch resnet18 "
                       "--method ")
PRETRAIN = "samix.pretrain", "--queue 40 --lr 0.05 --method "
STEPS = [
    *((*SAGE, method) for method in (
        "vanilla", "input --in_batch", "manifold --in_batch", "cutmix --prob_mix 0.5",
        "saliencymix", "puzzle", "puzzle --adv_p 1 --clean_lam 1", "puzzle --t_size -1",
        "puzzle --amp fp16", "puzzle --solver gco", "comix", "comix --m_thres_type soft",
        "comix --amp fp16", "comix --solver gco", "sage --amp fp16",
        "sage --update_ratio 0.7 --eval_mode")),
    *((*SOFT, flags) for flags in (
        "--da -1", "--da 1 --l 8", "--da 2 --loss st --amp fp16",
        "--da 2 --loss st --rw sample --other", "--da 2 --loss sce --mixup",
        "--da 0 --loss fl --ra", "--da 2 --loss st --noise 0.5")),
    *((*RESIZE, flags) for flags in (
        "--cutout 8", "--cutmix_prob 1 --clip_grad 5", "--resizemix", "--resizemix --batch_aug",
        "--resizemix --amp fp16", "--randaugment", "--autoaugment")),
    *((*SAFUSE, flags) for flags in (
        "baseline", "cutmix", "occamix", "lgcoamix", "safuse", "safuse --amp fp16",
        "safuse --superpixels skimage")),
    *((*SAMIX, flags) for flags in (
        "vanilla", "mixup", "cutmix", "automix", "samix --amp fp16",
        "samix --mask_adjust 1 --head bce --no_repeat",
        "samix --switch_off 1 --crop resized --randaugment --clip_grad 5")),
    *((*PRETRAIN, flags) for flags in (
        "moco", "samix --amp bf16", "samix --block_loss bce --extend_weight 1 --blur 1")),
]
ALLOWED = {"fp16": "_local_scalar_dense", "gco": " sage/", "skimage": " safuse/superpixels.py"}


@pytest.fixture(autouse=True)
def empty_caches():
    """Constants of the pretended GPU are none of a real one's, here and in the tests after."""
    clear = [cached.cache_clear for cached in (_on_device, _sources, _lifted_grid)]
    for function in clear:
        function()
    yield
    for function in clear:
        function()


class Done(BaseException):
    """Two steps were seen."""


class RealGPU:
    """Stands in for `Seen` where there is a GPU: after `reset` a wait of the host is an error."""

    waits = {}

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        torch.cuda.set_sync_debug_mode("default")

    def reset(self):
        torch.cuda.set_sync_debug_mode("error")


def watch(module: str, flags: str, monkeypatch, device=pretend_cuda) -> dict:
    """Waits of a program's second training step, its batch from the loader included."""
    found = []
    real, begin = Run.steps, Run.start

    def steps(run, loader):
        batches = real(run, loader)
        yield next(batches)                                 # the first step fills caches
        seen.reset()
        yield next(batches)
        found.append(dict(seen.waits))
        raise Done

    def start(run, *args, **facts):
        run.keeps_files = run.writes = False
        begin(run, *args, **facts)

    monkeypatch.setattr(Run, "steps", steps)
    monkeypatch.setattr(Run, "start", start)
    with device() as seen, pytest.raises(Done):
        importlib.import_module(module).main([*SMALL.split(), *flags.split()])
    return found[0]


def title(case) -> str:
    return f"{case[0].replace('.main', '')} {case[2]}"


@pytest.mark.parametrize("module, base, flags", STEPS, ids=map(title, STEPS))
def test_no_step_waits_or_mixes_devices(module, base, flags, monkeypatch):
    waits = watch(module, base + flags, monkeypatch)
    allowed = [place for word, place in ALLOWED.items() if word in flags]
    assert not {wait: n for wait, n in waits.items() if not any(p in wait for p in allowed)}
    assert sum(n for wait, n in waits.items() if ALLOWED["fp16"] in wait) == ("fp16" in flags)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the CUDA runtime")
@pytest.mark.parametrize("module, base, flags", [
    case for case in STEPS if not any(word in case[2] for word in ALLOWED)])
def test_no_step_waits_for_the_gpu(module, base, flags, monkeypatch):
    watch(module, base + flags, monkeypatch, RealGPU)


@pytest.mark.parametrize("fault, what", [
    (lambda images: images * images.mean().item(), "_local_scalar_dense"),
    (lambda images: images[images > 0], "index by a mask"),
    (lambda images: images * torch.tensor(2.0, device=images.device), "copy to the device"),
    (lambda images: images + torch.ones(len(images), 1, 1, 1), Mismatch),
    (lambda images: torch.rand(3, device=images.device, generator=torch.Generator()), Mismatch),
    (lambda images: images.numpy(), Mismatch)])
def test_faults_in_a_step_are_seen(fault, what, monkeypatch):
    real = mixing.mixup

    def faulty(images, perm, lam):
        fault(images)
        return real(images, perm, lam)

    monkeypatch.setattr(mixing, "mixup", faulty)
    if what is Mismatch:
        with pytest.raises(Mismatch, match="tests/test_gpu_path.py"):
            watch(SAGE[0], SAGE[1] + "input", monkeypatch)
        return
    wait, = watch(SAGE[0], SAGE[1] + "input", monkeypatch)
    assert wait.startswith(what) and "tests/test_gpu_path.py" in wait


def small_network():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)).to(CUDA)


def test_evaluation_waits_at_its_end():
    with pretend_cuda() as seen:
        _, test, info = data.load("digits", "", batch_size=50, device=CUDA, labels_per_class=5)
        net, args = small_network(), types.SimpleNamespace(amp="off", max_steps=1)
        evaluation.measure(net, test, args, info, *evaluation.conditions(net, info))    # caches
        args.max_steps = 3
        seen.reset()
        evaluation.measure(net, test, args, info, *evaluation.conditions(net, info))
    assert sum(seen.waits.values()) == 1, seen.waits


def test_sums_of_an_epoch_and_the_check_of_weights_wait_once_each():
    with pretend_cuda() as seen:
        net, sums = small_network(), StepSums(9, CUDA)
        run = types.SimpleNamespace(parts={"model": net}, epoch=0, step=0)
        images, labels = torch.rand(4, 3, 32, 32).to(CUDA), torch.arange(4).to(CUDA)
        waits = {}
        for name, part in {
                "add": lambda: sums.add(0, net(images).sum(), net(images), labels),
                "result": sums.result, "state": sums.state,
                "weights": lambda: Run.check_finite(run, {})}.items():
            seen.reset()
            part()
            waits[name] = sum(seen.waits.values())
    assert waits == {"add": 0, "result": 2, "state": 2, "weights": 1}


# ------------------------------------------------------------------------ kernels of one mixing

N, SIZE = 100, (32, 32)
PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def mixings():
    """name -> a function of one batch's mixing, the saliency's passes left out."""
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(N, 3, *SIZE, generator=draws).to(CUDA)
    grad = torch.randn(N, 3, *SIZE, generator=draws).to(CUDA)
    labels = torch.randint(100, (N,), generator=draws).to(CUDA)
    raw = (images * 255).to(torch.uint8)
    perm, lam = mixing.draw_perm(N, draws).to(CUDA), mixing.draw_lambda(1.0, draws)
    magnitude, pixel = puzzlemix.gradient_magnitude(grad), mixing.draw_pixels(N, SIZE, draws)
    segments = torch.randint(25, 31, (N,), generator=draws)
    most = superpixels.most_superpixels(torch.arange(25, 31), *SIZE)
    kept = superpixels.slic(images, segments, 8.0)
    chosen = torch.rand(N, most, generator=draws) < 0.5
    scores = torch.rand(N, 4, 4, generator=draws).to(CUDA)
    features = torch.rand(N, 64, *SIZE, generator=draws).to(CUDA)
    block, small = mixblock.MixBlock(64).to(CUDA), features[:, :, :8, :8].contiguous()
    targets, parts = F.one_hot(labels, 100).float(), comixup.draw_comix(N, draws)
    info = types.SimpleNamespace(**PIXELS)

    def puzzle(blocks):
        return lambda: puzzlemix.puzzle_mix(images, magnitude, perm, lam, blocks, **PIXELS)

    return {
        "soft_targets": lambda: mixing.soft_targets(labels, perm, lam, 100),
        "mixup": lambda: mixing.mixup(images, perm, lam),
        "cutmix": lambda: mixing.cutmix(images, perm, mixing.draw_centre(*SIZE, draws), lam),
        "cutout": lambda: mixing.cutout(images, pixel, 8),
        "saliencymix": lambda: saliencymix.saliency_mix(
            images, perm, lam, saliencymix.fine_grained_saliency(to_uint8(images[:1], info))[0]),
        "sage": lambda: rearrange.sage_mix(
            images, rearrange.gradient_saliency(grad), perm,
            rearrange.draw_offsets(*SIZE, 0.05, draws), lam),
        "puzzle, 4 blocks": puzzle(4), "puzzle, 16 blocks": puzzle(16),
        "comix": lambda: comixup.co_mix_batch(images, targets, magnitude, parts),
        "resize_mix": lambda: resizemix.resize_mix(
            images, perm, 0.4, resizemix.draw_corners(N, SIZE, 0.4, draws)),
        "resizemix's cutmix": lambda: resizemix.cutmix(images, perm, pixel[0], lam),
        "batch_aug": lambda: randaugment.batch_aug(images, draws, **PIXELS),
        "resizemix's randaugment": lambda: randaugment.transform(raw, draws),
        "autoaugment": lambda: randaugment.autoaugment(
            raw, draws, AutoAugmentPolicy.CIFAR10),
        "rand_augment": lambda: rand_augment(raw, *draw_randaugment(N, draws)),
        "soft_crop": lambda: softcrop.confidence(softcrop.soft_crop(
            images, softcrop.draw_offsets(N, SIZE, 12.0, draws),
            0.01 * torch.randn(N, 3, generator=draws))[1], 100, power=2),
        "slic": lambda: superpixels.slic(images, segments, 8.0),
        "superpixel_mix": lambda: safuse.superpixel_mix(
            images, perm, kept, kept[perm], chosen, num_a=most),
        "attentive_superpixels": lambda: safuse.attentive_superpixels(scores, kept, num_b=most),
        "superpixel_pool": lambda: network.superpixel_pool(features, kept, most),
        "mixblock": lambda: mixblock.mix(
            images, mixblock.adjust_mask(block(small, lam, perm, 4), lam), perm),
        "two views": lambda: [views.make_view(raw, views.draw_view(N, SIZE, draws, blur=0.0), 32)
                              for _ in range(2)],
    }


# Most kernels of a mixing; of all others 250
GOALS = {"comix": 1200, "puzzle, 4 blocks": 350, "puzzle, 16 blocks": 350, "slic": 300,
         "saliencymix": 100, "autoaugment": 200, "resizemix's randaugment": 150}


def test_kernels_of_one_mixing_at_batch_100():
    """An H100 launches a kernel in 5 to 10 µs; a plain step of it takes about 8 ms."""
    counts = {}
    with pretend_cuda() as seen:
        for name, mix in mixings().items():
            mix()                                           # fills caches
            seen.reset()
            mix()
            counts[name] = seen.kernels
    print(counts)
    assert not {name: n for name, n in counts.items() if n > GOALS.get(name, 250)}
