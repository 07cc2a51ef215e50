#!/usr/bin/env python3
"""Write the tables of P100 into the READMEs and RESULTS.md, from the logs in tests/bench/logs/p100.

    python tests/bench/write_tables.py
"""
import re
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import compare
from common import files, runtime

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "tests" / "bench" / "logs" / "p100"
HEAD = "| method | program | step time / plain (CPU / H200) |"       # of README.md's table
RUNS = {"Mixup": "sage: input", "Manifold Mixup": "sage: manifold", "CutMix": "sage: cutmix",
        "SaliencyMix": "sage: saliencymix", "Puzzle Mix": "sage: puzzle", "Co-Mixup": "sage: comix",
        "SAGE": "sage: sage", "ResizeMix": "resizemix: resizemix True",
        "Soft Augmentation": "soft_aug: da 2, loss st", "SAFuse": "safuse: safuse",
        "LGCOAMix": "safuse: lgcoamix", "OcCaMix": "safuse: occamix",
        "AutoMix": "samix: automix", "SAMix": "samix: samix"}


def rounded(value: float, sign: str = "") -> str:
    """One decimal, halves up: accuracies are multiples of 0.05."""
    return f"{value + 1e-9:{sign}.1f}"


def front_row(line: str, groups: dict[str, list], rows: dict[str, dict]) -> str:
    """A row of README.md's table, its name, program, step and reported figure as they are."""
    name, program, step, *_, reported = (cell.strip() for cell in line.strip("|\n").split("|"))
    row, group = rows[RUNS[name]], groups[RUNS[name]]
    plain = next(other for label, other in groups.items()
                 if label.partition(":")[0] == row["run"].partition(":")[0])

    def pair(key):                      # of the same seeds, as the gain
        own, base = compare.by_seed(group, key), compare.by_seed(plain, key)
        both = own if own.keys() <= base.keys() else base
        return f"{rounded(mean(base[seed] for seed in both))} → {rounded(mean(own.values()))}"

    spread = f" ± {rounded(row['gain spread'])}" if "gain spread" in row else ""
    cells = [name, program, step, str(row["seeds"]), rounded(row["accuracy"]),
             rounded(row["gain"], "+") + spread, pair("ECE"), pair("visible 47 %"),
             pair("FGSM 8/255"), reported]
    return "| " + " | ".join(cells) + " |"


def documents() -> dict[Path, str]:
    """The new text of each document that has such a table."""
    groups = compare.find([str(LOGS)], 5)
    names = compare.labels(groups)
    rows = [{key: value for key, value in row.items() if not key.startswith("s/epoch")}
            for row in compare.lines(groups, names)]        # runs shared their machines
    head, rule, *table = compare.text(rows, markdown=True).split("\n")
    found = {}
    for path in (LOGS.parents[1] / "RESULTS.md",
                 *(main.with_name("README.md") for main in sorted(ROOT.glob("*/main.py")))):
        own = [line for line in table if path.name == "RESULTS.md"
               or line.startswith(f"| {path.parent.name}: ")]
        new = "\n".join([head, rule, *own, ""])
        text, count = re.subn(r"\| run \| seeds \|.*\n(\|.*\n)+", lambda _, new=new: new,
                              path.read_text(), count=1)
        assert count == 1, path
        found[path] = text
    before, begin, after = (ROOT / "README.md").read_text().partition(HEAD)
    lines = (begin + after).split("\n")
    end = next(n for n, line in enumerate(lines) if not line.startswith("|"))
    by_name = [dict(zip(names, values, strict=True)) for values in (groups, rows)]
    front = [front_row(line, *by_name) for line in lines[2:end]]
    found[ROOT / "README.md"] = before + "\n".join([*lines[:2], *front, *lines[end:]])
    return found


def main():
    for path, text in documents().items():
        files.write_atomic(path, text)


if __name__ == "__main__":
    runtime.launch(main)
