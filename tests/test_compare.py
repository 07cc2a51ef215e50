"""compare.py on hand-made runs, and the driver of all programs on a tiny set."""
import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
from bench import compare_methods
from PIL import Image

import compare
from common.data import sources
from common.errors import RunError

CONDITIONS = {"clean": 60, "visible 82 %": 50, "visible 47 %": 30, "fgsm 4/255": 20,
              "fgsm 8/255": 10, "fog 1": 40, "fog 2": 20}


def make_run(root, name, accuracies, program="sage", evaluation=True, **flags):
    folder = root / name
    folder.mkdir()
    args = {"method": "vanilla", "lr": 0.1, "seed": 1, "epochs": len(accuracies), "amp": "off",
            "data_dir": name, "milestones": [1, 2]} | flags
    (folder / "args.json").write_text(json.dumps(
        {"args": args, "command": f"python {program}/main.py", "gpu": None, "threads": 1,
         "tf32": name == "tf32", "data": "d", "fingerprint": "f", "torch": "2"}))
    (folder / "log.csv").write_text("epoch,test_accuracy,seconds\n" + "".join(
        f"{n + 1},{value},{n + 1}\n" for n, value in enumerate(accuracies)))
    if evaluation:
        (folder / "evaluation.csv").write_text("condition,accuracy,top5,loss,ece,count\n" + "".join(
            f"{name},{value},90,1,0.05,100\n" for name, value in CONDITIONS.items()))
    return str(folder)


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def compared(tmp_path, *runs):
    compare.main([*map(str, runs), "--csv", str(tmp_path / "t.csv"), "--picture",
                  str(tmp_path / "t.png")])
    return {row["run"]: row for row in rows_of(tmp_path / "t.csv")}


def test_two_runs_of_one_seed_count_once(tmp_path):
    runs = [make_run(tmp_path, f"{method}{n}", [value] * 3, seed=seed, method=method)
            for method, values in (("vanilla", (60, 62, 91)), ("sage", (70, 70, 90)))
            for n, (seed, value) in enumerate(zip((1, 1, 2), values, strict=True))]
    plain, mixed = compared(tmp_path, *runs).values()
    assert (plain["accuracy"], plain["accuracy spread"], plain["seeds"]) == ("76.0", "15.0", "2")
    assert (float(mixed["gain"]), float(mixed["gain spread"])) == (4, 5)        # 9 and -1


