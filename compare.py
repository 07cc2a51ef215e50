#!/usr/bin/env python3
"""Lay runs side by side: a table and a picture.

    python compare.py experiments/*
    python compare.py runs/vanilla runs/sage --markdown --csv table.csv --picture curves.png

RUN is a run's folder, or a folder of such folders. Runs that differ in nothing but --seed become
one line: mean, and half the range over seeds. accuracy: median test accuracy, %, of the --last
evaluations; gain: seed by seed over the first line of the same program, so give its plain training
first; ECE, visible, FGSM, mCE: of evaluation.csv, %, '–' where a run has none. s/epoch: '–' where
seeds ran on different devices."""
import argparse
import csv
import json
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

from common import files, plots, runtime
from common.corruptions import kind
from common.distributed import warn
from common.errors import RunError
from common.flags import positive
from common.run import NOT_TRAINING

IGNORED = {*NOT_TRAINING, "seed", "job_name", "amp", "compile", "channels_last", "log_off"}
VISIBLE = 47                            # %, the occlusion of the table: the nearest there is


def table(path: Path) -> list[dict]:
    """Return the rows of a CSV file, by column."""
    with open(path) as file:
        return list(csv.DictReader(file))


def read(folder: Path, last: int) -> SimpleNamespace:
    """Return what the files of a run's folder contain: flags, curves, numbers of the table."""
    facts = json.loads((folder / "args.json").read_text())
    flags, log = facts["args"], table(folder / "log.csv")
    curve = {int(row["epoch"]): float(row["test_accuracy"]) for row in log
             if row.get("test_accuracy")}
    if not curve:
        raise RunError(f"{folder}: no test accuracy in its log.csv")
    numbers, visible = {"accuracy": median([*curve.values()][-last:])}, {}
    if (folder / "evaluation.csv").exists():
        rows = {row["condition"]: row for row in table(folder / "evaluation.csv")}
        accuracy = {name: float(row["accuracy"]) for name, row in rows.items()}
        visible = {float(name.split()[1]): value for name, value in accuracy.items()
                   if name.startswith("visible")} | {100.0: accuracy["clean"]}
        near = min(visible, key=lambda part: abs(part - VISIBLE))
        numbers |= {"ECE": 100 * float(rows["clean"]["ece"]),
                    f"visible {near:.0f} %": visible[near],
                    **{f"FGSM{name[4:]}": value for name, value in accuracy.items()
                       if name.startswith("fgsm")}}
        if corrupted := [value for name, value in accuracy.items() if kind(name)]:
            numbers["mCE"] = 100 - mean(corrupted)
    numbers["s/epoch"] = median(float(row["seconds"]) for row in log)
    if len(log) < flags["epochs"]:
        warn(f"{folder}: {len(log)} of {flags['epochs']} epochs")
    name = next((Path(word).parent.name for word in facts["command"].split()
                 if word.endswith("main.py")), "")
    return SimpleNamespace(
        folder=folder, flags=flags, seed=flags["seed"], curve=curve, visible=visible,
        numbers=numbers, name=name, program=(name, frozenset(flags)),   # other flags: another one
        facts={"data": facts.get("fingerprint"), "precision": flags["amp"], "torch": facts["torch"],
               "device": facts["gpu"] or f"CPU, {facts['threads']} threads"})


def find(folders: list[str], last: int) -> list[list]:
    """Return runs in groups that differ in nothing but the seed, in the order of `folders`."""
    found, groups = {}, {}
    for folder in map(Path, folders):
        paths = sorted(folder.glob("args.json")) or sorted(folder.rglob("args.json"))
        if not paths:
            raise RunError(f"{folder}: no run (a folder with args.json) there")
        found |= {path.resolve(): path.parent for path in paths}
    done = [folder for folder in found.values() if (folder / "log.csv").exists()] or found.values()
    if left := [str(folder) for folder in found.values() if folder not in done]:
        warn(f"left out, without a finished epoch: {', '.join(left)}")
    for run in (read(folder, last) for folder in done):
        key = run.program, *((name, str(value)) for name, value in sorted(run.flags.items())
                             if name not in IGNORED)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def labels(groups: list[list]) -> list[str]:
    """Return each group's program, method, and flags in which groups of these two differ."""
    names = []
    for run in (group[0] for group in groups):
        method = run.flags.get("method")
        alike = [other[0].flags for other in groups if other[0].program == run.program
                 and other[0].flags.get("method") == method]
        words = [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                 for name, value in run.flags.items() if name not in IGNORED
                 and any(other[name] != value for other in alike)]
        words = ", ".join([method] * bool(method) + words)
        names.append(": ".join(filter(None, (run.name, words))) or run.folder.name)
    return names


