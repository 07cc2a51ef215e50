"""Flags, seeds and exits that all programs share."""
import argparse

import pytest
import torch

from common import runtime


def test_step_randomness_depends_on_its_number_alone():
    def draws(*place):
        generator = runtime.step_generator(*place)
        return torch.rand(3, generator=generator).tolist() + torch.rand(3).tolist()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    places = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 0)]
    assert len({tuple(draws(*place)) for place in places}) == len(places)


def test_booleans_keep_the_papers_forms():
    parser = argparse.ArgumentParser()
    runtime.add_boolean(parser, "--log_off", False, "")
    parsed = [parser.parse_args(line.split()).log_off for line in
              ("", "--log_off", "--log_off True", "--log_off false", "--log_off 1", "--log_off no")]
    assert parsed == [False, True, True, False, True, False]
    with pytest.raises(SystemExit):
        parser.parse_args(["--log_off", "maybe"])


@pytest.mark.parametrize("fault, code, line", [
    (runtime.DataError("a.npz: damaged"), 1, "error: a.npz: damaged"),
    (OSError(28, "No space left on device", "x/log.csv"), 1, "x/log.csv: No space left"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --batch_size"),
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


def test_a_defect_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        runtime.launch(lambda: [][1])
    assert end.value.code == 1 and "IndexError" in capsys.readouterr().err