def test_what_is_no_seed_is_another_line(tmp_path):
    """Data, precision, compilation and a trial; plain training comes first in each data set."""
    make_run(tmp_path, "1", [10], method="sage")
    for name, flags in enumerate([{}, {"amp": "bf16"}, {"compile": True}, {"max_steps": 2}], 2):
        make_run(tmp_path, str(name), [10 * name], **flags)
    other = make_run(tmp_path, "6", [90], method="sage")
    args = tmp_path / "6" / "args.json"
    args.write_text(args.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"'))
    rows = compared(tmp_path, *sorted(tmp_path.glob("[0-9]")), other)
    assert [float(row["accuracy"]) for row in rows.values()] == [20, 30, 40, 50, 10, 90]
    assert [row["gain"] for row in rows.values()] == ["", "10.0", "20.0", "30.0", "-10.0", ""]
    assert any("data g" in name for name in rows) and any("amp bf16" in name for name in rows)


@pytest.mark.parametrize("flag", ["val_split", "labels_per_class", "valid_labels_per_class"])
def test_subsets_that_seeds_draw_are_one_line(tmp_path, flag):
    runs = [Path(make_run(tmp_path, str(seed), [50], seed=seed, job_id=seed, **{flag: 1}))
            for seed in (1, 2)]
    facts = (runs[1] / "args.json").read_text()
    (runs[1] / "args.json").write_text(facts.replace('"fingerprint": "f"', '"fingerprint": "g"'))
    assert [row["seeds"] for row in compared(tmp_path, *runs).values()] == ["2"]


def test_damaged_files_are_named_and_runs_without_accuracy_left_out(tmp_path, capsys):
    good, bad = Path(make_run(tmp_path, "a", [10])), Path(make_run(tmp_path, "b", [20], method="x"))
    for name, content in (("log.csv", "epoch,test_accuracy,seconds\n1,10"), ("args.json", "{}"),
                          ("evaluation.csv", "condition,accuracy,top5,loss,ece,count\n"),
                          ("evaluation.csv", "condition,accuracy\nclean,5\nfgsm 8/255,8.1")):
        whole = (bad / name).read_text()
        (bad / name).write_text(content)
        with pytest.raises(RunError, match=f"{bad}: damaged, or not a run's args.json, log.csv"):
            compared(tmp_path, good, bad)
        (bad / name).write_text(whole)
    (bad / "log.csv").write_text("epoch,train_loss,seconds\n1,2,3\n")      # self-supervised
    (tmp_path / "probe").mkdir()                            # without args.json
    (tmp_path / "a.txt").touch()                            # of experiments/*
    assert len(compared(tmp_path, good, bad, tmp_path / "probe", tmp_path / "a.txt")) == 1
    assert f"left out, no run with a test accuracy in its log.csv: {tmp_path / 'probe'}, " \
        f"{tmp_path / 'a.txt'}, {bad}" in capsys.readouterr().err
    with pytest.raises(RunError, match="nosuch: no such folder"):
        compared(tmp_path, good, tmp_path / "nosuch")


def test_what_makes_runs_unlike_is_said(tmp_path, capsys):
    full, trial = make_run(tmp_path, "a", [10]), make_run(tmp_path, "b", [90], max_steps=2)
    rows = (tmp_path / "b" / "evaluation.csv").read_text()
    (tmp_path / "b" / "evaluation.csv").write_text(rows.replace(",100\n", ",5\n").replace(
        "fog", "snow"))
    compared(tmp_path, full, trial)
    said = capsys.readouterr().err
    assert "differ in max_steps: 2; None" in said and "in evaluated images: 100; 5" in said
    assert "in corruptions: ['fog']; ['snow']" in said


@pytest.mark.parametrize("program, plain, mixed", [
    ("resizemix", {"method": None, "resizemix": False, "cutmix_prob": 0.0}, {"resizemix": True}),
    ("resizemix", {"method": None, "resizemix": False, "cutmix_prob": 0.0}, {"cutmix_prob": 1.0}),
    ("resizemix", {"method": None, "resizemix": False}, {"autoaugment": True}),
    ("soft_aug", {"method": None, "da": 0, "ra": False, "loss": "ce"}, {"da": 2, "loss": "st"}),
    ("soft_aug", {"method": None, "da": 0, "loss": "ce", "mixup": False}, {"mixup": True}),
    ("safuse", {"method": "baseline", "cutmix_prob": 0.5}, {"method": "safuse"}),
    ("samix", {"method": "vanilla"}, {"method": "automix"})])
def test_a_gain_is_over_training_without_mixing(tmp_path, program, plain, mixed):
    runs = [make_run(tmp_path, name, [value], program=program, **flags) for name, value, flags in
            (("a", 70, plain | mixed), ("b", 60, plain))]
    for file in tmp_path.glob("*/args.json"):
        file.write_text(file.read_text().replace('"method": null, ', ""))
    assert [row["gain"] for row in compared(tmp_path, *runs).values()] == ["", "10.0"]


def test_a_gain_is_over_the_same_seeds_and_seconds_are_of_one_device(tmp_path):
    """Plain training of seeds 1 (twice), 2 and 3; a method of 1 and 2, of 3, and of 9."""
    runs = [make_run(tmp_path, f"a{n}", [value] * 3, seed=seed)
            for n, (seed, value) in enumerate([(1, 60), (1, 62), (2, 50), (3, 40)])]
    runs += [make_run(tmp_path, f"{method}{seed}", [70] * 3, method=method, seed=seed)
             for method, seed in (("sage", 1), ("sage", 2), ("mixup", 3), ("cutmix", 9))]
    gpu = tmp_path / "sage2" / "args.json"
    gpu.write_text(gpu.read_text().replace('"gpu": null', '"gpu": "H100"'))
    compare.main([*runs, "--csv", str(tmp_path / "t.csv"), "--picture", str(tmp_path / "t.png")])
    _, sage, mixup, cutmix = rows_of(tmp_path / "t.csv")
    assert (float(sage["gain"]), float(sage["gain spread"])) == (14.5, 5.5)     # 9 and 20
    assert (float(mixup["gain"]), mixup["gain spread"]) == (30, "")
    assert float(cutmix["gain"]) == pytest.approx(70 - (61 + 50 + 40) / 3)
    assert sage["s/epoch"] == "" and float(mixup["s/epoch"]) == 2


@pytest.mark.parametrize("fact", [{"changed": {"hardware": "cuda -> cpu"}},
                                  {"devices": ["NVIDIA H100", "NVIDIA H200"], "changed": {}}])
def test_a_run_that_changed_its_device_has_no_seconds(tmp_path, fact):
    runs = [make_run(tmp_path, "a", [60]), make_run(tmp_path, "b", [60], method="sage")]
    moved = json.loads((tmp_path / "b" / "args.json").read_text()) | fact
    (tmp_path / "b" / "args.json").write_text(json.dumps(moved))
    plain, sage = compared(tmp_path, *runs).values()
    assert float(plain["s/epoch"]) > 0 and sage["s/epoch"] == ""


def test_a_gain_is_over_a_network_of_the_same_width(tmp_path):
    runs = [make_run(tmp_path, f"{method}{width}", [value], method=method, initial_channels=width)
            for method, width, value in (("vanilla", 16, 60), ("sage", 16, 65),
                                         ("vanilla", 64, 75), ("sage", 64, 76))]
    assert [row["gain"] for row in compared(tmp_path, *runs).values()] == ["", "5.0", "", "1.0"]


def test_table_and_picture_by_hand(tmp_path, capsys):
    runs = [make_run(tmp_path, "a1", [10, 50, 60, 62]),
            make_run(tmp_path, "a2", [10, 52, 64, 66], seed=2),
            make_run(tmp_path, "b1", [10, 70, 80, 90], method="sage"),
            make_run(tmp_path, "b2", [10, 70, 80, 92], method="sage", seed=2),
            make_run(tmp_path, "c1", [5, 5, 5, 40], method="sage", lr=0.2, evaluation=False),
            make_run(tmp_path, "d1", [5, 5, 5, 30], program="safuse", method="baseline", beta=1)]
    out, picture = tmp_path / "table.csv", tmp_path / "compare.png"
    compare.main([*runs, "--last", "3", "--csv", str(out), "--picture", str(picture), "--markdown"])
    printed = capsys.readouterr().out
    rows = {row["run"]: row for row in rows_of(out)}
    assert list(rows) == ["sage: vanilla", "sage: sage, lr 0.1", "sage: sage, lr 0.2",
                          "safuse: baseline"]
    plain, mixed, faster, other = rows.values()
    assert (float(plain["accuracy"]), float(plain["accuracy spread"])) == (62, 2)
    assert (float(mixed["gain"]), float(mixed["gain spread"])) == (18, 2)   # 20 and 16 by seed
    assert mixed["seeds"] == "2" and plain["gain"] == other["gain"] == ""
    assert faster["ECE"] == "" and float(plain["ECE"]) == 5 and float(plain["mCE"]) == 70
    assert float(plain["visible 47 %"]) == 30 and float(plain["FGSM 8/255"]) == 10
    assert float(plain["s/epoch"]) == 2.5
    assert "| sage: sage, lr 0.1 | 2 | 80.00 ± 0.00 | +18.00 ± 2.00 | 5.00 ± 0.00 |" in printed
    with Image.open(picture) as drawn:
        assert drawn.width > 1200 and len(drawn.convert("RGB").getcolors(1 << 20)) > 50


def test_what_is_no_run_or_differs_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "a", [10, 20], epochs=3)
    make_run(tmp_path, "tf32", [10, 20, 30], method="sage", amp="bf16")
    compare.main([str(tmp_path)])                           # a folder of runs
    said = capsys.readouterr()
    assert "a: 2 of 3 epochs" in said.err and "differ in precision: bf16, TF32; off" in said.err
    assert "sage: vanilla" in said.out and "sage: sage" in said.out
    make_run(tmp_path, "c", [10])
    (tmp_path / "c" / "log.csv").unlink()                   # in its first epoch
    compare.main([str(tmp_path)])
    assert "left out, no run with a test accuracy in its log.csv:" in capsys.readouterr().err
    (tmp_path / "a" / "log.csv").write_text("epoch,seconds\n1,2\n")
    with pytest.raises(RunError, match="no run with a test accuracy in its log.csv: .*a"):
        compare.main([str(tmp_path / "a")])
    with pytest.raises(RunError, match="no: no such folder"):
        compare.main([str(tmp_path / "no")])


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The driver with a protocol of one epoch, and a data set of a few digits."""
    monkeypatch.setitem(compare_methods.PROTOCOLS, "p20", (1, "5 6"))
    train, test, _ = sources.read("digits", "", 16, 1)
    np.savez(tmp_path / "few.npz", train_images=train.images[:200], test_images=test.images[:50],
             train_labels=train.labels[:200], test_labels=test.labels[:50])

    def run(*words, data="few.npz"):
        compare_methods.main(["--data", str(tmp_path / data), "--out", str(tmp_path / "out"),
                              "--seeds", "1", "--methods", "vanilla", *words])
    return run


def test_driver_runs_keeps_and_never_repeats_another_experiment(driver, tmp_path, capsys):
    kept = tmp_path / "kept"
    driver("--keep", str(kept))
    first = capsys.readouterr().out
    assert "| sage: vanilla | 1 |" in first and "not run here" not in first
    assert {file.name for file in (kept / "vanilla" / "seed1").iterdir()} == {
        "args.json", "log.csv", "evaluation.csv"}
    assert str(tmp_path) not in (kept / "vanilla" / "seed1" / "args.json").read_text()
    assert "FGSM 8/255" in rows_of(tmp_path / "out" / "table.csv")[0]
    compare.main([str(kept), "--picture", str(tmp_path / "p.png"), "--markdown"])
    assert capsys.readouterr().out.splitlines()[2] == first.splitlines()[2]
    run, = (tmp_path / "out" / "vanilla").iterdir()
    output = (run / "output.txt").read_text()
    driver()                                                # done: nothing runs
    assert (run / "output.txt").read_text() == output
    capsys.readouterr()
    driver("--keep", str(kept))
    assert "vanilla, seed 1: kept in" in capsys.readouterr().out
    with np.load(tmp_path / "few.npz") as arrays:           # other data: another run
        other = dict(arrays)
    other["test_labels"] = other["test_labels"][::-1]
    np.savez(tmp_path / "other.npz", **other)
    before = (kept / "vanilla" / "seed1" / "log.csv").read_bytes()
    with pytest.raises(RunError, match="seed1 holds another experiment.*--keep"):
        driver("--keep", str(kept), data="other.npz")
    assert (kept / "vanilla" / "seed1" / "log.csv").read_bytes() == before
    driver("--methods", "vanilla", "vanilla", data="other.npz")
    assert "| sage: vanilla | 1 |" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "vanilla").iterdir())) == 2


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), json.JSONDecodeError("", "", 0)])
def test_a_fault_starts_no_other_run(driver, monkeypatch, fault):
    begun = []

    def run(method, seed, args):
        begun.append(seed)
        time.sleep(0.2 * (len(begun) > 1))
        raise fault

    monkeypatch.setattr(compare_methods, "run", run)
    with pytest.raises(type(fault)):
        driver("--seeds", *"123456789")
    assert len(begun) < 9


def test_driver_needs_the_data_and_names_a_run_that_fails(driver, tmp_path):
    (tmp_path / "cut.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:-100])
    for name in ("none.npz", "cut.npz"):
        with pytest.raises(RunError, match=f"{name}: no .npz of the data"):
            driver(data=name)
    with pytest.raises(RunError, match="ended with 2; see"):
        driver("--flags=--lr -1")
