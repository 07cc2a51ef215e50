"""SAGE's program as users run it: every method, trials, resume after a kill, two ranks, faults."""
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from programs import Program, same, weights

from common import checkpoint, distributed
from sage import main as sage
from sage import puzzlemix

SMALL = ("--dataset digits --image_size 16 --labels_per_class 12 --batch_size 30 --arch "
         "preactresnet18 --initial_channels 4 --learning_rate 0.05 --rand_pos 0.02 --m_part 8 "
         "--device cpu").split()
PROGRAM = Program(sage, SMALL)
command, train, faults = PROGRAM.command, PROGRAM.train, PROGRAM.faults


@pytest.mark.parametrize("method", sage.METHODS)
def test_every_method_trains_and_closes(tmp_path, method, capsys):
    folder = train(tmp_path, "--method", method, "--max_steps", 2, "--tensorboard")
    printed = capsys.readouterr().out
    assert "median of the last 1 epochs" in printed and f"checkpoints: {folder}" in printed
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "log.csv", "curves.png", "mixed.png", "checkpoint.pt", "best.pt", ".lock",
        "evaluation.csv", "evaluation.png",
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
    args = sage.parse_args("--method input --mix_schedule scheduled --mix_scheduled_epoch 10 "
                           "--prob_mix 0.8".split())
    assert [sage.mixed_share(args, epoch) for epoch in (0, 4, 9, 20)] == pytest.approx(
        [0.08, 0.4, 0.8, 0.8])
    args.mix_schedule = "delayed"
    assert [sage.mixed_share(args, epoch) for epoch in (9, 10)] == [0, .8]
    args.method = "vanilla"                                 # never in two parts
    assert sage.mixed_share(args, 9) == 1


def digits(words):
    """Flags, training batches, Info and a fresh network as main() makes them."""
    args = sage.parse_args([*SMALL, *words.split()])
    batches, _, info = sage.data.load("digits", "", batch_size=args.batch_size, image_size=16,
                                      device=torch.device("cpu"), seed=args.seed,
                                      labels_per_class=args.labels_per_class)
    torch.manual_seed(args.seed)
    net = sage.models.build("preactresnet18", 10, 16, initial_channels=4)
    return args, batches, info, sage.runtime.prepare(net, args, torch.device("cpu"))[0]


def bce(net, images, targets):
    return F.binary_cross_entropy(net(images).softmax(1), targets)


def gradient_by_hand(net, images, labels, args, info, generator):
    """Leaves one step's gradient in the network, written out from the methods' descriptions."""
    one_hot = F.one_hot(labels, 10).float()
    if args.method == "vanilla":
        return bce(net, images, one_hot).backward()
    perm = sage.mixing.draw_perm(len(images), generator)
    lam = sage.mixing.draw_lambda(1.0, generator)
    images.requires_grad_()
    if args.method == "sage":
        ratio = args.update_ratio
        offsets = sage.rearrange.draw_offsets(16, 16, args.rand_pos, generator)
        (bce(net, images, one_hot) * (1 - ratio)).backward()
        saliency = sage.rearrange.gradient_saliency(images.grad)
        mixed, share = sage.rearrange.sage_mix(images.detach(), saliency, perm, offsets,
                                     lam * args.upper_lambda)
    else:
        ratio = 1
        blocks = puzzlemix.draw_block_num(generator, (16, 16))
        torch.rand(2, generator=generator)                  # whether there is adversarial noise
        if args.clean_lam:
            (F.cross_entropy(net(images), labels) * 2 * args.clean_lam / 10).backward()
        else:
            net.eval()
            F.cross_entropy(net(images), labels).backward()
            net.train().zero_grad()
        saliency = puzzlemix.gradient_magnitude(images.grad)
        mixed, share = puzzlemix.puzzle_mix(images.detach(), saliency, perm, lam, blocks,
                                            mean=info.mean, std=info.std)
    share = share[:, None]
    (bce(net, mixed, share * one_hot + (1 - share) * one_hot[perm]) * ratio).backward()


@pytest.mark.parametrize("words", [
    "--method vanilla --momentum 0", "--method vanilla", "--method puzzle",
    "--method sage --update_ratio 0.7 --upper_lambda 0.5", "--method puzzle --clean_lam 1"])
