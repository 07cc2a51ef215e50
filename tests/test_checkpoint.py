"""Checkpoints survive what happens to files; a run folder is written whole, by one run."""
import builtins
import errno
import fcntl
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common import checkpoint, distributed, files, plots, runtime
from common.errors import RunError, Stopped
from common.run import Run, StepSums

CPU = torch.device("cpu")
INFO = SimpleNamespace(name="set", num_classes=2, fingerprint="0", image_size=8, width=8,
                       mean=(0.5,) * 3, std=(0.2,) * 3, classes=["a", "b"])


def state(value):
    return {"model": {"w": torch.full((1000,), float(value))}, "identity": {"arch": "a"},
            "epoch": value, "args": {}}


def test_pictures_replace_regular_files_alone(tmp_path):
    figure = plots.new_figure(3, 3)
    figure.suptitle("classes $a_b and x$^{")                # no mathematics
    plots.save_figure(figure, tmp_path / "a.png")
    plots.save_figure(figure, tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("folder.png", "pipe.png", "link.png"):
        with pytest.raises(RunError, match=f"{name} is no regular file"):
            plots.save_figure(figure, tmp_path / name)
        assert not (tmp_path / name).is_file()


def test_save_keeps_the_one_before(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, state(value))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.prev.pt")["epoch"] == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


def test_a_run_without_its_checkpoints_is_not_overwritten(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    checkpoint.save(other, state(1))
    (run / "log.csv").write_text("epoch\n1\n")              # killed before its first checkpoint
    assert checkpoint.resume("auto", run) is None
    with pytest.raises(RunError, match="run holds a run without its checkpoints: --job_name"):
        checkpoint.resume("", run)
    assert checkpoint.resume(str(other / "checkpoint.pt"), run)["epoch"] == 1
    (run / "log.csv").write_text("epoch\n1\n2\n")
    with pytest.raises(RunError, match="holds a run without its checkpoints"):
        checkpoint.resume("auto", run)
    with pytest.raises(RunError, match="would be overwritten"):
        checkpoint.resume(str(other / "checkpoint.pt"), run)


def test_a_disk_that_fails_on_the_newest_falls_back(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    read = Path.read_bytes

    def fail(path):
        if path.name == "checkpoint.pt":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(RunError, match="checkpoint.pt: Input/output error"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert checkpoint.resume("auto", tmp_path)["epoch"] == 1


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
    assert (tmp_path / "checkpoint.damaged.pt").exists() == (harm != "gone")
    checkpoint.save(tmp_path, state(3))                     # the good one before stays
    assert checkpoint.load(tmp_path / "checkpoint.prev.pt")["epoch"] == 1
    path.write_bytes(content[:-700])
    with pytest.raises(RunError, match="checkpoint.pt is damaged"):
        checkpoint.resume(str(path), tmp_path)


def test_every_bit_counts(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(tmp_path, {"model": {"w": torch.ones(2)}, "identity": {}})
    content = path.read_bytes()
    assert torch.load(path, weights_only=True)["model"]["w"].sum() == 2     # others can read it
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])
        with pytest.raises(RunError, match="is damaged or no checkpoint"):
            checkpoint.load(path)


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

    checkpoint.save(tmp_path, {"model": Harm(), "identity": {}})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harmed").exists()


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="could not be written: No space left"):
        checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_other_network_or_data_is_named():
    with pytest.raises(RunError, match="arch a .here b."):
        checkpoint.check_identity(state(1), {"arch": "b"})
    checkpoint.check_identity(state(1), {"arch": "a"})


def make_run(root, **flags):
    args = SimpleNamespace(**{"root_dir": str(root), "resume": "", "max_steps": None, "epochs": 3,
                              "evaluate": "", "tensorboard": False, "batch_size": 10, "arch": "a",
                              "initial_channels": 16, "seed": 0, "job_name": "",
                              "val_split": None, "corruptions": None, "print_freq": 100} | flags)
    return Run(args, CPU, INFO, ["run", ""], model=torch.nn.Linear(2, 2))


def test_run_folder_is_held_by_one_run(tmp_path):
    run = make_run(tmp_path)
    run.start()
    with pytest.raises(RunError, match="another run is writing"):
        make_run(tmp_path).start()
    run.finish("run", lambda path: None)                    # though the object is still there
    make_run(tmp_path).start()


def test_a_disk_without_locks_and_a_program_s_own_folder(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(sys, "argv", ["main.py", "--flag"])
    monkeypatch.chdir(ROOT / "sage")
    run = make_run(tmp_path)
    run.start()
    assert "sage/main.py --flag" in json.loads((run.folder / "args.json").read_text())["command"]


def test_flags_that_changed_are_named(tmp_path, capsys):
    run = make_run(tmp_path, lr=0.1, workers=2)
    run.start()
    end_epoch(run, 50.0)
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    run = make_run(tmp_path, lr=0.2, workers=3, resume="auto", new_flag=1)
    run.start()
    assert capsys.readouterr().err == \
        "warning: going on with other settings than before: --lr 0.1 -> 0.2\n"
    assert json.loads((run.folder / "args.json").read_text())["changed"] == {"lr": "0.1 -> 0.2"}


def test_other_threads_and_processes_are_named(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path, loader="dali")
    run.start()
    end_epoch(run, 50.0)
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "total", lambda value: 2 * value)
    make_run(tmp_path, resume="auto", loader="torch").start()
    error = capsys.readouterr().err
    assert "--loader dali -> torch, processes 1 -> 2, threads " in error and "-> 77" in error


def test_a_child_does_not_hold_the_folder(tmp_path):
    run = make_run(tmp_path)
    run.start()
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b".")
        signal.pause()
    os.read(ready, 1)
    try:
        run.lock.close()                # as when this process were killed
        make_run(tmp_path).start()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_optimizer_keeps_this_runs_settings_but_for_the_rate(tmp_path):
    for decay in (0.1, 0.2):
        run = make_run(tmp_path, resume="auto")
        optimizer = run.parts["optimizer"] = torch.optim.SGD(
            run.parts["model"].parameters(), lr=1.0, weight_decay=decay)
        run.start()
        assert optimizer.param_groups[0]["lr"] == (1.0 if decay == 0.1 else 0.5)
        assert optimizer.param_groups[0]["weight_decay"] == decay
        optimizer.param_groups[0]["lr"] = 0.5               # the loop does
        end_epoch(run, 50.0)
        fcntl.flock(run.lock, fcntl.LOCK_UN)


def test_a_trials_last_epoch_is_evaluated_again(tmp_path):
    trial = make_run(tmp_path, max_steps=1)
    trial.start()
    trial.steps_left = 0
    end_epoch(trial, 99.0)
    assert (trial.epoch, trial.step, len(trial.history)) == (0, 1, 1) and trial.over
    fcntl.flock(trial.lock, fcntl.LOCK_UN)
    run = make_run(tmp_path, resume="auto")
    run.start()
    assert (run.epoch, run.step, run.history) == (0, 1, [])


def test_signals_are_noted_from_the_start_on(tmp_path):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run = make_run(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL       # --evaluate stops at once
    run.start()
    assert signal.getsignal(signal.SIGTERM) == run.stop.note
    for epoch in range(3):                                  # Ctrl-C: until all epochs are done
        assert signal.getsignal(signal.SIGINT) == run.stop.note
        end_epoch(run, 50.0 + epoch)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run.lock.close()
    make_run(tmp_path, resume="auto").start()               # done: its evaluation alone is left
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_in_the_last_epochs_evaluation_ends_the_program(tmp_path):
    run = make_run(tmp_path)
    run.start()
    run.epoch = run.args.epochs - 1
    run.stop.note(signal.SIGTERM, None)
    with pytest.raises(Stopped, match="SIGTERM: stopped after the last step") as end:
        end_epoch(run, 50.0)
    assert end.value.args[1] == 128 + signal.SIGTERM
    assert checkpoint.load(run.folder / "checkpoint.pt")["epoch"] == run.args.epochs


def test_all_devices_of_a_run_are_noted(tmp_path, monkeypatch):
    for name in ("first", "second", "second"):
        monkeypatch.setattr(runtime, "hardware", lambda device, name=name: name)
        run = make_run(tmp_path, resume="auto")
        run.start()
        end_epoch(run, 50.0)
        run.lock.close()
    facts = json.loads((run.folder / "args.json").read_text())
    assert (facts["devices"], facts["changed"]) == (["first", "second"], {})


def end_epoch(run, accuracy, **row):
    run.step = run.epoch_steps = 1
    run.sums, run.timing = StepSums(1, CPU), {"seconds": 1.0}
    run.end_epoch({"test_accuracy": accuracy} | row, accuracy)


def test_a_trial_is_never_the_best(tmp_path):
    trial = make_run(tmp_path, max_steps=1)
    trial.start()
    end_epoch(trial, 99.0)
    assert checkpoint.load(trial.folder / "best.pt")["accuracy"] == 99
    fcntl.flock(trial.lock, fcntl.LOCK_UN)
    run = make_run(tmp_path, resume="auto")
    run.start()
    end_epoch(run, 50.0)
    assert checkpoint.load(run.folder / "best.pt")["accuracy"] == 50
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    trial = make_run(tmp_path, resume="auto", max_steps=1)
    trial.start()
    end_epoch(trial, 99.0)
    assert checkpoint.load(run.folder / "best.pt")["accuracy"] == 50


def test_hardware_that_trains_nothing_has_not_changed(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, epochs=2)
    run.start()
    end_epoch(run, 50.0)
    run.lock.close()
    state = checkpoint.load(run.folder / "checkpoint.pt")
    state["args"]["hardware"] = "cpu"                       # as older ones say
    checkpoint.save(run.folder, state)
    run = make_run(tmp_path, resume="auto", epochs=2)
    run.start()
    end_epoch(run, 50.0)
    run.lock.close()
    monkeypatch.setattr(runtime, "hardware", lambda device: "another")
    make_run(tmp_path, resume="auto", epochs=2).start()     # done: it evaluates alone
    assert capsys.readouterr().err == ""


def test_what_a_trial_measured_of_whole_epochs_is_not_kept(tmp_path):
    trial = make_run(tmp_path, max_steps=2)
    trial.start()
    for accuracy in (99.0, 98.0):
        end_epoch(trial, accuracy, train_loss=2.0, mask_mean=0.5, knn_accuracy=9.0)
    assert "2,98,2,0.5,9,1" in (trial.folder / "log.csv").read_text()
    trial.lock.close()
    run = make_run(tmp_path, resume="auto")
    run.start()
    assert run.history == [{"epoch": epoch, "seconds": 1.0, "train_loss": 2.0, "mask_mean": 0.5}
                           for epoch in (0, 1)]
    end_epoch(run, 50.0)
    assert run.history[2]["test_accuracy"] == 50 and run.column("test_accuracy") == [50.0]


def test_other_data_of_these_classes_are_evaluated(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    run.start()
    end_epoch(run, 50.0)
    monkeypatch.setattr(INFO, "name", "other")
    monkeypatch.setattr(INFO, "fingerprint", "1")
    again = make_run(tmp_path, evaluate=str(run.folder / "best.pt"))
    assert again.load_weights() == run.folder / "best.pt"
    assert "not the data of the checkpoint's run" in capsys.readouterr().err
    with pytest.raises(RunError, match="dataset set .here other"):
        make_run(tmp_path, resume=str(run.folder / "checkpoint.pt")).load_weights()


@pytest.mark.parametrize("harm", ["weight", "loss"])
def test_what_is_not_finite_is_not_saved(tmp_path, harm):
    run = make_run(tmp_path)
    run.start()
    end_epoch(run, 50.0)
    before = (run.folder / "checkpoint.pt").read_bytes(), (run.folder / "log.csv").read_bytes()
    if harm == "weight":
        run.parts["model"].bias.data[1] = float("nan")
    with pytest.raises(RunError, match="at epoch 2, after step 1; nothing was saved"):
        end_epoch(run, 60.0, test_loss=float("inf") if harm == "loss" else 1.0)
    assert before == ((run.folder / "checkpoint.pt").read_bytes(),
                      (run.folder / "log.csv").read_bytes())
    assert checkpoint.load(run.folder / "best.pt")["accuracy"] == 50


def test_ranks_must_see_the_same_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "total", lambda position: position + torch.tensor([4, 0]))
    with pytest.raises(RunError, match="a disk that all machines share"):
        make_run(tmp_path).start()


def test_parts_that_do_not_fit_are_named(tmp_path):
    run = make_run(tmp_path)
    run.start()
    run.save()
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    again = make_run(tmp_path, resume="auto")
    again.parts["momentum"] = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match="checkpoint's momentum does not fit"):
        again.start()


def test_a_resumed_optimizer_follows_the_flags(tmp_path):
    run, groups = make_run(tmp_path), []
    for number, decay in ((0, 0.1), (1, 0.3)):
        model = run.parts["model"]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=decay)
        run.parts["optimizer"] = optimizer
        run.start()
        if number == 0:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            run.save()
            fcntl.flock(run.lock, fcntl.LOCK_UN)
            run = make_run(tmp_path, resume="auto")
        groups.append(optimizer)
    assert groups[1].param_groups[0]["weight_decay"] == 0.3
    momentum = [[state["momentum_buffer"] for state in optimizer.state.values()]
                for optimizer in groups]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True)) and len(momentum[1]) == 2


