"""Kills one training run again and again with SIGKILL and resumes it; counts what came of it.

    python tests/kill_and_resume.py KILLS FOLDER [FLAGS OF sage/main.py …]

Every second kill comes while a file of the run is being written, the others at random moments.
Children are forks of this process, which has imported everything already.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import data, runtime
from sage import main as sage

kills, root, words = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
data.load("digits", "", batch_size=10, device=torch.device("cpu"))
random.seed(0)
counts = {"random moment": 0, "writing": 0}
while True:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        runtime.launch(lambda: sage.main([*words, "--root_dir", str(root), "--resume", "auto"]))
    moment = "writing" if sum(counts.values()) % 2 else "random moment"
    start, wait = time.monotonic(), random.uniform(0.2, 1.2)
    while sum(counts.values()) < kills and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        passed = time.monotonic() - start
        if passed > wait and (moment != "writing" or any(root.glob("*/.*.new"))):
            os.kill(child, signal.SIGKILL)
            counts[moment] += 1
            break
        time.sleep(0 if moment == "writing" else 0.005)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        break
print(f"killed while writing: {counts['writing']}, at a random moment: {counts['random moment']}; "
      f"ended with {os.WEXITSTATUS(status)}")