def test_training_is_the_recipe(tmp_path, words):
    """Losses, weight decay, Nesterov's momentum and the steps of the learning rate, by hand.

    In float64 both computations agree to 4e-16; in float32 a difference of 6e-6 after two steps can
    make another of SAGE's offsets, or of Puzzle Mix's labels, the best for one image, with a fourth
    of the seeds on each kind of processor. So one of four must agree; a wrong recipe has none.
    """
    words += " --decay 0.01 --schedule 1 2 --gammas 0.1 0.5 --epochs 3 --labels_per_class 5"
    apart = {}
    for seed in (2, 3, 5, 7):
        apart[seed] = differing(tmp_path / str(seed), f"{words} --seed {seed}", seed)
        if not apart[seed]:
            return
    raise AssertionError(apart)


def differing(root, words, seed) -> list[str]:
    """Names of the weights in which a run and its recipe by hand differ."""
    trained = weights(train(root, *words.split()))
    args, batches, info, net = digits(words)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for epoch, rate in enumerate((0.05, 0.005, 0.0025)):
        batches.set_epoch(epoch)
        for step, (images, labels) in enumerate(batches):
            net.zero_grad()
            gradient_by_hand(net, images, labels, args, info,
                             distributed.step_generator(seed, epoch, step))
            with torch.no_grad():
                for name, p in net.named_parameters():
                    grad = p.grad + 0.01 * p
                    velocity[name] = args.momentum * velocity[name] + grad
                    p -= rate * (grad + args.momentum * velocity[name])
    return [name for name, value in net.state_dict().items()
            if not torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5)]


@pytest.mark.parametrize("words", ["--method sage --update_ratio 0.7",
                                   "--method puzzle --clean_lam 1", "--method cutmix"])
def test_partial_mixing_weighs_by_images(words):
    """The gradient is the mean over a clean part and a part mixed as if it were the batch."""
    args, batches, info, net = digits(words)
    images, labels = next(iter(batches))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradient(part, share):
        args.prob_mix = share
        net.zero_grad()
        sage.training_step(net, net, images[part], labels[part], args, info, 0,
                           torch.Generator().manual_seed(5), scaler)
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    expected = 0.4 * gradient(slice(18, 30), 1.0) + 0.6 * gradient(slice(18), 0.0)
    assert torch.allclose(gradient(slice(30), 0.4), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["sage", "puzzle"])
def test_killed_and_resumed_is_the_run_never_killed(tmp_path, method, capsys):
    words = ["--method", method, "--epochs", 4, "--schedule", 2, "--gammas", 0.1, "--dropout",
             "True", "--update_ratio", 0.7, "--valid_labels_per_class", 2]
    whole = train(tmp_path / "whole", *words)
    folder = tmp_path / "killed" / whole.name
    for _ in range(2):                                      # SIGKILL inside two epochs
        PROGRAM.killed(*words, "--resume", "auto", root=tmp_path / "killed", steps=6)
    train(tmp_path / "killed", *words, "--resume", "auto")
    assert "resumed at epoch" in capsys.readouterr().out
    one, two = checkpoint.load(whole / "checkpoint.pt"), checkpoint.load(folder / "checkpoint.pt")
    assert same(one["model"], two["model"]) and one["best"] == two["best"]
    momentum = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()]
                for c in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
    timed = {"seconds", "images_per_second"}
    histories = [[{k: v for k, v in row.items() if k not in timed} for row in c["history"]]
                 for c in (one, two)]
    assert histories[0] == histories[1] and len(histories[0]) == 4
    assert same(weights(whole, "best.pt"), weights(folder, "best.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_inside_the_epoch(tmp_path, number):
    words = ["--method", "cutmix", "--epochs", 1, "--labels_per_class", 120, "--print_freq", 1]
    child = subprocess.Popen(command(*words, root=tmp_path / "a"), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in child.stdout:
        if "epoch 1 step 3/" in line:
            child.send_signal(number)
            break
    last = child.communicate()[0].splitlines()[-1]
    assert child.returncode == 128 + number
    step = re.fullmatch(number.name + r": stopped at epoch 1, step (\d+); go on with --resume auto",
                        last)
    assert step and 3 <= int(step[1]) < 40
    stopped = next((tmp_path / "a").iterdir())
    assert checkpoint.load(stopped / "checkpoint.pt")["step"] == int(step[1])
    if number == signal.SIGINT:
        return
    resumed = train(tmp_path / "a", *words, "--resume", "auto")
    whole = train(tmp_path / "b", *words)
    assert same(weights(resumed), weights(whole))
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (resumed, whole)]
    assert [[line.split(",")[:7] for line in log] for log in logs][0] == [
        line.split(",")[:7] for line in logs[1]]


@pytest.mark.parametrize("words, shared", [
    ("--method sage --eval_mode True", 1), ("--method puzzle", 1), ("--method puzzle --clean_lam 1",
    0), ("--method sage", 0), ("--method comix --clean_lam 0", 1)])
def test_ranks_share_the_statistics_of_a_saliency_in_evaluation_mode(monkeypatch, words, shared):
    """Each rank's own would differ from rank 0's, which alone is in a checkpoint."""
    args, events = PROGRAM.arguments(words), []
    net = sage.models.build("preactresnet18", 10, 16, initial_channels=4)
    net.register_forward_pre_hook(lambda *_: events.append("forward"))
    monkeypatch.setattr(distributed, "share_buffers", lambda net: events.append("shared"))
    images, labels, scaler = torch.rand(8, 3, 16, 16), torch.arange(8), torch.amp.GradScaler(
        "cpu", enabled=False)
    info = SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=10)
    sage.training_step(net, net, images, labels, args, info, 0, torch.Generator(), scaler)
    assert events == ["shared"] * shared + ["forward"] * 2
    sage.mix_batch(net, images, labels, args, info, torch.Generator(), scaler)   # of rank 0 alone
    assert events.count("shared") == shared


@pytest.mark.parametrize("method", ["sage", "puzzle"])
def test_two_ranks_share_the_work_and_agree(tmp_path, method, capsys):
    words = ["--method", method, "--epochs", 1, "--update_ratio", 0.7]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "tests" / "two_ranks.py"), *command(*words, root=tmp_path)[2:]],
        capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "ranks agree: True" in result.stdout and "2 processes" in result.stdout
    assert "shards: 60 and 60, common: 0" in result.stdout
    folder = next(tmp_path.iterdir())
    assert (folder / "mixed.png").exists()                  # which rank 0 draws alone
    logged = (folder / "log.csv").read_text().splitlines()
    row = dict(zip(logged[0].split(","), map(float, logged[1].split(",")), strict=True))
    train(tmp_path, "--method", method, "--evaluate", folder / "checkpoint.pt")     # alone
    clean = re.search(r"clean: accuracy ([\d.]+) %.*loss ([\d.]+), ECE .* on 355 images",
                      capsys.readouterr().out)
    assert float(clean[1]) == pytest.approx(row["test_accuracy"], abs=0.01)
    assert float(clean[2]) == pytest.approx(row["test_loss"], abs=1e-3)


