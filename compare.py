#!/usr/bin/env python3
"""Lay runs side by side: a table and a picture.

    python compare.py experiments/*
    python compare.py runs/vanilla runs/sage --markdown --csv table.csv --picture curves.png

RUN is a run's folder, or a folder of such folders. Runs that differ in nothing but --seed become
one line: mean, and half the range over seeds. accuracy: median test accuracy, %, of the --last
evaluations; gain: over plain training, or else the first line, of the same program, data and
network, seed by seed if that has the seeds; ECE, visible, FGSM, mCE: of evaluation.csv,
%, '–' where a run has none. s/epoch: '–' where a run, or its seeds, ran on different devices."""
import argparse
import csv
import json
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

from common import files, plots, runtime
from common.corruptions import kind
from common.data.images import reading
from common.distributed import warn
from common.errors import RunError
from common.flags import picture, positive
from common.run import NOT_TRAINING

IGNORED = {*NOT_TRAINING, "seed", "job_name", "log_off"} - {"max_steps"}
VISIBLE = 47                            # %, the occlusion of the table: the nearest there is


def table(path: Path) -> list[dict]:
    """Return the rows of a CSV file, by column. Raises ValueError if its end is missing."""
    text = path.read_text()
    if not text.endswith("\n"):
        raise ValueError(f"the end of {path.name} is missing")
    return list(csv.DictReader(text.splitlines()))


def read(folder: Path, last: int) -> SimpleNamespace:
    """Return what the files of a run's folder contain: flags, curves, numbers of the table."""
    facts = json.loads((folder / "args.json").read_text())
    flags, log = facts["args"], table(folder / "log.csv")
    curve = {int(row["epoch"]): float(row["test_accuracy"]) for row in log
             if row.get("test_accuracy")}
    numbers, visible, rows, count = {}, {}, {}, None
    if curve:
        numbers = {"accuracy": median([*curve.values()][-last:])}
        if "hardware" not in facts.get("changed", ()) and len(facts.get("devices", ())) < 2:
            numbers["s/epoch"] = median(float(row["seconds"]) for row in log)
    if (folder / "evaluation.csv").exists():
        rows = {row["condition"]: row for row in table(folder / "evaluation.csv")}
        accuracy = {name: float(row["accuracy"]) for name, row in rows.items()}
        count = rows["clean"]["count"]
        visible = {float(name.split()[1]): value for name, value in accuracy.items()
                   if name.startswith("visible")} | {100.0: accuracy["clean"]}
        near = min(visible, key=lambda part: abs(part - VISIBLE))
        numbers |= {"ECE": 100 * float(rows["clean"]["ece"]),
                    f"visible {near:.0f} %": visible[near],
                    **{f"FGSM{name[4:]}": value for name, value in accuracy.items()
                       if name.startswith("fgsm")}}
        if corrupted := [value for name, value in accuracy.items() if kind(name)]:
            numbers["mCE"] = 100 - mean(corrupted)
    if len(log) < flags["epochs"]:
        warn(f"{folder}: {len(log)} of {flags['epochs']} epochs")
    drawn = any(map(flags.get, ("val_split", "labels_per_class", "valid_labels_per_class")))
    data = str(facts.get("data" if drawn else "fingerprint"))           # drawn by the seed
    name = next((Path(word).parent.name for word in facts["command"].split()
                 if word.endswith("main.py")), "")
    return SimpleNamespace(
        folder=folder, flags=flags | {"data": data}, seed=flags["seed"], curve=curve,
        visible=visible, numbers=numbers, name=name,
        base=(name, data, flags.get("arch"), flags.get("initial_channels")),
        facts={"data": data, "precision": flags["amp"] + ", TF32" * facts.get("tf32", False),
               "torch": facts["torch"], "epochs": flags["epochs"],
               "batch_size": flags.get("batch_size"), "max_steps": flags.get("max_steps"),
               "evaluated images": count,
               "corruptions": sorted({kind(name) for name in rows} - {""}),
               "device": facts["gpu"] or ", ".join(filter(None, (
                   "CPU", facts.get("processor"), f"{facts['threads']} threads")))})


