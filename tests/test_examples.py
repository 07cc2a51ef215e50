"""The examples run as a user runs them, where their library is installed."""
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LIBRARIES = {"timm_mixup_fn": "timm", "lightning_sage": "lightning",
             "transformers_trainer": "transformers", "torchvision_collate": "torchvision",
             "plain_samix": "torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_trains(path, tmp_path):
    pytest.importorskip(LIBRARIES[path.stem], reason="pip install -r requirements-examples.txt")
    assert len(path.read_text().splitlines()) < 50
    code = (f"text = open({str(path)!r}).read().replace('STEPS = 100', 'STEPS = 2')\n"
            f"exec(compile(text, {str(path)!r}, 'exec'), {{'__file__': {str(path)!r},"
            "'__name__': '__main__'})")
    end = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert 0 < float(end.stdout.split()[-1]) < 50
