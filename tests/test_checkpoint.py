"""Checkpoints survive what happens to files; a run folder is written whole, by one run."""
import builtins
import errno
import fcntl
from types import SimpleNamespace

import pytest
import torch

from common import checkpoint, runlog
from common.runtime import RunError

CPU = torch.device("cpu")


def state(value):
    return {"model": {"w": torch.full((1000,), float(value))}, "identity": {"arch": "a"},
            "epoch": value}


def test_save_keeps_the_one_before(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, state(value))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.prev.pt")["epoch"] == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_damaged_newest_falls_back(tmp_path, harm, capsys):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                         # one bit, in a weight
    path.write_bytes({"flip": content, "cut": content[:-700], "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        path.unlink()
    assert checkpoint.resume("auto", tmp_path)["epoch"] == 1
    assert "checkpoint.prev.pt" in capsys.readouterr().err
    with pytest.raises(RunError, match="--resume .*checkpoint.prev.pt"):
        checkpoint.resume(str(path), tmp_path)


def test_fresh_start_overwrites_nothing(tmp_path):
    assert checkpoint.resume("", tmp_path) is None and checkpoint.resume("auto", tmp_path) is None
    checkpoint.save(tmp_path, state(1))
    with pytest.raises(RunError, match="already holds a run"):
        checkpoint.resume("", tmp_path)
    with pytest.raises(RunError, match="no such checkpoint"):
        checkpoint.resume(str(tmp_path / "other.pt"), tmp_path)


def test_no_code_runs_from_a_checkpoint(tmp_path):
    class Harm:
        def __reduce__(self):
            return builtins.open, (str(tmp_path / "harmed"), "w")

    torch.save({"model": Harm(), "identity": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="damaged or no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harmed").exists()


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="disk is full"):
        checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_other_network_or_data_is_named():
    with pytest.raises(RunError, match="arch a .here b."):
        checkpoint.check_identity(state(1), {"arch": "b"})
    checkpoint.check_identity(state(1), {"arch": "a"})


def test_run_folder_is_held_by_one_run(tmp_path):
    log = runlog.RunLog(tmp_path / "run", SimpleNamespace(), CPU)
    with pytest.raises(RunError, match="another run is writing"):
        runlog.RunLog(tmp_path / "run", SimpleNamespace(), CPU)
    fcntl.flock(log.lock, fcntl.LOCK_UN)
    runlog.RunLog(tmp_path / "run", SimpleNamespace(), CPU)


def test_unwritable_root_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run cannot be written"):
        runlog.RunLog(tmp_path / "file" / "run", SimpleNamespace(), CPU)


def test_log_and_curves_follow_history(tmp_path):
    log = runlog.RunLog(tmp_path, SimpleNamespace(tensorboard=True), CPU)
    log.start(parameters=3)
    for epoch in range(3):
        log.add(epoch=epoch, train_loss=1 / (epoch + 1), test_accuracy=50.0 + epoch)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,test_accuracy" and lines[3] == "2,0.333333,52"
    assert log.draw_curves("title").stat().st_size > 5000
    assert list((tmp_path / "tensorboard").iterdir())
    again = runlog.RunLog(None, SimpleNamespace(), CPU, log.history)
    assert again.column("test_accuracy") == [50, 51, 52]


def test_report_is_the_median_of_the_last_ten():
    line = runlog.report([10.0] * 5 + [70.0, 71.0, 72.0, 73.0, 74.0] * 2, [2.0])
    assert "median of the last 10 epochs: 72.00 % (± 2.00); best 74.00 %" in line
