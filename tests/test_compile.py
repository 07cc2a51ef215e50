"""--compile compiles the mixing of every program, whole, with the same result."""
import functools
import importlib

import pytest
import torch
from programs import same, weights

from common import runtime

SMALL = ("--device cpu --dataset digits --image_size 16 --labels_per_class 4 --batch_size 20 "
         "--initial_channels 4 --seed 3 --max_steps 2 ")
SAGE = "--arch preactresnet18 --rand_pos 0.02 --m_part 5 --m_niter 2 --method "
RESIZEMIX = "--arch wresnet40_2 --warmup_epochs 0 --cutout 4 --cutmix_prob 1"
SAFUSE = "--initial_channels 16 --schedule step --cutmix_prob 1 --N_min 6 --N_max 9 --method "


@pytest.mark.parametrize("room, words, compiled", [
    ("sage", SAGE + "input", "mixup"), ("sage", SAGE + "cutmix", "cutmix"),
    ("sage", SAGE + "saliencymix", "fine_grained_saliency saliency_mix"),
    ("sage", SAGE + "puzzle --solver device", "puzzle_mix"),
    ("sage", SAGE + "comix", "co_mix_batch"), ("sage", SAGE + "sage", "sage_mix"),
    ("soft_aug", "--da 1 --l 4", "cutout"),
    ("soft_aug", "--da 2 --loss st --noise 0.5 --mixup", "mixup soft_crop soft_noise"),
    ("resizemix", RESIZEMIX, "cutmix cutout"),
    ("safuse", SAFUSE + "cutmix", "cutmix"),
    ("safuse", SAFUSE + "occamix", "attentive_superpixels slic superpixel_mix"),
    ("safuse", SAFUSE + "safuse", "slic superpixel_mix"),
    ("samix", "--lr 0.05 --block_lr 0.05 --method cutmix", "cutmix"),
    ("samix", "--lr 0.05 --block_lr 0.05 --method mixup", "mixup")])
def test_mixing_is_compiled(tmp_path, room, words, compiled, monkeypatch):
    names = set()

    @functools.cache
    def stand_in(function):
        names.add(function.__name__)
        return torch.compile(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(runtime, "_compile", stand_in)
    monkeypatch.setattr(runtime, "check_machine", lambda *args: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: None)
    folders = {}
    for flag in ("False", "True"):
        torch._dynamo.reset()
        main = importlib.import_module(f"{room}.main").main
        main([*SMALL.split(), *words.split(), "--compile", flag, "--root_dir",
              str(tmp_path / flag)])
        folders[flag] = next((tmp_path / flag).iterdir())
    assert names == set(compiled.split())
    assert same(weights(folders["False"]), weights(folders["True"]))
