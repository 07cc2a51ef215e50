#!/usr/bin/env python3
"""Lay runs side by side: a table and a picture.

    python compare.py experiments/*
    python compare.py runs/vanilla runs/sage --markdown --csv table.csv --picture curves.png

RUN is a run's folder, or a folder of such folders. Runs that differ in nothing but --seed become
one line: mean, and half the range over seeds. Read are args.json, log.csv and evaluation.csv.

accuracy  median test accuracy, %, of the last epochs (--last)
gain      over the first line of the same program, so give its plain training first
ECE, visible, FGSM, mCE: of evaluation.csv, %; '–' where a run has none
"""
import argparse
import csv
import json
import statistics
from pathlib import Path

from common import plots, runtime
from common.corruptions import kind
from common.distributed import warn
from common.errors import RunError
from common.flags import positive
from common.run import NOT_TRAINING

IGNORED = {*NOT_TRAINING, "seed", "job_name", "amp", "compile", "channels_last", "log_off"}
VISIBLE = 47                            # %, the occlusion of the table: the nearest there is


class Run:
    """What the files of a run's folder say."""

    def __init__(self, folder: Path, last: int):
        self.folder = folder
        try:
            facts = json.loads((folder / "args.json").read_text())
            self.flags, command = facts["args"], facts.get("command", "").split()
            log, self.seed = table(folder / "log.csv"), self.flags["seed"]
            self.curve = {int(row["epoch"]): float(row["test_accuracy"]) for row in log
                          if row.get("test_accuracy")}
            self.numbers = {"accuracy": statistics.median([*self.curve.values()][-last:])}
            seconds = statistics.median(float(row["seconds"]) for row in log)
            found = folder / "evaluation.csv"
            rows = {row["condition"]: {key: float(row[key]) for key in ("accuracy", "ece")}
                    for row in table(found)} if found.exists() else {}
        except (OSError, ValueError, KeyError, AttributeError) as fault:
            raise RunError(f"{folder}: no run, or a damaged one ({fault})") from None
        self.visible = {float(name.split()[1]): row["accuracy"] for name, row in rows.items()
                        if name.startswith("visible")}
        if rows:
            self.visible[100.0] = rows["clean"]["accuracy"]
            near = min(self.visible, key=lambda part: abs(part - VISIBLE))
            self.numbers |= {"ECE": 100 * rows["clean"]["ece"],
                             f"visible {near:.0f} %": self.visible[near],
                             **{name.replace("fgsm", "FGSM"): row["accuracy"]
                                for name, row in rows.items() if name.startswith("fgsm")}}
        if corrupted := [row["accuracy"] for name, row in rows.items() if kind(name)]:
            self.numbers["mCE"] = 100 - statistics.mean(corrupted)
        self.numbers["s/epoch"] = seconds
        self.name = next((Path(word).parent.name for word in command
                          if word.endswith("main.py")), "")
        self.program = self.name, frozenset(self.flags)     # with other flags, another program
        self.facts = {"data": facts.get("fingerprint") or facts.get("data"),
                      "precision": self.flags.get("amp"), "torch": facts.get("torch"),
                      "device": facts.get("gpu") or f"CPU, {facts.get('threads')} threads"}
        if len(log) < self.flags["epochs"]:
            warn(f"{folder}: {len(log)} of {self.flags['epochs']} epochs")

    def key(self):
        """Return what runs of one line agree in."""
        return self.program, tuple((name, str(value)) for name, value in sorted(self.flags.items())
                                   if name not in IGNORED)


def table(path: Path) -> list[dict]:
    """Return the rows of a CSV file, by column."""
    with open(path) as file:
        return list(csv.DictReader(file))


def find(folders: list[str], last: int) -> list[list[Run]]:
    """Return runs in groups that differ in nothing but the seed, in the order of `folders`."""
    found, groups = {}, {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("args.json")) or sorted(folder.rglob("args.json"))
        if not files:
            raise RunError(f"{folder}: no run (a folder with args.json) there")
        found |= {file.resolve(): file.parent for file in files}
    for run in (Run(folder, last) for folder in found.values()):
        groups.setdefault(run.key(), []).append(run)
    return list(groups.values())