def test_evaluation_of_another_shape_is_named(tmp_path):
    run = make_run(tmp_path)
    run.start()
    run.save()
    again = make_run(tmp_path, evaluate=str(run.folder / "checkpoint.pt"))
    again.parts["model"] = torch.nn.Linear(2, 3)
    with pytest.raises(RunError, match="checkpoint's model does not fit this run's .size mismatch"):
        again.load_weights()


def test_a_run_that_is_done_is_not_rewritten(tmp_path):
    run = make_run(tmp_path, epochs=3, batch_size=10)
    run.start()
    run.epoch = 3
    run.save()
    facts = run.folder / "args.json"
    before = facts.read_text()
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    for flags in ({"batch_size": 20}, {"max_steps": 2}):
        with pytest.raises(RunError, match="this run is done; other flags or --max_steps need"):
            make_run(tmp_path, resume="auto", **flags).start()
        assert facts.read_text() == before
    more = make_run(tmp_path, resume="auto", epochs=4)      # goes on
    more.start()
    assert not more.over


def test_other_data_than_the_checkpoints_are_said(tmp_path, capsys):
    run = make_run(tmp_path)
    run.start()
    run.save()
    words = {"evaluate": str(run.folder / "checkpoint.pt")}
    make_run(tmp_path, **words).load_weights()
    assert "not the data" not in capsys.readouterr().err
    again = make_run(tmp_path, **words)
    again.info = SimpleNamespace(**vars(INFO) | {"fingerprint": "another"})
    again.load_weights()
    assert "these are not the data of the checkpoint's run" in capsys.readouterr().err


