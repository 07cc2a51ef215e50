"""Flags, seeds and exits that all programs share."""
import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common import distributed, flags, models, runtime
from common.errors import DataError, RunError
from tests.conftest import ROOT


def test_step_randomness_depends_on_its_number_alone():
    def draws(*place):
        generator = distributed.step_generator(*place)
        return torch.rand(3, generator=generator).tolist() + torch.rand(3).tolist()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    places = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 0)]
    assert len({tuple(draws(*place)) for place in places}) == len(places)


def test_booleans_keep_the_papers_forms():
    parser = argparse.ArgumentParser()
    flags.add_boolean(parser.add_argument, "--log_off", False, "")
    parsed = [parser.parse_args(line.split()).log_off for line in
              ("", "--log_off", "--log_off True", "--log_off false", "--log_off 1", "--log_off no")]
    assert parsed == [False, True, True, False, True, False]
    with pytest.raises(SystemExit):
        parser.parse_args(["--log_off", "maybe"])


@pytest.mark.parametrize("fault, code, line", [
    (DataError("a.npz: damaged"), 1, "error: a.npz: damaged"),
    (OSError(28, "No space left on device", "x/log.csv"), 1, "x/log.csv: No space left"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "full (CUDA out of memory): lower --batch"),
    (MemoryError("Unable to allocate 9 GiB"), 1, "full (Unable to allocate 9 GiB): lower"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (None, 0, "")])
def test_known_faults_are_one_line(capsys, fault, code, line):
    def main():
        if fault:
            raise fault

    with pytest.raises(SystemExit) as end:
        runtime.launch(main)
    error = capsys.readouterr().err
    assert end.value.code == code and line in error and error.count("\n") <= 1


@pytest.mark.parametrize("kind, text, allowed", [
    (flags.positive, "1", True), (flags.positive, "0", False), (flags.positive, "1.5", False),
    (flags.count, "0", True), (flags.count, "-1", False), (flags.amount, "1e-4", True),
    (flags.amount, "nan", False), (flags.amount, "inf", False), (flags.amount, "-1", False),
    (flags.share, "1", True), (flags.share, "1.01", False), (flags.share, "x", False),
    (flags.number(above=0), "0", False), (flags.number(above=0), "0.1", True)])
def test_numbers_have_bounds(kind, text, allowed):
    if allowed:
        assert kind(text) == float(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            kind(text)


def settings(**changed):
    return SimpleNamespace(**{"device": "cpu", "amp": "off", "seed": 0, "channels_last": True,
                              "compile": False, "loader": "auto"} | changed)


CPU = torch.device("cpu")


@pytest.mark.parametrize("environment, line", [
    ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID"), ({"RANK": "0"}, "WORLD_SIZE"),
    ({"LOCAL_RANK": "abc"}, "'abc'")])
def test_a_launcher_s_broken_environment_is_one_line(tmp_path, environment, line):
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom types import SimpleNamespace\n"
            "from common import runtime\nruntime.launch(lambda: runtime.setup(SimpleNamespace("
            "device='cpu', amp='off', seed=0, loader='torch', compile=False)))")
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path,
                            capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and line in result.stderr


def test_a_shell_under_slurm_is_one_process(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    runtime.setup(settings())
    assert distributed.world() == 1


def test_every_program_has_the_common_flags(capsys):
    parser = flags.Parser("doc")
    flags.add_flags(parser, ["digits"], ["net"], {"lr": ["--init_lr"]}, lr=0.1)
    args = parser.parse_args("--init_lr 0.2 --seed -3 --compile".split())
    assert (args.lr, args.seed, args.compile, args.momentum) == (0.2, -3, True, 0.9)
    assert (args.epochs, args.initial_channels, args.device) == (None, 64, "auto")
    args = parser.parse_args("--cam a.png --compile".split())
    assert (args.evaluate, args.compile) == ("auto", False)     # its hooks see every module
    capsys.readouterr()
    for words in ("--seed 99999999999999999999", "--dataset other", "--arch other", "--lr 1x"):
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())
        assert capsys.readouterr().err.count("\n") == 2, words
    for words in (["--evaluate", ""], ["--resume="], ["--data_dir", ""], ["--preview", ""]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert "an empty string is no path" in capsys.readouterr().err
    for words in (["--preview", "out"], ["--cam", "out.abc"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert "is no name of a picture" in capsys.readouterr().err


@pytest.mark.parametrize("program, words, warnings", [
    ("sage.main", "--method cutmix --in_batch True --rand_pos 0.01 --kernel_size 3",
     ["--kernel_size --rand_pos: no effect without --method sage"]),
    ("sage.main", "--clean_lam 0.5 --beta 1 --m_beta 1 --in_batch True", [
        "--in_batch: no effect without a method that has it",
        "--clean_lam: no effect without --method puzzle or comix",
        "--beta: no effect without --method puzzle", "--m_beta: no effect without --method comix"]),
    ("sage.main", "--mixup_alpha 2 --mix_scheduled_epoch 9", [
        "--mixup_alpha: no effect without a method that has it",
        "--mix_scheduled_epoch: no effect without --mix_schedule"]),
    ("sage.main", "--method puzzle --adv_eps 8 --transport False --t_eps 1", [
        "--adv_eps: no effect without --adv_p", "--t_eps: no effect without --transport"]),
    ("sage.main", "--method puzzle --adv_p 0.1 --adv_eps 8 --t_eps 1 --mixup_alpha 2", []),
    ("sage.main", "--comix True --clean_lam 0.5 --m_beta 1 --solver device", []),
    ("sage.main", "--train sage --rand_pos 0.01 --prob_mix 0.5", []),
    ("sage.main", "--prob_mix 0.5 --mix_schedule delayed", [
        "--prob_mix --mix_schedule: no effect without a method that mixes"]),
    ("sage.main", "--method puzzle --solver device --mp 3", [
        "--mp: no effect without --solver gco"]),
    ("safuse.main", "--method occamix --Burn_prob 0.3 --cells 2 --N_min 20", [
        "--p_binom: no effect without --method safuse or lgcoamix"]),
    ("safuse.main", "--method baseline --cutmix_prob 1 --N_min 20 --cells 2", [
        "--cutmix_prob: no effect without --method safuse, lgcoamix, occamix or cutmix",
        "--N_min: no effect without --method safuse, lgcoamix or occamix",
        "--cells: no effect without --method occamix"]),
    ("safuse.main", "--temp 0.5 --cutmix_prob 1 --p_binom 0.3 --N_min 20", []),
    ("samix.main", "--method vanilla --block_lr 1 --ema_start 0.2 --lam_mul_k 1", [
        "--lam_mul_k: no effect without --method samix",
        "--block_lr --ema_start: no effect without --method samix or automix"]),
    ("samix.main", "--method cutmix --layer 2", [
        "--layer: no effect without --method samix or automix"]),
    ("samix.main", "--method vanilla --alpha 1 --warmup_ratio 0.1 --optimizer adamw --momentum 0.8",
     ["--alpha: no effect without a method that mixes",
      "--warmup_ratio: no effect without --warmup_epochs",
      "--momentum: no effect without --optimizer sgd"]),
    ("samix.main", "--neg_weight 0.2 --warmup_epochs 3 --warmup_ratio 0.1", [
        "--neg_weight: no effect without --head bce"]),
    ("samix.main", "--lam_concat False --mask_loss 1", [
        "--lam_concat: no effect without --method automix"]),
    ("samix.main", "--method automix --lam_concat True --mask_loss 1 --head bce", []),
    ("samix.pretrain", "--method moco --mask_loss 1 --ema 0.9", [
        "--mask_loss: no effect without --method samix"]),
    ("soft_aug.main", "--crop 4 --pcrop 3 --pnoise 2 --bgnoise 2 --a 0.2 --rw off --no-soften "
     "--g 1 --ft 0 --r 5",
     ["--r: no effect without --ft",
      "--ft: no effect without --da 1, --da 2, --noise or --mixup",
      "--crop: no effect without --da 2",
      "--bgnoise: no effect without --noise",
      "--pcrop: no effect without --da 2 --loss st",
      "--pnoise: no effect without --noise --loss st",
      "--a: no effect without --mixup", "--rw --no-soften: no effect without --loss st",
      "--g: no effect without --loss fl"]),
    ("soft_aug.main", "--loss st", ["--loss: no effect without --da 2 or --noise"]),
    ("soft_aug.main", "--loss st --other --noise 1", []),
    ("soft_aug.main", "--method soft+ra --crop 4 --pcrop 3 --bgcrop 1 --rw sample --no-soften", []),
    ("resizemix.main", "--method baseline --cutmix_beta 2 --resizemix_low 0.2", [
        "--cutmix_beta: no effect without --cutmix_prob",
        "--resizemix_low: no effect without --resizemix"]),
    ("resizemix.main", "--evaluate --meas_lat", ["--meas_lat: no effect without training"]),
    ("resizemix.main", "--cam a.png --compile", [
        "--compile: no effect without training or --evaluate"]),
    ("safuse.main", "--device cpu --gpu_ids 0,1", ["--gpu_ids: no effect without a GPU"]),
    ("resizemix.main", "--port 999", ["--port: no effect without --launcher slurm"]),
    ("resizemix.main", "--warmup_epochs 0 --warmup_start_lr 0.1", [
        "--warmup_start_lr: no effect without --warmup_epochs"]),
    ("resizemix.main", "--warmup_start_lr 0.1 --cutmix_prob 0.5 --cutmix_beta 2", []),
    ("resizemix.main", "--resizemix_low 0.2", [])])
def test_flags_without_effect_are_said(capsys, monkeypatch, program, words, warnings):
    parse_args = importlib.import_module(program).parse_args
    parse_args(words.split())
    said = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert sorted(said) == sorted(f"warning: {line}" for line in warnings)
    monkeypatch.setenv("RANK", "1")                         # of torchrun: rank 0 alone says it
    parse_args(words.split())
    assert "warning:" not in capsys.readouterr().err


def test_typos_get_the_flag_that_was_meant(capsys):
    parser = flags.Parser("doc")
    flags.add_flags(parser, ["digits"], ["net"], {"lr": ["--init_lr"]}, lr=0.1)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epohcs", "3"])
    assert "unrecognized arguments: --epohcs 3; did you mean --epochs?" in capsys.readouterr().err


def test_help_shows_what_a_configuration_sets(capsys):
    parser = flags.Parser(None)                             # no docstring under python -OO
    flags.add_flags(parser, ["digits"], ["net"], {})
    assert parser.peek(["--help", "--epochs", "3"]).epochs == 3
    parser.set_defaults(epochs=77)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    help = capsys.readouterr().out
    assert "(default: 77)" in help and "None" not in help


@pytest.mark.parametrize("supported, x86, own, expected", [
    (True, "x86_64", True, True), (True, "x86_64", False, False), (False, "x86_64", True, False),
    (True, "aarch64", False, True)])
def test_emulated_bf16_is_said(monkeypatch, capsys, supported, x86, own, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(runtime.platform, "machine", lambda: x86)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: own)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    runtime.setup(settings(amp="bf16"))
    error = capsys.readouterr().err
    assert error.count("\n") == (not expected) == error.count("emulated and many times slower")


def test_machines_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runtime.cores() == os.cpu_count()


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match="'no-such-compiler' is not on the PATH"):
        runtime.setup(settings(compile=True))


def test_gpus_that_are_not_there_are_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime.use_gpus(8)
    assert "8 GPUs asked for, none is there" in capsys.readouterr().err


def test_missing_dali_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="DALI is not installed"):
        runtime.setup(settings(loader="dali"))


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("size", [48, 56])
def test_narrow_networks_run_on_the_cpu(channels, size):
    net = models.build("preactresnet18", 10, size, initial_channels=channels)
    net, _ = runtime.prepare(net, settings(), CPU)
    net(torch.randn(4, 3, size, size)).sum().backward()     # in channels last torch crashes


def layouts(net, words, images):
    """The memory formats of what the convolutions really get, where the two formats differ."""
    seen, convolve = set(), torch.nn.Conv2d._conv_forward

    def note(part, inputs, weight, bias):
        for tensor in (inputs, weight):
            if tensor.shape[1] > 1 and tensor.shape[-1] > 1:
                seen.add("last" if tensor.is_contiguous(memory_format=torch.channels_last)
                         else "contiguous" if tensor.is_contiguous() else "other")
        return convolve(part, inputs, weight, bias)

    net, _ = runtime.prepare(net, settings(**words), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "_conv_forward", note)
        net(images.requires_grad_()).sum().backward()
    return seen


@pytest.mark.parametrize("name, channels, flag, layout", [
    ("preactresnet18", 16, True, "last"), ("preactresnet18", 16, False, "contiguous"),
    ("preactresnet18", 8, True, "contiguous"), ("wrn28_2", 8, True, "contiguous"),
    ("wrn28_2", 64, True, "last"), ("resnet18", 4, True, "contiguous")])
def test_convolutions_see_one_memory_format(name, channels, flag, layout, capsys):
    """Whatever the batch's strides: those of a loader (bytes of pixels) are channels last."""
    batch = torch.randn(4, 16, 16, 3).permute(0, 3, 1, 2)
    for images in (batch, batch.contiguous()):
        net = models.build(name, 10, 16, initial_channels=channels)
        seen = layouts(net, {"channels_last": flag}, images)
        assert seen - {"contiguous"} == ({"last"} if layout == "last" else set())
        said = capsys.readouterr().out
        assert f"memory format: {'channels last' if layout == 'last' else 'contiguous'}" in said


def test_narrow_convolutions_are_known():
    def conv(*sizes, **words):
        return runtime.is_narrow(torch.nn.Conv2d(*sizes, **words))

    assert conv(4, 8, 1, stride=2) and conv(16, 8, 3) and conv(8, 16, 3) and conv(3, 8, 3)
    assert not conv(3, 16, 3) and not conv(16, 16, 1, stride=2) and not conv(16, 1, 1)
    assert not runtime.is_narrow(torch.nn.Linear(4, 4))


def test_unforeseen_faults_are_one_line_and_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "traceback_folder", tmp_path)
    with pytest.raises(SystemExit) as end:
        runtime.launch(lambda: [][1])
    path = tmp_path / "error.txt"
    assert end.value.code == 1 and capsys.readouterr().err == \
        f"error: IndexError: list index out of range; details in {path}\n"
    assert "Traceback" in path.read_text()
    monkeypatch.setattr(runtime, "traceback_folder", tmp_path / "none")
    with pytest.raises(SystemExit):
        runtime.launch(lambda: [][1])
    assert capsys.readouterr().err.endswith("; --debug shows where\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--debug"])
    with pytest.raises(IndexError):
        runtime.launch(lambda: [][1])