def test_evaluation_and_attacks(tmp_path, capsys):
    folder = train(tmp_path, "--method", "vanilla", "--epochs", 6, "--labels_per_class", 60)
    capsys.readouterr()
    train(tmp_path, "--method", "vanilla", "--evaluate")
    accuracy = [float(value) for value in re.findall(
        r"^(?:clean|fgsm ./255): accuracy ([\d.]+) %", capsys.readouterr().out, re.M)]
    assert len(accuracy) == 3
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


def test_saliencymix_shows_the_draw_that_mixes_most(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sage.plots, "preview", lambda path, title, rows, targets, info:
                        shown.append(targets))
    for seed in range(3):
        sage.main([*SMALL, "--method", "saliencymix", "--preview", "a.png", "--seed", str(seed),
                   "--root_dir", str(tmp_path)])
    assert all(targets.amax(1).median() < 0.85 for targets in shown)


@pytest.mark.parametrize("method", sage.METHODS)
def test_images_need_not_be_square(tmp_path, method, capsys):
    rng = np.random.default_rng(0)
    file = tmp_path / "wide.npz"
    np.savez(file, **{f"{part}_images": rng.integers(0, 256, (24, 16, 32, 3), np.uint8)
                      for part in ("train", "test")},
             **{f"{part}_labels": np.arange(24) % 3 for part in ("train", "test")})
    words = [word for word in SMALL if word not in ("--image_size", "16")]
    sage.main([*words, "--root_dir", str(tmp_path), "--dataset", "npz", "--data_dir", str(file),
               "--method", method, "--max_steps", "1", "--batch_size", "12", "--labels_per_class",
               "8"])
    assert "16×32 pixels" in capsys.readouterr().out
    assert checkpoint.load(next(tmp_path.glob("*/checkpoint.pt")))["step"] == 1


