# `make demo` and `make test` need Python >= 3.11 and make; each sets itself up in .venv first.
# Another interpreter: make PYTHON=python3.12 demo. Set-up runs again only when a requirements file changes.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

.PHONY: help setup setup-optional setup-torch setup-dev test test-gpu demo demo-real lint clean

help:
	@echo "make demo       the whole walkthrough on the embedded model (DEMO_FLAGS=--short for a quick look)"
	@echo "make demo-real  SFT, PPO and DPO of a real chat model, 24 minutes on two cores; goes on after a stop (DEMO_FLAGS=--short)"
	@echo "make test       all tests, PyTorch parity included"
	@echo "make test-gpu   what this machine is, and the tests that need a GPU; for a report"
	@echo "make lint       ruff and mypy"
	@echo "make setup      .venv and its requirements only"
	@echo "make setup-optional   and what some features need: data sets of the hub, synth.tune's example"
	@echo "make setup-torch      and PyTorch, for pytorch_ppo_training.py"
	@echo "make clean      remove .venv and the tools' caches; runs and weights stay"

setup: $(VENV)/.stamp-setup
setup-optional: $(VENV)/.stamp-optional
setup-torch: $(VENV)/.stamp-torch
setup-dev: $(VENV)/.stamp-dev

demo: setup
	$(VENV)/bin/python demo.py $(DEMO_FLAGS)

demo-real: setup
	$(VENV)/bin/python demo_real.py $(DEMO_FLAGS)

test: setup-torch
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

test-gpu: setup
	-$(VENV)/bin/python -m models.doctor --quick
	$(VENV)/bin/python -m pytest -m gpu -v $(PYTEST_FLAGS) tests/test_gpu.py

lint: setup-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "error: $(PYTHON) is not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import platform, sys; sys.exit(platform.system() == "Darwin" and platform.machine() != "arm64")' || \
	  { echo "error: $(PYTHON) is an Intel build or runs under Rosetta, and mlx needs one for Apple silicon; name it: make PYTHON=/opt/homebrew/bin/python3" >&2; exit 1; }
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-setup: requirements.txt $(VENV)/.stamp-venv
	$(PIP) install -r requirements.txt
	if $(VENV)/bin/python models/cpu/blas.py --needs-mkl; then $(PIP) install mkl; fi
	@touch $@

$(VENV)/.stamp-optional: requirements-optional.txt $(VENV)/.stamp-setup
	$(PIP) install -r requirements-optional.txt
	@touch $@

# torch first and alone: installed together with what depends on it, pip may settle on another version.
$(VENV)/.stamp-torch: requirements-torch.txt requirements-optional.txt $(VENV)/.stamp-setup
	$(PIP) install "$$(grep '^torch==' requirements-torch.txt)"
	$(PIP) install -r requirements-torch.txt -r requirements-optional.txt
	@touch $@

$(VENV)/.stamp-dev: requirements-dev.txt $(VENV)/.stamp-setup
	$(PIP) install -r requirements-dev.txt
	@touch $@
