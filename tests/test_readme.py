"""What the READMEs show: the code runs, and all commands are understood."""
import ast
import importlib
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TEXTS = [file.read_text() for file in ROOT.glob("**/README.md") if ".venv" not in file.parts]
TEXTS += [ast.get_docstring(ast.parse(file.read_text())) or ""
          for file in [*ROOT.glob("*/main.py"), *ROOT.glob("samix/*.py")]]
COMMANDS = sorted({line for text in TEXTS for line in re.findall(
    r"(?:python3?|torchrun) [^`\n]*?\.py[^`\n]*", re.sub(r"\\\n *", " ", text).replace("…", "x"))})


def test_the_mixer_in_ones_own_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    names = {"torch": torch, "images": torch.rand(6, 3, 8, 8), "model": model,
             "labels": torch.arange(6) % 5}
    assert '"owner/mixup-zoo", "mixer"' in CODE[0]
    exec(CODE[0].replace('"owner/mixup-zoo", "mixer"', f'"{ROOT}", "mixer", source="local"'), names)
    names["loss"].backward()
    assert names["loss"] > 0 and model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("in_batch", [[], ["--in_batch"]], ids=["one", "in_batch"])
def test_a_method_of_ones_own(tmp_path, in_batch):
    """The README followed to the letter, in a copy of the programs."""
    for folder in ("common", "sage"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sage" / "stripes.py").write_text(CODE[1])
    main = tmp_path / "sage" / "main.py"
    source = main.read_text()
    for before, after in (('METHODS = {', 'METHODS = {"stripes": "Stripes", '),
                          ("from sage import ", "from sage.stripes import stripe_mix\n"
                                                "from sage import "),
                          ('    elif args.method == "cutmix":\n',
                           CODE[2] + '\n    elif args.method == "cutmix":\n')):
        assert source.count(before) == 1
        source = source.replace(before, after)
    main.write_text(source)
    done = subprocess.run(
        [sys.executable, str(main), "--dataset", "digits", "--method", "stripes", "--arch",
         "preactresnet18", "--initial_channels", "4", "--image_size", "8", "--max_steps", "2",
         "--root_dir", str(tmp_path / "runs"), *in_batch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert next((tmp_path / "runs").glob("*/mixed.png")).is_file()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, capsys):
    words = shlex.split(line, comments=True)
    place = next(word for word in words if word.endswith(".py"))
    assert (ROOT / place).is_file()
    if re.search("bench|make_recordio|export|compare", place):      # these look for their files
        return
    program = importlib.import_module(place[:-3].replace("/", "."))
    words = [word for before, word in itertools.pairwise(words)        # "…": further flags
             if word != "x" or before.startswith("--")]
    args = program.parse_args(words[words.index(place) + 1:])
    assert "no effect" not in capsys.readouterr().err
    processes = [int(n) for n in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", line)]
    assert " x" in line or getattr(args, "batch_size", 0) % math.prod(processes) == 0
