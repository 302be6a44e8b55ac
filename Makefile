# `make` alone lists the commands. Everything is installed in .venv here; nothing needs root.
.PHONY: help env demo demo-vision test lint bench clean
unexport PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET PIP_USER

# Tools of .venv first; and a home directory in it, for what torch and others compile and cache:
# nothing is left elsewhere, and a missing or read-only home does no harm.
HOME_DIR := $(CURDIR)/.venv/home
RUN = mkdir -p $(HOME_DIR) && export HOME=$(HOME_DIR) XDG_CACHE_HOME=$(HOME_DIR)/.cache \
	TORCHINDUCTOR_CACHE_DIR=$(HOME_DIR)/.cache/inductor \
	VIRTUAL_ENV=$(CURDIR)/.venv PATH="$(CURDIR)/.venv/bin:$$PATH" && exec

help:
	@echo 'make demo    train a small nested model, take submodels out of it, write a report page'
	@echo 'make demo-vision   the same for a vision encoder, and adaptive retrieval with it'
	@echo 'make test    ruff, mypy and all tests that this machine can run'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make bench   measure: every question of benchmarks/, results under benchmarks/results/'
	@echo 'make env     the environment alone, in .venv; the others make it too, and reuse it'
	@echo 'make clean   remove .venv, caches and build outputs; runs/ stays'
	@echo
	@echo 'PYTHON=python3.12 make env     chooses the interpreter, 3.10 to 3.13'
	@echo 'The usual variables of pip (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose the index.'
	@echo 'Without a GPU, an extra index of CPU builds of torch saves gigabytes of CUDA libraries.'

env:
	@.ci/environment

demo: env
	@$(RUN) python -m matformer_dist.demo

demo-vision: env
	@$(RUN) python -m matformer_dist.demo_vision

test: lint
	@$(RUN) python -m pytest -n auto --maxprocesses 4 tests

lint: env
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

bench: env
	@set -e; for name in loss nested_ffn training_step prepare_data conversion checkpoint memory scaling; do \
		echo "== $$name"; ($(RUN) python -m benchmarks.$$name); done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	rm -f matformer_dist/_native.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
