#!/usr/bin/env python3
"""All methods on one small data set with one network, by one protocol; then compare.py over them.

    python tests/bench/compare_methods.py --data s20.npz --out runs/p20 --seeds 1 2 3
    python tests/bench/compare_methods.py --data s20.npz --out runs/p100 --protocol p100 --amp bf16

Protocol P20: batch 100, flip and random crop with padding 2, SGD with Nesterov momentum 0.9,
weight decay 1e-4, each program's learning rate the best of three for its plain training, or
within a quarter of a point of it (RESULTS.md), times 0.1 after epochs 10 and 15 of 20; reported
is the median test accuracy of the last five epochs. P100: 100 epochs, times 0.1 after 50 and 75.
softaug_*: ResNet-18, a crop with padding 4 (standard) or of SoftCrop's strength. make_s20.py makes
the data.

A run belongs to its command and to the data's fingerprint. Stopped at any moment, the same command
goes on where it was; with one of the two changed it begins anew. --keep DIR copies what compare.py
reads of finished runs to DIR, and takes those that DIR holds of the same command and data (of
others: an error), saying so: their networks are then in no folder of --out.
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import compare
from common import files, runtime
from common.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
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
             "--gamma 0.1 --warmup_epochs 0 --init_lr 0.025 --weight_decay 1e-4 --nesterov True "
             "--batch_size 100 --padding 2 --seed {seed} ")
COMMANDS |= {"resizemix_baseline": RESIZEMIX + "--resizemix False",
             "resizemix_cutmix": RESIZEMIX + "--resizemix False --cutmix_prob 1",
             "resizemix": RESIZEMIX + "--resizemix True"}

SAFUSE = ("safuse/main.py --dataset npz --data_dir {data} --arch resnet18 --initial_channels 16 "
          "--epochs {epochs} --schedule step --milestones {schedule} --LR 0.1 --weight_decay 1e-4 "
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
# as published for CIFAR-100; momentum 0 is what keeps the masks of short runs from one image
COMMANDS["automix"] += " --lam_concat False --block_momentum 0"
ONCE = ("softaug_standard_ra", "softaug_hard_ra", "softaug_soft_ra", "softaug_hard",    # P20 alone
        "resizemix_cutmix", "safuse_cutmix", "safuse_pre_norm", "samix_mixup", "samix_cutmix")


def fingerprint(file: Path) -> str:
    """A digest of the images and labels in an .npz. Raises OSError, ValueError, KeyError."""
    digest = hashlib.blake2b(digest_size=8)
    with np.load(file, allow_pickle=False) as arrays:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def finished(folder: Path, epochs: int) -> bool:
    """Whether a run's folder holds all epochs and the evaluation at their end."""
    log = folder / "log.csv"
    return (folder / "evaluation.csv").exists() and len(log.read_text().splitlines()) > epochs


def run(method: str, seed: int, args) -> Path:
    """Train one method with one seed, unless that is done; return the folder to compare."""
    epochs, schedule = PROTOCOLS[args.protocol]
    command = COMMANDS[method].format(data="{data}", epochs=epochs, schedule=schedule, seed=seed)
    command = f"{command} --amp {args.amp} {args.flags}".strip()
    key = hashlib.blake2b(f"{command} {args.fingerprint}".encode(), digest_size=6).hexdigest()
    kept = args.keep / method / f"seed{seed}" if args.keep else None
    if kept and (kept / "args.json").exists():
        facts = json.loads((kept / "args.json").read_text())
        if facts.get("key") != key:
            raise RunError(f"{kept} holds another experiment (of other flags or data); name "
                           "another folder by --keep")
        tqdm.write(f"{method}, seed {seed}: kept in {kept}, not run here "
                   f"({facts['gpu'] or 'CPU'}, commit {facts['commit']})")
        return kept
    root = args.out / method / f"seed{seed}_{key}"
    root.mkdir(parents=True, exist_ok=True)
    if not any(finished(file.parent, epochs) for file in root.glob("*/log.csv")):
        words = [word.replace("{data}", str(args.data)) for word in shlex.split(command)]
        with open(root / "output.txt", "a") as output:
            status = subprocess.run([sys.executable, *words, "--root_dir", str(root), "--resume",
                                     "auto"], cwd=ROOT, stdout=output, stderr=output, env=os.environ
                                    | {"OMP_NUM_THREADS": str(args.threads)}).returncode
        if status:
            raise RunError(f"{words[0]} … ended with {status}; see {root / 'output.txt'}")
    folder = next(root.glob("*/log.csv")).parent
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("log.csv", "evaluation.csv"):
            shutil.copy(folder / name, kept / name)
        text = (folder / "args.json").read_text()       # without the places of this machine
        for place, name in ((str(args.data), args.data.name), (f"{root}/", ""), (str(root), ".")):
            text = text.replace(json.dumps(place)[1:-1], name)
        files.write_atomic(kept / "args.json",
                           json.dumps({"key": key} | json.loads(text), indent=1) + "\n")
    return kept or folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=lambda text: Path(text).resolve(),
                        help=".npz of train_images, train_labels, test_images, test_labels")
    parser.add_argument("--out", required=True, type=lambda text: Path(text).resolve(),
                        help="folder of the runs, the table and the picture")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="p20")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="see above")
    parser.add_argument("--methods", nargs="+", choices=COMMANDS, metavar="METHOD",
                        help=f"of {', '.join(COMMANDS)}; p100: by default without "
                             + ", ".join(ONCE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--flags", default="", metavar="'--lr 0.1'",
                        help="further flags of every command")
    args = parser.parse_args(argv)
    if min(args.threads, args.jobs) < 1:
        parser.error("--threads and --jobs are at least 1")
    methods = args.methods or [name for name in COMMANDS
                               if args.protocol == "p20" or name not in ONCE]
    try:
        args.fingerprint = fingerprint(args.data)
    except (OSError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as fault:
        raise RunError(f"{args.data}: no .npz of the data ({fault}); tests/bench/make_s20.py makes "
                       "one") from None
    folders = {(method, seed): None for seed in args.seeds for method in methods}
    with ThreadPoolExecutor(args.jobs) as pool:
        wanted = {pool.submit(run, *place, args): place for place in folders}
        try:
            for done in tqdm(as_completed(wanted), total=len(wanted), desc="runs"):
                folders[wanted[done]] = str(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    compare.main([*(folders[place] for place in sorted(folders, key=lambda place: (
        list(COMMANDS).index(place[0]), place[1]))), "--csv", str(args.out / "table.csv"),
        "--markdown", "--picture", str(args.out / "compare.png")])


if __name__ == "__main__":
    runtime.launch(main)
