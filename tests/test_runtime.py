"""Flags, seeds and exits that all programs share."""
import argparse
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from common import distributed, flags, models, runtime
from common.errors import DataError, RunError


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
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "memory is full"),
    (KeyboardInterrupt(), 130, "stopped before training"),
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


@pytest.mark.parametrize("environment, line", [
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
     "needs MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "0"}, "needs WORLD_SIZE and MASTER_ADDR and MASTER_PORT")])
def test_incomplete_launchers_are_named(monkeypatch, environment, line):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")           # so that what setup adds is taken back
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=line):
        runtime.setup(settings())


def test_a_shell_under_slurm_is_one_process(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    runtime.setup(settings())
    assert distributed.world() == 1


def test_every_program_has_the_common_flags(capsys):
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, ["digits"], ["net"], {"lr": ["--init_lr"]}, lr=0.1)
    args = parser.parse_args("--init_lr 0.2 --seed -3 --compile".split())
    assert (args.lr, args.seed, args.compile, args.momentum) == (0.2, -3, True, 0.9)
    assert (args.epochs, args.initial_channels, args.device) == (None, 64, "auto")
    for words in ("--seed 99999999999999999999", "--dataset other", "--arch other",
                  "--job_name ../x"):
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())
    assert "'99999999999999999999' is not an integer" in capsys.readouterr().err


def test_missing_dali_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="DALI is not installed"):
        runtime.setup(settings(loader="dali"))


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("size", [48, 56])
def test_narrow_networks_run_on_the_cpu(channels, size):
    net = models.build("preactresnet18", 10, size, initial_channels=channels)
    net, _ = runtime.prepare(net, settings(), torch.device("cpu"))
    net(torch.randn(4, 3, size, size)).sum().backward()     # in channels last torch crashes


def test_a_defect_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        runtime.launch(lambda: [][1])
    assert end.value.code == 1 and "IndexError" in capsys.readouterr().err