def test_a_trial_forecasts_nothing(tmp_path):
    for steps, words in ((None, "00:0"), (3, "")):
        run = make_run(tmp_path, max_steps=steps)
        run.begun = (time.perf_counter() - 1, 0)
        assert run.left(1).startswith(words) and bool(run.left(1)) == bool(words)


def test_a_file_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), files.whole(tmp_path / "a") as new:
        new.write_text("half")
        raise ValueError
    assert not list(tmp_path.iterdir())
    files.write_atomic(tmp_path / "a", "Bücher ×")
    assert (tmp_path / "a").read_bytes() == "Bücher ×".encode()


@pytest.mark.parametrize("newest", ["gone", "damaged", "whole"])
@pytest.mark.parametrize("flags", [{"evaluate": "auto"}, {}])       # the second: --preview
def test_auto_is_the_newest_valid_checkpoint(tmp_path, newest, flags, capsys):
    run = make_run(tmp_path)
    run.start()
    run.save()
    run.epoch = 2
    run.save()
    file = run.folder / "checkpoint.pt"
    if newest == "gone":
        file.unlink()
    elif newest == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    again = make_run(tmp_path, resume="auto", **flags)
    name = "checkpoint.pt" if newest == "whole" else "checkpoint.prev.pt"
    assert again.load_weights() == run.folder / name


