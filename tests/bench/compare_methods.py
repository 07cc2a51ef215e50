#!/usr/bin/env python3
"""All methods on one small data set with one network, by one protocol: a table, a CSV, a chart.

    python tests/bench/compare_methods.py --data s20.npz --out runs/p20 --seeds 1 2 3
    python tests/bench/compare_methods.py --data s20.npz --out runs/p100 --protocol p100 --amp bf16

Protocol P20: batch 100, flip and random crop with padding 2, SGD with Nesterov momentum 0.9,
weight decay 1e-4, learning rate 0.2 (methods with binary cross-entropy) or 0.05 (cross-entropy)
times 0.1 after epochs 10 and 15 of 20; reported is the median test accuracy (and calibration
error, where a method logs it) of the last five epochs. P100: 100 epochs, times 0.1 after 50 and
75. softaug_*: ResNet-18, a crop with padding 4 (standard) or of SoftCrop's strength. Stopped at
any moment, the same command goes on where it was. Finished runs are not repeated: their results
and logs are kept in tests/bench/logs/PROTOCOL (--keep).
"""
import argparse
import csv
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.plots import BLUE, GRID, INK, save_figure, write_atomic

ROOT = Path(__file__).resolve().parents[2]
GREY = "#8d8c86"

PROTOCOLS = {"p20": (20, "10 15"), "p100": (100, "50 75")}
SAGE = ("sage/main.py --dataset npz --data_dir {data} --arch preactresnet18 --initial_channels 16 "
        "--epochs {epochs} --schedule {schedule} --gammas 0.1 0.1 --learning_rate 0.2 --decay 1e-4 "
        "--batch_size 100 --seed {seed} ")
COMMANDS = {method: SAGE + f"--method {method}" for method in
            ("vanilla", "input", "manifold", "cutmix", "saliencymix", "puzzle", "comix")}
COMMANDS["sage"] = SAGE + "--method sage --rand_pos 0.01 --upper_lambda 0.5 --update_ratio 0.7"
SOFT_AUG = ("soft_aug/main.py --dataset npz --data_dir {data} --net resnet18 --initial_channels 16 "
            "--epochs {epochs} --ft 0 --decay s --gamma 0.1 --milestones {schedule} --lr 0.05 "
            "--wd 1e-4 --batch_size 100 --eval_every 1 --seed {seed} ")
COMMANDS |= {f"softaug_{recipe}{'_ra' * ra}": SOFT_AUG + f"{words} --ra {ra}" for ra in (0, 1)
             for recipe, words in (("standard", "--da 0 --loss ce"), ("hard", "--da 2 --loss ce"),
                                   ("soft", "--da 2 --loss st"))}

RESIZEMIX = ("resizemix/main.py --dataset npz --data_dir {data} --net_name preactresnet18 "
             "--initial_channels 16 --epochs {epochs} --lr_schedule step --milestones {schedule} "
             "--gamma 0.1 --warmup_epochs 0 --init_lr 0.05 --weight_decay 1e-4 --nesterov True "
             "--batch_size 100 --padding 2 --seed {seed} ")
COMMANDS |= {"resizemix_baseline": RESIZEMIX + "--resizemix False",
             "resizemix_cutmix": RESIZEMIX + "--resizemix False --cutmix_prob 1",
             "resizemix": RESIZEMIX + "--resizemix True"}

SAFUSE = ("safuse/main.py --dataset npz --data_dir {data} --arch resnet18 --initial_channels 16 "
          "--epochs {epochs} --schedule step --milestones {schedule} --LR 0.05 --weight_decay 1e-4 "
          "--nesterov True --batch_size 100 --padding 2 --normalise True --seed {seed} ")
COMMANDS |= {name: SAFUSE + f"--method {words}" for name, words in (
    ("safuse_baseline", "baseline"), ("safuse_cutmix", "cutmix"), ("safuse", "safuse"),
    ("safuse_pre_norm", "safuse --attention_score pre_norm"), ("lgcoamix", "lgcoamix"),
    ("occamix", "occamix"))}

# branch k's 0.999 is for 200,000 steps; after the 800 of P20 half of it would be its random start
SAMIX = ("samix/main.py --config cifar100_r18 --dataset npz --data_dir {data} "
         "--initial_channels 16 --epochs {epochs} --milestones {schedule} --lr 0.05 "
         "--block_lr 0.05 --nesterov True --batch_size 100 --crop zero --padding 2 "
         "--ema_base 0.99 --ema_end 0.99 --seed {seed} ")
COMMANDS |= {name: SAMIX + f"--method {name.removeprefix('samix_')}" for name in
             ("samix_vanilla", "samix_mixup", "samix_cutmix", "automix", "samix")}


