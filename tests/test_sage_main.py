"""SAGE's program as users run it: every method, trials, resume after a kill, two ranks, faults."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import checkpoint
from sage import main as sage

SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 --arch "
         "preactresnet18 --initial_channels 4 --learning_rate 0.05 --rand_pos 0.02 --m_part 8 "
         "--device cpu").split()


def command(*words, root):
    return [sys.executable, str(ROOT / "sage" / "main.py"), *SMALL, "--root_dir", str(root),
            *map(str, words)]


def program(*words, root, **options):
    """Runs sage/main.py in a process of its own."""
    return subprocess.run(command(*words, root=root), capture_output=True, text=True, timeout=300,
                          **options)


def train(root, *words):
    """Runs main() in this process; returns the run's folder."""
    sage.main([*SMALL, "--root_dir", str(root), *map(str, words)])
    return next(folder for folder in root.iterdir())


def weights(folder, name="checkpoint.pt"):
    return checkpoint.load(folder / name)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", sage.METHODS)
def test_every_method_trains_and_closes(tmp_path, method, capsys):
    folder = train(tmp_path, "--method", method, "--max_steps", 2, "--tensorboard")
    printed = capsys.readouterr().out
    assert "median of the last 1 epochs" in printed and str(folder / "mixed.png") in printed
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "log.csv", "curves.png", "mixed.png", "checkpoint.pt", "best.pt", ".lock",
        "tensorboard"}
    facts = json.loads((folder / "args.json").read_text())
    assert facts["args"]["method"] == method and facts["torch"] == torch.__version__
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 2
    before = sage.models.build("preactresnet18", 10, 16, initial_channels=4)
    assert not torch.equal(weights(folder)["fc.weight"], before.fc.weight)


@pytest.mark.parametrize("words", [
    "--method sage --update_ratio 0.7 --upper_lambda 0.5 --eval_mode True",
    "--method puzzle --adv_p 1.0 --adv_eps 8 --clean_lam 1 --t_size -1 --n_labels 2 --mp 2",
    "--method puzzle --transport False --in_batch True --solver device",
    "--method comix --m_block_num -1 --m_thres_type soft --parallel False --set_resolve False",
    "--method comix --solver device --clean_lam 0",
    "--method cutmix --in_batch True --prob_mix 0.5",
    "--method manifold --in_batch True --dropout True",
    "--method saliencymix --prob_mix 0.4",
    "--method input --mix_schedule scheduled --mix_scheduled_epoch 4",
    "--method input --mix_schedule delayed --mix_scheduled_epoch 1",
    "--method sage --amp bf16 --channels_last False",
    "--train mixup --graph True", "--box True", "--comix True", "--train mixup_hidden",
    "--method vanilla --loader dali --valid_labels_per_class 3",
    "--method vanilla --arch wrn28_2 --initial_channels 8", "--arch resnext29_4_24_new"])
def test_variants_train(tmp_path, words):
    folder = train(tmp_path, *words.split(), "--max_steps", 2)
    assert torch.isfinite(weights(folder)["fc.weight"]).all()


@pytest.mark.parametrize("words, method", [
    ("--train mixup", "input"), ("--train mixup_hidden", "manifold"), ("--box True", "cutmix"),
    ("--train mixup --graph True", "puzzle"), ("--comix", "comix"), ("--train sage", "sage"),
    ("", "vanilla")])
def test_older_words_name_a_method(words, method):
    assert sage.parse_args(words.split()).method == method


def test_methods_give_defaults_and_never_overwrite():
    args = sage.parse_args("--method comix".split())
    assert (args.dataset, args.arch, args.mixup_alpha, args.clean_lam) == (
        "cifar100", "preactresnet18", 2.0, 1.0)
    args = sage.parse_args("--method comix --dataset cifar10 --clean_lam 0 --arch wrn16_8".split())
    assert (args.dataset, args.clean_lam, args.arch) == ("cifar10", 0.0, "wrn16_8")
    args = sage.parse_args("--method puzzle --dataset tiny-imagenet-200 --t_size 8".split())
    assert (args.t_size, args.clean_lam) == (8, 1.0)
    assert sage.parse_args("--method sage".split()).mixup_alpha == 1.0


def test_mix_schedule():
    args = sage.parse_args(["--mix_schedule", "scheduled", "--mix_scheduled_epoch", "10",
                            "--prob_mix", "0.8"])
    assert [sage.mixed_share(args, epoch) for epoch in (0, 4, 9, 20)] == pytest.approx(
        [0.08, 0.4, 0.8, 0.8])
    args.mix_schedule = "delayed"
    assert [sage.mixed_share(args, epoch) for epoch in (9, 10)] == [0, .8]