def test_run_logs_epochs_and_goes_on(tmp_path):
    run = make_run(tmp_path, tensorboard=True)
    run.start(places=6)

    class Loader(list):
        def set_epoch(self, epoch, step):
            self.place = epoch, step

    loader = Loader([None, None])
    for epoch in range(2):
        for step, _ in run.steps(loader):
            run.sums.add(step, torch.tensor(1.0), torch.eye(2), torch.tensor([0, step]))
        assert run.sums.result() == {"train_loss": 1.0, "train_accuracy": 75.0}
        run.end_epoch({"train_loss": 1 / (epoch + 1), "test_accuracy": 50.0 + epoch}, 50.0 - epoch)
    assert loader.place == (1, 0) and not run.over
    lines = (run.folder / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,test_accuracy,seconds,images_per_second"
    rows = [list(map(float, line.split(","))) for line in lines[1:]]
    assert [row[:3] for row in rows] == [[1, 1, 50], [2, 0.5, 51]]
    for *_, seconds, speed in rows:                     # of two steps of the flags' batch size
        assert seconds * speed == pytest.approx(2 * run.args.batch_size, rel=1e-4)
    plots.curves(run.folder / "curves.png", "title", run.history)
    assert (run.folder / "curves.png").stat().st_size > 5000
    assert list((run.folder / "tensorboard").iterdir())
    assert json.loads((run.folder / "args.json").read_text())["parameters"] == 6
    assert checkpoint.load(run.folder / "best.pt")["accuracy"] == 50    # the better of the two
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    again = make_run(tmp_path, resume="auto")
    again.start()
    assert (again.epoch, again.step, again.best, again.history) == (2, 0, 50.0, run.history)


def test_report_is_the_median_of_the_last_ten(tmp_path):
    run = make_run(tmp_path)
    run.history = [{"test_accuracy": value, "seconds": 2.0}
                   for value in [10.0] * 5 + [70.0, 71.0, 72.0, 73.0, 74.0] * 2]
    assert "median of the last 10 epochs: 72.00 % (± 2.00); best 74.00 %" in run.report()


def test_epoch_sums_name_the_step_of_a_nan():
    sums = StepSums(6, torch.device("cpu"))
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    for step in range(4):
        sums.add(step, torch.tensor(2.0 + step), logits, labels)
    sums.check(epoch=7)
    assert sums.result() == {"train_loss": 3.5, "train_accuracy": 75.0}
    resumed = StepSums(6, torch.device("cpu"), sums.state())
    resumed.add(4, torch.tensor(torch.nan), logits, labels)
    resumed.add(5, torch.tensor(1.0), logits, labels)
    with pytest.raises(RunError, match="nan at epoch 8, step 5"):
        resumed.check(epoch=7)
