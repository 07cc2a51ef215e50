"""Kills one training run again and again with SIGKILL and resumes it; counts what came of it.

    python tests/kill_and_resume.py KILLS FOLDER [FLAGS OF sage/main.py …]

Every second kill comes while a file of the run is being written, the others at a random moment of a
random step: whatever the machine's speed. Children are forks of this process, which has imported
everything already.
"""
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from programs import die_at

from common import data, run, runtime
from sage import main as sage

kills, root, words = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
data.load("digits", "", batch_size=10, device=torch.device("cpu"))
random.seed(0)
counts = {"random moment": 0, "writing": 0}
while True:
    moment = "writing" if sum(counts.values()) % 2 else "random moment"
    places = random.choice([(torch, "save"), (os, "fsync"), (os, "replace")])
    calls, delay = random.randint(1, 6), random.uniform(1e-6, 0.02)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if sum(counts.values()) < kills and moment == "writing":
            die_at(*places, min(calls, 3))
        elif sum(counts.values()) < kills:
            die_at(run.Run, "ends", calls, delay)
        runtime.launch(lambda: sage.main([*words, "--root_dir", str(root), "--resume", "auto"]))
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        break
    counts[moment] += os.WTERMSIG(status) == signal.SIGKILL
print(f"killed while writing: {counts['writing']}, at a random moment: {counts['random moment']}; "
      f"ended with {os.WEXITSTATUS(status)}")
