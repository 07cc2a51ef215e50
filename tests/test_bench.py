"""The measuring programs run; what they print is not judged."""
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("words, line", [
    ("sage.py --initial_channels 16 --batch_size 20 --rounds 1 --methods sage comix", "comix"),
    ("resizemix.py mixing --repeats 1", "0.45"),
    ("soft_aug.py --batch_size 8 --repeats 1", "RandAugment"),
    ("safuse.py --rounds 1 --rounds_step 1 --no_table --sizes 32 --initial_channels 16 --batch 4",
     "mixed / plain step"),
    ("samix.py --initial_channels 16 --batch_size 4 --rounds 1", "samix step")])
def test_benches_run(words, line):
    script, *flags = words.split()
    result = subprocess.run([sys.executable, str(ROOT / "tests" / "bench" / script), *flags],
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and line in result.stdout, result.stderr
