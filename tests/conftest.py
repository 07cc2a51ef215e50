"""Paths of the golden vectors and of the trial data, the devices that tests run on, and skips."""
import importlib.util
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")      # small work; also in the programs tests start

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from pictures import HAS_DALI  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"            # CIFAR images live here, never in the project
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

ABSENT = [name for name, there in (("gco", importlib.util.find_spec("gco")), ("dali", HAS_DALI))
          if not there]


def pytest_collection_modifyitems(items):
    """Skip the cases whose parameters name a library that is not installed."""
    for item in items:
        words = re.findall(r"\b[a-z]+\b", item.nodeid.partition("[")[2])
        for name in set(ABSENT) & set(words):
            item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))


@pytest.fixture(autouse=True)
def full_precision():
    """Exact fp32: programs that ran in this process before may have allowed TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False


def golden_cases(paper: str, prefix: str) -> list:
    """Golden files of one case as pytest parameters: our own, and those of ../shared if there."""
    folders = [ROOT / "tests" / "golden" / paper, SHARED / "golden" / paper]
    files = {path.name: path for folder in reversed(folders)
             for path in folder.glob(f"{prefix}*")}
    assert files, f"no golden file {paper}/{prefix}*"
    return [pytest.param(path, id=name.rsplit(".", 1)[0]) for name, path in sorted(files.items())]


class Golden(dict):
    """Arrays of one golden file; `case.tensor(name, device)` gives a torch tensor."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            super().__init__({name: arrays[name] for name in arrays.files})

    def tensor(self, name: str, device="cpu") -> torch.Tensor:
        return torch.from_numpy(np.asarray(self[name])).to(device)


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def s20():
    """Path of the trial set S20; skips where it is absent."""
    path = SHARED / "data" / "s20.npz"
    if not path.exists():
        pytest.skip("the trial set S20 holds CIFAR images and lies outside the project")
    return path