# --------------------------------------------------------------------------- bounds of the flags

BOUNDS = {                              # values that a program's flags refuse
    "sage.main":
        "--rand_pos 1.5; --blur_sigma 0; --mix_scheduled_epoch 0; --learning_rate -1; "
        "--decay nan; --max_steps 0",
    "resizemix.main":
        "--initial_channels 1; --resizemix_high 2; --cutmix_prob 2; --cutmix_beta 0; "
        "--padding -1; --min_scale -1; --min_scale 5; --init_lr -1; --min_lr -1; "
        "--warmup_start_lr -1; --momentum -1; --weight_decay -1; --restart_epochs 0; "
        "--restart_epochs -3; --seed 99999999999999999999; --lr_schedule step "
        "--milestones -3; --lr_schedule step --gamma -1",
    "safuse.main":
        "--N_min 25.5; --topN_local_ratio 0; --topN_local_ratio 1.5; --temp 0; --p_binom "
        "2",
    "soft_aug.main":
        "--max_p 0; --max_p 1.1; --sch inf; --sch nan; --sch 1e300; --r 0; --r nan; "
        "--crop -1; --crop inf; --mixup --a nan; --pcrop -1; --bgcrop -1; --l -1; --noise "
        "-1; --g -1; --learning_rate -1; --momentum -1; --wd -1; --gamma -1; --decay s "
        "--milestones -3; --seed 99999999999999999999; --initial_channels 1",
    "samix.main":
        "--alpha -1; --dropout 2",
    "samix.pretrain":
        "--temperature 0; --queue 0; --ema 2",
}


@pytest.mark.parametrize("program", BOUNDS)
def test_values_out_of_bounds_are_named(program, capsys):
    for words in BOUNDS[program].split("; "):
        *_, flag, value = words.split()
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(program).parse_args(words.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2, words
        wanted = rf"argument .*{flag}\b.*: '{re.escape(value)}' is not an? (number|integer)"
        assert re.search(wanted, error), error
