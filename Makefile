# `make help` lists the targets. Each one works by itself on a fresh machine with Python and make.

PYTHON ?= python3
DALI ?= cuda12
CONSTRAINTS ?=
ARGS ?=
DATA ?= data/photographs/train
OUT := benchmarks/results
COMPARED := dali/read,dali/+decode,dali/+normalise,lumix,dali+torchvision,timm FastCollateMixup elem,timm recipe,torchvision v2 collate cutmix+mixup,spdl,webdataset,litdata,mosaic,ffcv
THREADED := dali/+normalise,lumix/none,lumix/cutmix+mixup elem,timm FastCollateMixup elem
PURE := index layout loss mixing_law mutants order reference target
NEWEST := formats engine  # their files are judged by the newest Pillow
QUICK := not compile and not gradcheck and not import_does_not_pull_in and not second_derivatives

python := .venv/bin/python
# OMP_NUM_THREADS below: each of pytest's two workers would start a thread per CPU.
# One stamp per wheel: both wheels in one environment would overwrite each other. --no-compile: Python compiles what is
# imported, a small part of 7 GB, and compiling all took 87 of 216 s of CPU time.
ready := .venv/.ready-$(DALI)

.PHONY: help demo quick test test-lowest check mutants soak bench results evidence figures docs gpu test-gpu
CHECKS := check-types check-examples check-docs check-figures check-style

help:  # this list
	@sed -n 's/^\([a-z-]*\):[^#]*# \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "Every other target installs into .venv first, if needed (PyTorch and DALI: about 7 GB). Options:"
	@echo "  PYTHON=python3.12   the interpreter that .venv is made with (3.11 to 3.14)"
	@echo "  DALI=cuda13         DALI's wheel for CUDA 13 (default: cuda12; both run on a machine without a GPU)"
	@echo "  CONSTRAINTS=tests/tested.txt   exactly the versions that the maintainers tested"
	@echo "  ARGS='--seed 1'     more arguments for the program that the target runs"

demo: $(ready)  # train a timm model on real handwritten digits: about 6 minutes on 2 cores
	$(python) -m pipelines.demo $(ARGS)

quick: $(ready)  # only the tests that need neither DALI nor a compiler: about half a minute on 2 cores
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 -k "$(QUICK)" $(foreach name,$(PURE),tests/test_$(name).py) $(ARGS)

test: $(ready)  # every test that needs no GPU and no patience: about 6 minutes on 2 cores
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-lowest: .venv-lowest/.ready  # the tests with the lowest promised versions, in .venv-lowest, on Python 3.11
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(foreach name,$(NEWEST),--ignore tests/test_$(name).py) $(ARGS)

check: $(ready)  # formatting, lint, types, the documentation's examples and figures
	@$(MAKE) --no-print-directory --jobs 2 --output-sync $(CHECKS)

$(CHECKS): FORCE  # parts of `check`, not files
FORCE:
check-style:
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	PYTHONPATH=. .venv/bin/lint-imports
check-types:
	$(python) -m mypy lumix_dali pipelines benchmarks experiments
# The documentation's examples, as a user's strict mypy sees them.
check-examples:
	$(python) -m tests.consumer
check-docs:
	$(python) -m pytest tests/test_docs.py -k "links or anchors or commands or every_page"
check-figures:
	$(python) -m benchmarks.plot --check
	$(python) -m experiments.evidence report --check

mutants: $(ready)  # put faults into a copy of the code and list those that no test notices: hours
	$(python) -m pip install --quiet --disable-pip-version-check 'mutmut>=3.8'
	$(python) -m mutmut run $(ARGS)
	$(python) -m mutmut results
	$(python) -m tests.mutants

soak: $(ready)  # the slow tests: leaks, killed and resumed ranks, every recipe for two steps
	$(python) -m pytest -m 'slow and not gpu' -s $(ARGS)

bench: $(ready)  # compare this loader with others, on generated images or ARGS='--data DIR'
	$(python) -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(python) -m benchmarks.loaders --out runs/loaders.json $(ARGS)

results: $(ready)  # measure what the pages show, an hour on an idle machine: DATA=DIR of photographs in class folders
	$(python) -m benchmarks.loaders --out $(OUT)/loaders.json --data $(DATA) --rounds 9 --batch-size 64 --only '$(COMPARED)'
	$(python) -m benchmarks.loaders --out $(OUT)/loaders-threads.json --data $(DATA) --rounds 5 --batch-size 64 --threads 1,2,4,8 --only '$(THREADED)'
	ATEN_CPU_CAPABILITY=default $(python) -m benchmarks.loaders --out $(OUT)/loaders-no-avx2.json --data $(DATA) --rounds 5 --batch-size 64 --only '$(THREADED)'
	$(python) -m benchmarks.cost --out $(OUT)/cost-loader.json --data $(DATA) --rounds 9 --batch-size 128 --parts loader
	$(python) -m benchmarks.cost --out $(OUT)/cost-cpu.json --data $(DATA) --rounds 9 --batch-size 64 --batches 20 --parts cpu,mixing,host,tiny,large
	$(python) -m benchmarks.loss --out $(OUT)/loss.json --rounds 9 --batch-sizes 128,256 --classes 10,1000,21841 --dtypes float32
	$(python) -m benchmarks.mix --out $(OUT)/mix.json --rounds 9
	$(python) -m benchmarks.scaling --out $(OUT)/scaling.json
	$(python) -m benchmarks.cost --out $(OUT)/cost-resnet50.json --data $(DATA) --rounds 9 --batch-size 8 --steps 2 --parts model,step,epoch --model resnet50
	$(python) -m benchmarks.cost --out $(OUT)/cost-deit_small.json --data $(DATA) --rounds 9 --batch-size 32 --steps 1 --parts step --model deit_small_patch16_224 --only 'cutmix replayed,lumix replayed'
	$(MAKE) figures

evidence: $(ready)  # does LUMix help? train the models of experiments/PLAN.md, or go on with them: hours
	$(python) -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(python) -m experiments.evidence run $(ARGS)
	$(python) -m experiments.evidence report

figures: $(ready)  # redraw the figures and tables from benchmarks/results
	$(python) -m benchmarks.plot
	$(python) -m experiments.evidence report

docs: $(ready)  # the site, from docs/ and the docstrings: site/index.html
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(python) -m mkdocs build --strict $(ARGS)

gpu: $(ready)  # what needs a GPU, in eight minutes: ARGS='--out DIR --images DIR --old-dali DIR'
	$(python) -m benchmarks.gpu $(if $(findstring --out,$(ARGS)),,--out runs/gpu) $(ARGS)

test-gpu: $(ready)  # only the GPU tests
	$(python) -m pytest -m gpu $(ARGS)

$(ready): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("lumix_dali needs Python 3.11 to 3.14, and $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@case "$$(ls .venv/.ready-* 2>/dev/null)" in ""|$@) ;; *) echo "another DALI wheel in .venv: making it again"; rm -rf .venv ;; esac
	@echo "installing into .venv (the first time about 7 GB for PyTorch and DALI, which takes some minutes)"
	$(PYTHON) -m venv .venv
	$(python) -m pip install --no-compile --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable '.[$(DALI),dev]'
	@touch $@

.venv-lowest/.ready: pyproject.toml tests/lowest.txt
	python3.11 -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --no-compile --disable-pip-version-check -c tests/lowest.txt --editable '.[cuda12,segmentation]' aiohttp google-crc32c hypothesis pytest pytest-xdist 'setuptools>=77' wheel
	@touch $@
