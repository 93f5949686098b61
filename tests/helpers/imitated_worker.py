"""Does as a worker of a comparison would, without a model: the seed decides what becomes of a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

FAILS, DIES, WAITS = 90, 91, 92
"""Seeds of runs that end otherwise than well."""


def work() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        method, rate, seed = (job["run"][name] for name in ("method", "learning_rate", "seed"))
        Path(job["log"]).write_text("What a run prints.\n")
        if seed == DIES:
            os._exit(3)
        if seed == WAITS:
            time.sleep(60)
        if seed != FAILS:
            folder = Path(job["output"]) / f"{method}-lr{rate:g}-seed{seed}"
            shutil.copytree(Path(job["output"]).parent / "finished", folder)
            device = [str(os.getpid()), os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES", "")]
            (folder / "device").write_text(" ".join(device))
        print(json.dumps({"done": "It has no data." if seed == FAILS else None}), flush=True)


if __name__ == "__main__":
    work()