def test_log_off_writes_nothing(tmp_path):
    sage.main([*SMALL, "--max_steps", "1", "--log_off", "True", "--root_dir", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, code, line", [
    ("--method nomix", 2, "invalid choice: 'nomix'"),
    ("--method cutmix --graph True", 2, "an older flag for puzzle: give one of them"),
    ("--arch nonet", 2, "invalid choice: 'nonet'"),
    ("--dataset nodata", 2, "invalid choice: 'nodata'"),
    ("--schedule 1 2 --gammas 0.1", 2, "--schedule has 2 epochs, --gammas 1"),
    ("--method sage --kernel_size 99", 1, "too wide for images of 16 pixels"),
    ("--arch resnext50_32x4d", 1, "a ResNeXt needs --initial_channels 16 or more"),
    ("--method sage --kernel_size 4", 2, "--kernel_size is odd, --m_block_num 2 or more, or -1"),
    ("--method comix --m_block_num 0", 2, "--m_block_num 2 or more"),
    ("--method puzzle --image_size 15", 1, "15×15 pixels cannot be halved"),
    ("--valid_labels_per_class 500", 1, "--valid_labels_per_class 500 leaves no image"),
    ("--dataset npz --data_dir none.npz", 1, "none.npz: No such file"),
    ("--dataset cifar100 --data_dir /proc/none", 1, "/proc/none"),
    ("--root_dir /proc/none", 1, "/proc/none"),
    ("--learning_rate 1e30 --print_freq 1", 1, "the loss became nan at epoch 1, step 2"),
    ("--learning_rate 1e30 --labels_per_class 3", 1, "at epoch 1, after step 1; nothing was saved"),
    ("--resume none.pt", 1, "none.pt: no such checkpoint"),
    ("--evaluate none.pt", 1, "none.pt: no such checkpoint")])
def test_bad_input_is_one_line(tmp_path, words, code, line, capsys):
    status, error = faults(capsys, "--root_dir", tmp_path, "--epochs", 1, *words.split())
    lines = [text for text in error.splitlines() if "error:" in text]
    assert status == code and len(lines) == 1 and line in lines[0], error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path, capsys):
    code, error = faults(capsys, "--device", "cuda", "--root_dir", tmp_path)
    assert code == 1 and "torch sees no GPU here" in error
    train(tmp_path, "--device", "auto", "--ngpu", 8, "--max_steps", 1)
    assert "no GPU found" in capsys.readouterr().out


def test_checkpoints_of_others_are_refused(tmp_path, capsys):
    folder = train(tmp_path, "--max_steps", 1)
    path, before = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    root = "--root_dir", tmp_path
    for words, line in (("--initial_channels 8", "initial_channels 4 (here 8)"),
                        ("--labels_per_class 11", "data "),
                        ("--arch wrn28_2", "arch preactresnet18 (here wrn28_2)")):
        code, error = faults(capsys, *root, "--resume", path, *words.split())
        assert code == 1 and "is of another run" in error, error
        assert line in error and path.read_bytes() == before
    assert "already holds a run" in faults(capsys, *root, "--max_steps", 1)[1]
    assert "holds weights alone" in faults(capsys, *root, "--resume", folder / "best.pt")[1]
    assert "go on with --batch_size 30" in faults(
        capsys, *root, "--resume", "auto", "--batch_size", 20)[1]
    other = train(tmp_path / "other", "--max_steps", 1)
    error = faults(capsys, *root, "--resume", other / "checkpoint.pt")[1]
    assert "already holds another run" in error and path.read_bytes() == before
    path.write_bytes(before[:len(before) // 2])
    path.with_name("checkpoint.prev.pt").write_bytes(before)
    code, error = faults(capsys, *root, "--resume", path)
    assert code == 1 and f"{path} is damaged" in error


def test_start_epoch_repeats_from_there(tmp_path):
    words = ["--labels_per_class", 3, "--epochs"]
    train(tmp_path, *words, 3)
    folder = train(tmp_path, *words, 4, "--resume", "auto", "--start_epoch", 1)
    assert [row["epoch"] for row in checkpoint.load(folder / "checkpoint.pt")["history"]] == [
        0, 1, 2, 3]


@pytest.mark.parametrize("solver, code, line", [
    ("auto", 0, "curves, pictures and checkpoints:"),
    ("gco", 1, "error: the solver gco needs gco-wrapper")], ids=["auto", "named"])
def test_starts_without_gco(tmp_path, solver, code, line):
    script = ("import sys; sys.modules['gco'] = None; from sage import main; "
              "from common import runtime; runtime.launch(main.main)")
    words = command("--method", "puzzle", "--solver", solver, "--max_steps", 1, root=tmp_path)[2:]
    result = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, text=True,
                            capture_output=True)
    printed = result.stdout if code == 0 else result.stderr
    assert result.returncode == code and line in printed and "Traceback" not in result.stderr


def test_manifold_needs_a_network_that_mixes_inside(tmp_path, capsys):
    code, error = faults(capsys, "--root_dir", tmp_path, "--method", "manifold", "--arch", "deit_s",
                         "--initial_channels", 64)
    assert code == 1 and "--method manifold: deit_s for 16 pixels cannot mix inside" in error


def test_runs_from_its_own_folder(tmp_path):
    result = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT / "sage", text=True,
                            capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0 and "--rand_pos" in result.stdout
