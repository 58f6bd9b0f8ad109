# `make quickstart` for a first picture, `make figures` for all, `make test`. Each sets up .venv by itself, from
# requirements.txt.
# Needs Python >= 3.10 (PYTHON=python3.12 picks another), make, and a package index.

PYTHON    ?= python3
VENV      ?= .venv
SCALE     ?= quick
NOTEBOOKS ?=
ITEMS     ?=
# TRAIN=1 trains what `fast` lacks also where there is no GPU, TRAIN=0 nowhere.
TRAIN     ?=
# Jobs at a time on this machine, and how many of them may share its GPU.
CORES     ?= all
GPU_JOBS  ?= 1
# What Snakemake leaves unsaid; QUIET=progress shows its own messages.
QUIET     ?= all
# The folder that says how jobs reach a cluster, and whether each asks for a GPU: 1, 0, or auto, see docs/cluster.md.
PROFILE   ?= workflow/profiles/slurm
GPUS      ?= auto
# More options for Snakemake, and for JupyterLab.
SNAKEMAKE ?=
LAB       ?=

RUN       := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
ifneq ($(TRAIN),)
export REPAIRLIB_TRAIN := $(TRAIN)
endif
SHELL     := bash
.DELETE_ON_ERROR:

help:  ## this list
	@echo "usage: make TARGET [SCALE=smoke|quick|fast|paper]"; echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | while read -r name text; do \
	  printf "  %-10s %s\n" "$$name" "$$text"; done
	@echo; echo "Options of figures and plan: NOTEBOOKS='repair/04_repair ...', ITEMS='repair/fig3-left ...', CORES=4, GPU_JOBS=2"

figures: $(INSTALLED)  ## make every figure that is missing or out of date, at SCALE (quick)
	@$(VENV)/bin/python workflow/jobs.py --scale "$(SCALE)" --notebooks "$(NOTEBOOKS)" --items "$(ITEMS)" \
	    --cores "$(CORES)" --gpu-jobs "$(GPU_JOBS)" --gpus "$(GPUS)" --quiet "$(QUIET)" --snakemake "$(SNAKEMAKE)"
# Two calls at once are safe, as jobs lock what they write.

cluster: $(INSTALLED)  ## like figures, with the jobs on a cluster: see docs/cluster.md
	@$(VENV)/bin/python workflow/jobs.py --scale "$(SCALE)" --notebooks "$(NOTEBOOKS)" --items "$(ITEMS)" \
	    --profile "$(PROFILE)" --gpus "$(GPUS)" --quiet "$(QUIET)" --snakemake "$(SNAKEMAKE)"

quickstart: $(INSTALLED)  ## train two networks, merge and repair them: the first picture, within two minutes
	@$(VENV)/bin/python workflow/jobs.py --scale "$(SCALE)" --notebooks 00_quickstart --cores "$(CORES)" \
	    --gpu-jobs "$(GPU_JOBS)" --quiet "$(QUIET)"
	@echo "To change something and run it again: make lab"

plan: $(INSTALLED)  ## list what figures would make at SCALE, and roughly how long it would take here
	@$(VENV)/bin/python workflow/plan.py --scale "$(SCALE)" --notebooks "$(NOTEBOOKS)" --items "$(ITEMS)" \
	    --cores "$(CORES)" --gpu-jobs "$(GPU_JOBS)"

test: $(INSTALLED)  ## lint, types, unit tests, doctests, and every notebook at smoke scale
	@status=0; $(RUN) ruff check --quiet . || status=1; \
	$(RUN) ruff format --check --quiet . || { echo "Not formatted: run $(RUN) ruff format ."; status=1; }; \
	$(RUN) mypy --no-error-summary || status=1; \
	mkdir -p build; scratch=$$(mktemp -d "$$PWD/build/test.XXXX") && trap 'rm -rf "$$scratch"' EXIT; \
	$(VENV)/bin/python workflow/batch.py copy --to "$$scratch/notebooks" || status=1; \
	REPAIRLIB_RUNS="$$scratch/runs" REPAIRLIB_FIGURES="$$scratch/figures" REPAIRLIB_SCALE=smoke OMP_NUM_THREADS=1 \
	$(RUN) pytest -q -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
	    "$$scratch/notebooks" tests repairlib companion workflow docs/guide.md docs/library.md || status=1; \
	exit $$status
# Empty folders for runs and figures, so that nothing made earlier hides a fault; notebooks made from the .py files, so
# that one that was executed and saved in JupyterLab is no fault.

lab: $(INSTALLED)  ## open JupyterLab
	@if [ "$$(id -u)" = 0 ] && [[ "$(LAB)" != *--allow-root* ]]; then \
	  echo "JupyterLab does not start as root by itself. In a container of your own: make lab LAB='--allow-root --ip=0.0.0.0'"; \
	  exit 1; fi
	$(RUN) jupyterlab --ServerApp.root_dir=. $(LAB) notebooks/00_quickstart.ipynb

docs: $(INSTALLED)  ## write the API reference of repairlib, from its docstrings, into build/api
	@$(VENV)/bin/python workflow/api.py build/api
	@echo "Open build/api/index.html in a browser."

sync: $(INSTALLED)  ## write every notebook's .ipynb anew from its .py, without outputs
	@$(VENV)/bin/python workflow/batch.py sync

readme: figures  ## write the committed pages of quick and fast: docs/gallery.md with its pictures, scorecard, fidelity
	@cp figures/scorecard.md docs/ && $(VENV)/bin/python workflow/batch.py docs && $(VENV)/bin/python docs/fidelity.py

clean:  ## remove what smoke and quick made; keeps .venv, data, checkpoints, fast and paper
	rm -rf build .snakemake figures/smoke figures/quick figures/.staging figures/gallery.html \
	    .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): requirements.txt pyproject.toml companion/pyproject.toml
	@$(PYTHON) workflow/install.py "$(VENV)"

.PHONY: help figures cluster quickstart plan test lab docs sync readme clean