def labels(groups: list[list[Run]]) -> list[str]:
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


def summary(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and half the range of more than one value."""
    return statistics.mean(values), (max(values) - min(values)) / 2 if values[1:] else None


def lines(groups: list[list[Run]], names: list[str]) -> list[dict]:
    """Return a row for each group: (mean, spread) of every number that all its runs have."""
    rows, plain = [], {}
    for name, group in zip(names, groups, strict=True):
        row = {"run": name, "seeds": len({run.seed for run in group})} | {
            key: summary([run.numbers[key] for run in group]) for key in group[0].numbers
            if all(key in run.numbers for run in group)}
        first = plain.setdefault(group[0].program, group)
        if first is not group:
            base = {run.seed: run.numbers["accuracy"] for run in first}
            pairs = [run.numbers["accuracy"] - base[run.seed] for run in group if run.seed in base]
            row["gain"] = summary(pairs) if len(pairs) == len(group) == len(first) else \
                (row["accuracy"][0] - statistics.mean(base.values()), None)
        rows.append(row)
    return rows


def columns(rows: list[dict]) -> list[str]:
    """Return the numbers that any row has, in the order of the table."""
    order = ["accuracy", "gain", "ECE", "visible", "FGSM", "mCE", "s/epoch"]
    return sorted(dict.fromkeys(name for row in rows for name in row if name.split()[0] in order),
                  key=lambda name: order.index(name.split()[0]))


def text(rows: list[dict], markdown: bool) -> str:
    """Return the table as text, or as Markdown."""
    cells = [["run", "seeds", *columns(rows)]]
    for row in rows:
        cells.append([row["run"], str(row["seeds"])])
        for name in columns(rows):
            mean, spread = row.get(name, (None, None))
            cells[-1].append("–" if mean is None else f"{mean:{'+' * (name == 'gain')}.2f}"
                             + (f" ± {spread:.2f}" if spread is not None else ""))
    if markdown:
        cells.insert(1, ["---"] * len(cells[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def write_csv(path: Path, rows: list[dict]):
    """Write the table's numbers, unrounded, with a column of the spread beside each."""
    names = columns(rows)
    with plots.whole(path) as new, open(new, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "seeds", *(x for name in names for x in (name, f"{name} spread"))])
        table.writerows([row["run"], row["seeds"], *(x for name in names for x in
                                                     row.get(name, (None, None)))] for row in rows)


def draw(path: Path, groups: list[list[Run]], names: list[str]):
    """Draw test accuracy over epochs and visible fraction; a band is the seeds' range."""
    from matplotlib import colormaps
    figure = plots.new_figure(figsize=(13, max(4.2, 0.22 * len(names) + 1)))
    left, right = figure.subplots(1, 2)
    for n, (group, name) in enumerate(zip(groups, names, strict=True)):
        colour = colormaps["turbo"]((n + 0.5) / len(groups))
        for axis, found in ((left, [run.curve for run in group]),
                            (right, [run.visible for run in group if run.visible])):
            common = sorted(set.intersection(*map(set, found))) if found else []
            values = [[curve[x] for curve in found] for x in common]
            axis.plot(common, list(map(statistics.mean, values)), color=colour, linewidth=1.6,
                      label=name, marker="o" if len(common) < 12 else None, markersize=3)
            axis.fill_between(common, list(map(min, values)), list(map(max, values)),
                              color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="test accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="visible fraction of the image, %", ylabel="test accuracy, %")
    for axis in (left, right):
        axis.grid(color=plots.GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False,
                  fontsize=8)
    plots.save_figure(figure, path)


def main(argv=None):
    """Print the table; write the picture and, if asked for, the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN")
    add("--last", type=positive, default=5, metavar="N", help="epochs of the accuracy's median")
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
