"""A paper's main.py run as users run it, made small by a few flags; comparisons."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from conftest import ROOT

from common import checkpoint, runtime
from common.errors import DataError


def die_at(place, name, calls, delay=0.0):
    """Kill this process when place.name is called for the calls-th time, or `delay` later."""
    function, left = getattr(place, name), [calls]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(*args, **words):
        left[0] -= 1
        if not left[0]:
            threading.Timer(delay, die).start() if delay else die()
        return function(*args, **words)

    setattr(place, name, counted)


KILLED = """
import importlib, sys
sys.path[:0] = {paths!r}
import programs
from common import run, runtime
programs.die_at(run.Run, "ends", {steps})
runtime.launch(lambda: importlib.import_module({module!r}).main(sys.argv[1:]))
"""


def killed(module, words, root, steps: int):
    """Run a program's main() in a process of its own that SIGKILL ends in its `steps`-th step."""
    code = KILLED.format(paths=[str(ROOT), str(ROOT / "tests")], steps=steps, module=module)
    result = subprocess.run([sys.executable, "-c", code, *map(str, words), "--root_dir", str(root)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert result.returncode == -signal.SIGKILL


RANKS = """
import sys
sys.path.insert(0, {root!r})
import importlib, torch, torch.distributed as dist
from common.distributed import log
net = importlib.import_module({module!r}).main(sys.argv[1:])
values = torch.cat([value.double().flatten() for name, value in net.state_dict().items()])
others = [torch.empty_like(values) for _ in range(2)]
dist.all_gather(others, values)
log(f"ranks agree: {{torch.equal(*others)}}")
dist.destroy_process_group()
"""


def two_processes(*command) -> str:
    """Run a python command as torchrun would, in two processes; return what the first printed. When
    one fails, or both take 300 seconds, all that they printed is the error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in "01"]
        ranks = [subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=output, cwd=ROOT,
            env=os.environ | {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONFAULTHANDLER": "1"})
            for rank, output in zip("01", outputs, strict=True)]
        end = time.monotonic() + 300
        while {rank.poll() for rank in ranks} in ({None}, {None, 0}) and time.monotonic() < end:
            time.sleep(0.1)
        for rank in ranks:                  # one that still waits prints where it stands
            if rank.poll() is None:
                rank.send_signal(signal.SIGABRT)
            rank.wait()
        for output in outputs:
            output.seek(0)
        printed = [output.read() for output in outputs]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)
    return printed[0]


def on_two_ranks(tmp_path, module, words) -> str:
    """Run a program's main() in two processes, then compare their networks; return what the first
    printed."""
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), module=module))
    return two_processes(tmp_path / "ranks.py", *words)


class Program:
    """module: a main.py; small: flags that come before all others."""

    def __init__(self, module, small: list[str]):
        self.module, self.small = module, small

    def command(self, *words, root):
        return [sys.executable, self.module.__file__, *self.small, "--root_dir", str(root),
                *map(str, words)]

    def train(self, root, *words):
        """In this process; returns the run's folder."""
        self.module.main([*self.small, "--root_dir", str(root), *map(str, words)])
        return next(root.iterdir())

    def killed(self, *words, root, steps: int):
        killed(self.module.__name__, [*self.small, *words], root, steps)

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


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def relabelled(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of each image replaced by their rank, and from_b (B, S) of labels above 9999."""
    values = [m.unique() for m in maps]
    from_b = torch.zeros(len(maps), max(map(len, values)), dtype=torch.bool)
    for i, value in enumerate(values):
        from_b[i, :len(value)] = value > 9999
    ranks = torch.stack([torch.searchsorted(v, m) for v, m in zip(values, maps, strict=True)])
    return ranks, from_b