def run(method: str, seed: int, args) -> dict:
    """Trains one method with one seed, unless its log is complete; returns its table line."""
    epochs, schedule = PROTOCOLS[args.protocol]
    root = args.out / method / f"seed{seed}"
    command = COMMANDS[method].format(data=args.data, epochs=epochs, schedule=schedule, seed=seed)
    command += f" --amp {args.amp}"
    root.mkdir(parents=True, exist_ok=True)
    logs = list(root.glob("*/log.csv"))
    if not logs or len(logs[0].read_text().splitlines()) <= epochs:
        with open(root / "output.txt", "a") as output:
            subprocess.run([sys.executable, *command.split(), "--root_dir", str(root), "--resume",
                            "auto"], cwd=ROOT, stdout=output, stderr=output, check=True)
    log = next(root.glob("*/log.csv"))
    with open(log) as file:
        rows = list(csv.DictReader(file))
    facts = json.loads(log.with_name("args.json").read_text())
    for name, part in (("log.csv", ""), ("occlusion.csv", "_occlusion")):
        if (log.parent / name).exists():
            shutil.copy(log.parent / name, args.keep / f"{method}_seed{seed}{part}.csv")
    return {"method": method, "seed": seed,
            "accuracy": statistics.median(float(row["test_accuracy"]) for row in rows[-5:]),
            "best": max(float(row["test_accuracy"]) for row in rows),
            "ece": statistics.median(float(row["test_ece"]) for row in rows[-5:])
            if "test_ece" in rows[0] else "",
            "seconds_per_epoch": statistics.median(float(row["seconds"]) for row in rows),
            "device": facts["gpu"] or f"cpu, {facts['threads']} threads",
            "commit": facts["commit"],
            "command": f"python {command}".replace(args.data, Path(args.data).name)}


def read(file: Path) -> dict:
    """Table lines of finished runs, by (method, seed)."""
    with open(file) as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        row |= {name: float(row[name]) for name in
                ("accuracy", "best", "ece", "seconds_per_epoch") if row[name]}
    return {(row["method"], int(row["seed"])): row for row in rows}


def table(results: list[dict]) -> str:
    """Markdown: a line a method, mean and spread over its seeds."""
    lines = ["| method | seeds | test accuracy, % | spread | ECE, % |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        values = [row["accuracy"] for row in rows]
        spread = f"± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else "–"
        errors = [row["ece"] for row in rows if row["ece"] != ""]
        error = f"{100 * statistics.mean(errors):.2f}" if errors else "–"
        lines.append(f"| {method} | {len(values)} | {statistics.mean(values):.2f} | {spread} | "
                     f"{error} |")
    return "\n".join(lines)


def chart(results: list[dict], path: Path, title: str):
    """A horizontal bar a method, with the range over its seeds; plain training in grey."""
    from matplotlib.figure import Figure
    methods = list(dict.fromkeys(row["method"] for row in results))
    values = [[row["accuracy"] for row in results if row["method"] == m] for m in methods]
    means = [statistics.mean(v) for v in values]
    error = [[mean - min(v) if v[1:] else math.nan for mean, v in zip(means, values, strict=True)],
             [max(v) - mean if v[1:] else math.nan for mean, v in zip(means, values, strict=True)]]
    plain = ("vanilla", "baseline", "standard")
    colours = [GREY if m.endswith(plain) else BLUE for m in methods]
    figure = Figure(figsize=(7, 0.25 * len(methods) + 0.9), layout="constrained")
    axis = figure.subplots()
    axis.barh(methods, means, xerr=error, color=colours, height=0.7, ecolor=INK, capsize=2)
    axis.margins(y=0.01)
    axis.tick_params(axis="y", length=0, labelsize=9)
    for i, mean in enumerate(means):
        axis.text(0.6, i, f"{mean:.1f}", va="center", color="white", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy, %", color=INK)
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=lambda text: str(Path(text).resolve()),
                        help=".npz of train_images, train_labels, test_images, test_labels")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and results")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="p20")
    parser.add_argument("--keep", type=Path, help="folder of finished runs' logs and results.csv")
    parser.add_argument("--methods", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.keep = args.keep or ROOT / "tests" / "bench" / "logs" / args.protocol
    args.keep.mkdir(parents=True, exist_ok=True)
    kept, names = args.keep / "results.csv", list(COMMANDS)
    results = read(kept) if kept.exists() else {}
    wanted = [(m, s) for s in args.seeds for m in args.methods]
    for method, seed in tqdm(wanted, desc="runs"):
        try:
            if (method, seed) not in results:
                results[method, seed] = run(method, seed, args)
        except subprocess.CalledProcessError as fault:
            parser.exit(1, f"error: {method}, seed {seed} ended with {fault.returncode}; see "
                           f"{args.out / method / f'seed{seed}' / 'output.txt'}\n")
        lines = sorted(results.items(), key=lambda item: (names.index(item[0][0]), item[0][1]))
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0][1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in lines)
        write_atomic(kept, text.getvalue())
    results = [results[key] for key in sorted(wanted, key=lambda key: names.index(key[0]))]
    print(table(results))
    chart(results, args.out / "chart.png",
          f"{args.protocol.upper()} on {Path(args.data).stem}; grey: plain training")
    print(f"{kept}\n{args.out / 'chart.png'}")


if __name__ == "__main__":
    main()
