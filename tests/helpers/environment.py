"""The environment of all tests, to be imported before anything else; also by scripts that tests run."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; a test never waits for a network

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from milora_lightning.utils.folders import cache_folder

# Tests neither read the user's cached decompositions nor add to them; the converted model is theirs too.
_cache = Path(tempfile.mkdtemp(prefix="milora-tests-"))
atexit.register(shutil.rmtree, _cache)
(cache_folder() / "models").mkdir(parents=True, exist_ok=True)
(_cache / "models").symlink_to((cache_folder() / "models").absolute())
os.environ["MILORA_CACHE"] = str(_cache)

# The models are tiny: a second thread costs more than it brings, the more so on a busy machine.
torch.set_num_threads(1)