def summary(name: str, values: list[float]) -> dict:
    """Return the mean, and half the range of more than one value, as columns of the table."""
    spread = {f"{name} spread": (max(values) - min(values)) / 2} if values[1:] else {}
    return {name: mean(values)} | spread


def lines(groups: list[list], names: list[str]) -> list[dict]:
    """Return a row for each group: mean and spread of every number that all its runs have."""
    rows, plain = [], {}
    for name, group in zip(names, groups, strict=True):
        row = {"run": name, "seeds": len({run.seed for run in group})}
        devices = {run.facts["device"] for run in group}
        for key in group[0].numbers:
            if all(key in run.numbers for run in group) and (key != "s/epoch" or len(devices) == 1):
                row |= summary(key, [run.numbers[key] for run in group])
        first = plain.setdefault(group[0].program, group)
        if first is not group:
            base = {seed: mean(run.numbers["accuracy"] for run in first if run.seed == seed)
                    for seed in {run.seed for run in first}}
            pairs = [run.numbers["accuracy"] - base[run.seed] for run in group if run.seed in base]
            row |= summary("gain", pairs if len(pairs) == len(group) else
                           [row["accuracy"] - mean(run.numbers["accuracy"] for run in first)])
        rows.append(row)
    return rows


def columns(rows: list[dict]) -> list[str]:
    """Return the numbers that any row has, in the order of the table."""
    order = ["accuracy", "gain", "ECE", "visible", "FGSM", "mCE", "s/epoch"]
    names = dict.fromkeys(name for row in rows for name in row if not name.endswith("spread"))
    return sorted(list(names)[2:], key=lambda name: order.index(name.split()[0]))


def text(rows: list[dict], markdown: bool) -> str:
    """Return the table as text, or as Markdown."""
    names = columns(rows)
    cells = [["run", "seeds", *names]]
    for row in rows:
        cells.append([row["run"], str(row["seeds"])])
        for name in names:
            cell = f"{row[name]:{'+' * (name == 'gain')}.2f}" if name in row else "–"
            spread = row.get(f"{name} spread")
            cells[-1].append(cell + (f" ± {spread:.2f}" if spread is not None else ""))
    if markdown:
        cells.insert(1, ["---"] * len(cells[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def write_csv(path: Path, rows: list[dict]):
    """Write the table's numbers, unrounded, with a column of the spread beside each."""
    names = [column for name in columns(rows) for column in (name, f"{name} spread")]
    with files.whole(path) as new, open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "seeds", *names])
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, groups: list[list], names: list[str]):
    """Draw test accuracy over epochs and visible fraction; a band is the seeds' range."""
    from matplotlib import colormaps
    figure = plots.new_figure(13, max(4.2, 0.22 * len(names) + 1))
    left, right = figure.subplots(1, 2)
    for n, (group, name) in enumerate(zip(groups, names, strict=True)):
        colour = colormaps["turbo"]((n + 0.5) / len(groups))
        for axis, found in ((left, [run.curve for run in group]),
                            (right, [run.visible for run in group if run.visible])):
            common = sorted(set.intersection(*map(set, found))) if found else []
            values = [[curve[x] for curve in found] for x in common]
            axis.plot(common, list(map(mean, values)), color=colour, linewidth=1.6, label=name,
                      marker="o" if len(common) < 12 else None, markersize=3)
            axis.fill_between(common, list(map(min, values)), list(map(max, values)),
                              color=colour, alpha=0.15, linewidth=0)
    plots.frame(left, xlabel="epoch", ylabel="test accuracy, %")
    plots.frame(right, xlabel="visible fraction of the image, %", ylabel="test accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False,
                  fontsize=8)
    plots.save_figure(figure, path)


def main(argv=None):
    """Print the table; write the picture and, if asked for, the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN")
    add("--last", type=positive, default=5, metavar="N", help="evaluations of the median")
    add("--csv", type=Path, metavar="FILE", help="write the table there, too")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--picture", type=Path, default=Path("compare.png"), metavar="FILE.png")
    args = parser.parse_args(argv)
    groups = find(args.runs, args.last)
    names = labels(groups)
    rows = lines(groups, names)
    print(text(rows, args.markdown))
    for what in groups[0][0].facts:
        found = {str(run.facts[what]) for group in groups for run in group}
        if len(found) > 1:
            warn(f"the runs differ in {what}: {'; '.join(sorted(found))}")
    if args.csv:
        write_csv(args.csv, rows)
    draw(args.picture, groups, names)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    runtime.launch(main)