def is_plain(flags: dict) -> bool:
    """Return whether these flags of a program mix and soften nothing."""
    if "method" in flags:
        return flags["method"] in ("vanilla", "baseline")
    return flags.get("loss", "ce") == "ce" and not any(map(flags.get, (
        "resizemix", "cutmix_prob", "cutout", "randaugment", "autoaugment", "batch_aug",
        "da", "ra", "mixup", "noise")))


def find(folders: list[str], last: int) -> list[list]:
    """Return runs in groups that differ in nothing but the seed: in the order of `folders`, but of
    runs of one program, data and network those without mixing first."""
    found, left, groups = {}, [], {}
    for folder in map(Path, folders):
        paths = sorted(folder.glob("args.json")) or sorted(folder.rglob("args.json"))
        if not folder.exists():
            raise RunError(f"{folder}: no such folder")
        left += [str(folder)] * (not paths)
        found |= {path.resolve(): path.parent for path in paths}
    for folder in found.values():
        with reading(folder, "a run's args.json, log.csv, evaluation.csv of this version"):
            run = read(folder, last) if (folder / "log.csv").exists() else None
        if run and run.curve:
            key = run.base, *((name, str(value)) for name, value in sorted(run.flags.items())
                              if name not in IGNORED)
            groups.setdefault(key, []).append(run)
        else:
            left.append(str(folder))
    if left and not groups:
        raise RunError(f"no run with a test accuracy in its log.csv: {', '.join(left)}")
    if left:
        warn(f"left out, no run with a test accuracy in its log.csv: {', '.join(left)}")
    places = list(dict.fromkeys(key[0] for key in groups))
    return [groups[key] for key in sorted(groups, key=lambda key: (
        places.index(key[0]), not is_plain(groups[key][0].flags)))]


def labels(groups: list[list]) -> list[str]:
    """Return each group's program, method, and flags in which groups of these two differ."""
    names = []
    for run in (group[0] for group in groups):
        method = run.flags.get("method")
        alike = [other[0].flags for other in groups
                 if (other[0].name, other[0].flags.get("method")) == (run.name, method)]
        words = [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                 for name, value in run.flags.items() if name not in IGNORED
                 and any(other.get(name) != value for other in alike)]
        words = ", ".join([method] * bool(method) + words)
        names.append(": ".join(filter(None, (run.name, words))) or run.folder.name)
    return names


def by_seed(group: list, name: str) -> dict[int, float]:
    """Return a number of each seed: the mean of its runs."""
    return {seed: mean(run.numbers[name] for run in group if run.seed == seed)
            for seed in sorted({run.seed for run in group})}


def summary(name: str, values) -> dict:
    """Return the mean, and half the range of more than one value, as columns of the table."""
    values = list(values)
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
                row |= summary(key, by_seed(group, key).values())
        first = plain.setdefault(group[0].base, group)
        if first is not group:
            own, base = by_seed(group, "accuracy"), by_seed(first, "accuracy")
            alike = own.keys() <= base.keys()
            row |= summary("gain", [own[seed] - base[seed] for seed in own] if alike else
                           [mean(own.values()) - mean(base.values())])
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
    beside = max(1, min(6, 180 // (max(map(len, names)) + 9)))          # labels in a line
    figure = plots.new_figure(13, 4.4 + 0.17 * -(-len(names) // beside))
    left, right = figure.subplots(1, 2)
    for n, (group, name) in enumerate(zip(groups, names, strict=True)):
        colour = colormaps["turbo"]((n + 0.5) / len(groups))
        for axis, found in ((left, [run.curve for run in group]),
                            (right, [run.visible for run in group if run.visible])):
            common = sorted(set.intersection(*map(set, found))) if found else []
            values = [[curve[x] for curve in found] for x in common]
            axis.plot(common, list(map(mean, values)), ("-", "--", ":")[n % 3], color=colour,
                      linewidth=1.6, label=name[:170],
                      marker="o" if len(common) < 12 else None, markersize=3)
            axis.fill_between(common, list(map(min, values)), list(map(max, values)),
                              color=colour, alpha=0.15, linewidth=0)
    plots.frame(left, xlabel="epoch", ylabel="test accuracy, %")
    plots.frame(right, xlabel="visible fraction of the image, %", ylabel="test accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", frameon=False,
                  fontsize=8, ncols=beside)
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
    add("--picture", type=picture, default="compare.png", metavar="FILE.png")
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