def test_clean_and_mixed_losses_add_up(tmp_path):
    """SAGE's gradient is (1 - r) times the clean loss's plus r times the mixed loss's."""
    args = sage.parse_args([*SMALL, "--method", "sage"])
    args.channels_last = False
    train_set, _, info = sage.data.load("digits", "", batch_size=30, device=torch.device("cpu"),
                                        image_size=16)
    images, labels = next(iter(train_set))
    torch.manual_seed(0)
    net = sage.models.build("preactresnet18", 10, 16, initial_channels=4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradient(ratio):
        args.update_ratio = ratio
        net.zero_grad()
        generator = torch.Generator().manual_seed(5)
        sage.training_step(net, net, images, labels, args, info, 0, generator, scaler)
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    mixed = gradient(1.0)
    net.zero_grad()
    clean_loss = sage.softmax_bce(net(images), sage.F.one_hot(labels, 10))
    clean_loss.backward()
    clean = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert torch.allclose(gradient(0.7), 0.7 * mixed + 0.3 * clean, atol=1e-6)


@pytest.mark.parametrize("method", ["vanilla", "sage", "puzzle"])
def test_killed_and_resumed_is_the_run_never_killed(tmp_path, method):
    words = ["--method", method, "--epochs", 6, "--schedule", 2, "--gammas", 0.1, "--dropout",
             "True", "--update_ratio", 0.7, "--valid_labels_per_class", 2]
    whole = train(tmp_path / "whole", *words)
    folder = tmp_path / "killed" / whole.name
    for row in (1, 2):                                      # SIGKILL somewhere in epochs 1 and 2
        child = subprocess.Popen(command(*words, "--resume", "auto", root=tmp_path / "killed"),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (
                (folder / "log.csv").exists()
                and len((folder / "log.csv").read_text().splitlines()) > row):
            time.sleep(0.02)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    result = program(*words, "--resume", "auto", root=tmp_path / "killed")
    assert result.returncode == 0 and "resumed at epoch" in result.stdout
    one, two = checkpoint.load(whole / "checkpoint.pt"), checkpoint.load(folder / "checkpoint.pt")
    assert same(one["model"], two["model"]) and one["best"] == two["best"]
    momentum = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()]
                for c in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
    timed = {"seconds", "images_per_second"}
    histories = [[{k: v for k, v in row.items() if k not in timed} for row in c["history"]]
                 for c in (one, two)]
    assert histories[0] == histories[1] and len(histories[0]) == 6
    assert same(weights(whole, "best.pt"), weights(folder, "best.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_inside_the_epoch(tmp_path, number):
    words = ["--method", "cutmix", "--epochs", 2, "--labels_per_class", 120, "--print_freq", 1]
    child = subprocess.Popen(command(*words, root=tmp_path / "a"), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in child.stdout:
        if "epoch 0 step 3/" in line:
            child.send_signal(number)
            break
    last = child.communicate()[0].splitlines()[-1]
    assert child.returncode == 128 + number
    step = re.fullmatch(number.name + r": stopped at epoch 0, step (\d+); go on with --resume auto",
                        last)
    assert step and 3 <= int(step[1]) < 40
    stopped = next((tmp_path / "a").iterdir())
    assert checkpoint.load(stopped / "checkpoint.pt")["step"] == int(step[1])
    resumed = train(tmp_path / "a", *words, "--resume", "auto")
    whole = train(tmp_path / "b", *words)
    assert same(weights(resumed), weights(whole))
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (resumed, whole)]
    assert [[line.split(",")[:7] for line in log] for log in logs][0] == [
        line.split(",")[:7] for line in logs[1]]


def test_two_ranks_share_the_work_and_agree(tmp_path):
    words = ["--method", "sage", "--epochs", 1, "--update_ratio", 0.7]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "tests" / "two_ranks.py"), *command(*words, root=tmp_path)[2:]],
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "ranks agree: True" in result.stdout and "2 processes" in result.stdout
    assert "shards: 60 and 60, common: 0" in result.stdout
    folder = next(tmp_path.iterdir())
    logged = (folder / "log.csv").read_text().splitlines()
    row = dict(zip(logged[0].split(","), map(float, logged[1].split(",")), strict=True))
    alone = program("--method", "sage", "--evaluate", folder / "checkpoint.pt", root=tmp_path)
    clean = re.search(r"clean: accuracy ([\d.]+) %.*loss ([\d.]+) on 355 images", alone.stdout)
    assert float(clean[1]) == pytest.approx(row["test_accuracy"], abs=0.01)
    assert float(clean[2]) == pytest.approx(row["test_loss"], abs=1e-3)


def test_evaluation_and_attacks(tmp_path):
    folder = train(tmp_path, "--method", "vanilla", "--epochs", 6, "--labels_per_class", 60)
    result = program("--method", "vanilla", "--evaluate", root=tmp_path)
    accuracy = [float(value) for value in re.findall(r"accuracy ([\d.]+) %", result.stdout)]
    assert result.returncode == 0 and len(accuracy) == 3
    assert accuracy[0] == pytest.approx(checkpoint.load(folder / "best.pt")["accuracy"], abs=0.01)
    assert accuracy[0] > accuracy[1] > accuracy[2]


@pytest.mark.parametrize("method", sage.METHODS)
def test_previews_are_drawn(tmp_path, method):
    path = tmp_path / "mixed.png"
    sage.main([*SMALL, "--method", method, "--preview", str(path),
               "--root_dir", str(tmp_path / "r")])
    with Image.open(path) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert not (tmp_path / "r").exists()


def test_log_off_writes_nothing(tmp_path):
    sage.main([*SMALL, "--max_steps", "1", "--log_off", "True", "--root_dir", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, code, line", [
    ("--method nomix", 2, "invalid choice: 'nomix'"),
    ("--arch nonet", 2, "invalid choice: 'nonet'"),
    ("--dataset nodata", 2, "invalid choice: 'nodata'"),
    ("--schedule 1 2 --gammas 0.1", 2, "--schedule has 2 epochs, --gammas 1"),
    ("--method sage --box True", 2, "ask for cutmix"),
    ("--rand_pos 1.5", 2, "--rand_pos 1.5 is not between"),
    ("--kernel_size 4", 2, "--kernel_size 4 is not odd"),
    ("--max_steps 0", 2, "not an integer of at least 1"),
    ("--labels_per_class 500", 1, "--labels_per_class 500: class 0 has only 143"),
    ("--dataset npz --data_dir none.npz", 1, "none.npz: no such"),
    ("--dataset cifar100 --data_dir /proc/none", 1, "/proc/none"),
    ("--root_dir /proc/none", 1, "/proc/none"),
    ("--learning_rate 1e30 --print_freq 1", 1, "at epoch 0, step"),
    ("--resume none.pt", 1, "none.pt: no such checkpoint"),
    ("--evaluate none.pt", 1, "none.pt: no such checkpoint")])
def test_bad_input_is_one_line(tmp_path, words, code, line):
    result = program("--epochs", 1, *words.split(), root=tmp_path)
    faults = [text for text in result.stderr.splitlines() if "error:" in text]
    assert result.returncode == code and len(faults) == 1 and line in faults[0]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path):
    result = program("--device", "cuda", root=tmp_path)
    assert result.returncode == 1 and "torch sees no GPU here" in result.stderr
    result = program("--device", "auto", "--ngpu", 8, "--max_steps", 1, root=tmp_path)
    assert result.returncode == 0 and "no GPU found" in result.stdout


def test_checkpoints_of_others_are_refused(tmp_path):
    folder = train(tmp_path, "--max_steps", 1)
    path, before = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    for words, line in (("--initial_channels 8", "initial_channels 4 (here 8)"),
                        ("--labels_per_class 11", "data "),
                        ("--arch wrn28_2", "arch preactresnet18 (here wrn28_2)")):
        result = program("--resume", path, *words.split(), root=tmp_path)
        assert result.returncode == 1 and "is of another run" in result.stderr, result.stderr
        assert line in result.stderr and path.read_bytes() == before
    assert "already holds a run" in program("--max_steps", 1, root=tmp_path).stderr
    assert "holds weights alone" in program("--resume", folder / "best.pt", root=tmp_path).stderr
    path.write_bytes(before[:len(before) // 2])
    path.with_name("checkpoint.prev.pt").write_bytes(before)
    result = program("--resume", path, root=tmp_path)
    assert result.returncode == 1 and f"--resume {folder}/checkpoint.prev.pt" in result.stderr


def test_runs_from_its_own_folder(tmp_path):
    result = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT / "sage", text=True,
                            capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0 and "--rand_pos" in result.stdout
