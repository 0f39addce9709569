# make demo · make test · make check: each enough by itself on a fresh machine with Python and make.
#   PYTHON=python3.12   the interpreter .venv is made with
#   DALI=cuda13         DALI's wheel for CUDA 13 (default: cuda12; both run on a machine without a GPU)
#   ARGS='--seed 1'     more arguments for the program of the target

PYTHON ?= python3
DALI ?= cuda12
ARGS ?=

python := .venv/bin/python
# One stamp per wheel: both wheels in one environment would overwrite each other.
ready := .venv/.ready-$(DALI)

.PHONY: demo test check mutants soak gpu test-gpu bench figures

demo: $(ready)
	$(python) -m pipelines.demo $(ARGS)

test: $(ready)
	$(python) -m pytest -n 2 --dist loadscope $(ARGS)

check: $(ready)
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy lumix_dali pipelines benchmarks experiments
	$(python) -m tests.consumer  # the docs' examples, as a user's strict mypy sees them
	$(python) -m benchmarks.plot --check

mutants: $(ready)  # one-line faults, each of which a test must catch
	$(python) -m tests.mutants $(ARGS)

soak: $(ready)  # the long tests: leaks, ranks killed and resumed, every recipe for two steps
	$(python) -m pytest -m 'slow and not gpu' -s $(ARGS)

bench: $(ready)  # this loader against others, on generated images or ARGS='--data DIR'
	$(python) -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(python) -m benchmarks.loaders --out runs/loaders.json $(ARGS)

figures: $(ready)  # pictures and README tables from benchmarks/results
	$(python) -m benchmarks.plot

gpu: $(ready)  # all that needs a GPU, in one visit of minutes: ARGS='--minutes 9 --out DIR --cifar DIR'
	$(python) -m benchmarks.gpu $(if $(findstring --out,$(ARGS)),,--out runs/gpu) $(ARGS)

test-gpu: $(ready)  # the GPU tests alone
	$(python) -m pytest -m gpu $(ARGS)

$(ready): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("lumix_dali needs Python 3.11 to 3.14, and $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@case "$$(ls .venv/.ready-* 2>/dev/null)" in ""|$@) ;; *) echo "another DALI wheel in .venv: making it anew"; rm -rf .venv ;; esac
	@echo "installing into .venv (PyTorch and DALI: about 7 GB at the first time, some minutes)"
	$(PYTHON) -m venv .venv
	$(python) -m pip install --disable-pip-version-check --editable '.[$(DALI),dev]'
	@touch $@
