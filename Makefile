# Every target sets up what it needs in .venv; nothing is installed globally.
PYTHON ?= python3
PY = .venv/bin/python
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: quickstart test soak check format clean

quickstart: .venv/ready
	$(PY) -m train recipe=quickstart

# one thread in each of several processes: several threads in each would wait for each other
test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

# long loops of faults; DRAFTSMITH_SOAK_MINUTES bounds them
soak: .venv/ready
	$(PY) -m pytest -m soak tests

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# torch first and exactly: a looser requirement would pull the newest release and its CUDA packages
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "draftsmith needs Python 3.11 or newer; call make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt torch==2.13.0
	.venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
