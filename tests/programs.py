"""A paper's main.py run as users run it, made small by a few flags."""
import subprocess
import sys

import pytest
import torch

from common import checkpoint, runtime
from common.errors import DataError


class Program:
    """module: a main.py; small: flags that come before all others."""

    def __init__(self, module, small: list[str]):
        self.module, self.small = module, small

    def command(self, *words, root):
        return [sys.executable, self.module.__file__, *self.small, "--root_dir", str(root),
                *map(str, words)]

    def run(self, *words, root, **options):
        """In a process of its own."""
        return subprocess.run(self.command(*words, root=root), capture_output=True, text=True,
                              timeout=3600, **options)

    def train(self, root, *words):
        """In this process; returns the run's folder."""
        self.module.main([*self.small, "--root_dir", str(root), *map(str, words)])
        return next(root.iterdir())

    def arguments(self, words=""):
        return self.module.parse_args([*self.small, *words.split()])

    def asks_for(self, monkeypatch, words=""):
        """The arguments that it loads its data with."""
        seen = {}

        def load(dataset, place, recipe, **options):
            seen.update(vars(recipe) | options, dataset=dataset, place=place)
            raise DataError("seen")

        monkeypatch.setattr(self.module.data, "load", load)
        with pytest.raises(DataError, match="seen"):
            self.module.main([*self.small, *words.split()])
        return seen

    def faults(self, capsys, *words):
        """Exit code and stderr under the program's own handling of faults."""
        with pytest.raises(SystemExit) as end:
            runtime.launch(lambda: self.module.main([*self.small, *map(str, words)]))
        return end.value.code, capsys.readouterr().err


def weights(folder, name="checkpoint.pt"):
    return checkpoint.load(folder / name)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
