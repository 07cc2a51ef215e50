"""What the READMEs show: the code runs, and all commands are understood."""
import ast
import importlib
import math
import re
import shlex

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({line for file in ROOT.glob("**/README.md") if ".venv" not in file.parts
                   for line in file.read_text().splitlines()
                   if re.match(r"(python3?|torchrun) .*\.py", line)})
for file in sorted([*ROOT.glob("*/main.py"), *ROOT.glob("samix/*.py")]):     # and their docstrings
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    COMMANDS += re.findall(r"(?:python3?|torchrun) .*\.py.*", re.sub(r"\\\n *", " ", text))
COMMANDS = [line for line in COMMANDS if "…" not in line]


def test_a_mixing_function_in_ones_own_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    names = {"torch": torch, "images": torch.randn(6, 3, 8, 8), "model": model,
             "labels": torch.arange(6) % 5, "num_classes": 5}
    exec(CODE[0], names)
    names["loss"].backward()
    assert names["loss"] > 0 and model[1].weight.grad.abs().sum() > 0


def test_a_method_of_ones_own():
    names = {}
    exec(CODE[1], names)
    images = torch.randn(4, 3, 8, 10)
    mixed, ratio = names["stripe_mix"](images, torch.tensor([1, 2, 3, 0]), torch.tensor(3),
                                       torch.tensor(0.7))
    assert ratio.tolist() == pytest.approx([0.7] * 4)
    stays = (mixed == images).all((0, 1, 2))
    assert stays.tolist() == [column not in (0, 1, 2) for column in range(10)]
    source = (ROOT / "sage" / "main.py").read_text()        # where the branch of CODE[2] goes
    branch = '    elif args.method == "cutmix":\n'
    compile(source.replace(branch, CODE[2] + "\n" + branch), "main.py", "exec")
    assert branch in source and "METHODS = [" in source


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, tmp_path):
    words = shlex.split(line, comments=True)
    place = next(word for word in words if word.endswith(".py"))
    assert (ROOT / place).is_file()
    if "bench" in place or "make_recordio" in place:        # these look for their files at once
        return
    program = importlib.import_module(place[:-3].replace("/", "."))
    args = program.parse_args(words[words.index(place) + 1:])
    processes = [int(n) for n in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", line)]
    assert getattr(args, "batch_size", 0) % math.prod(processes) == 0
