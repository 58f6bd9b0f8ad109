# Two commands: `make figures` and `make test`. Both set up .venv by themselves, from requirements.txt.
# Needs Python >= 3.10 (PYTHON=python3.12 picks another), make, and a package index.

PYTHON    ?= python3
VENV      ?= .venv
SCALE     ?= quick
NOTEBOOKS ?=
ITEMS     ?=
# Jobs at a time on this machine, and how many of them may share its GPU.
CORES     ?= all
GPU_JOBS  ?= 1
# What Snakemake leaves unsaid; QUIET=progress shows its own messages.
QUIET     ?= all

RUN       := $(VENV)/bin/python -m
# Silent but for errors.
PIP       := $(RUN) pip install -qq --disable-pip-version-check --no-deps
INSTALLED := $(VENV)/.installed
SHELL     := bash
.DELETE_ON_ERROR:

help:  ## this list
	@echo "usage: make TARGET [SCALE=smoke|quick|fast|paper]"; echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | while read -r name text; do \
	  printf "  %-8s %s\n" "$$name" "$$text"; done
	@echo; echo "Options of figures and plan: NOTEBOOKS='repair/04_repair ...', ITEMS='repair/fig3-left ...', CORES=4, GPU_JOBS=2"

figures: $(INSTALLED)  ## make every figure that is missing or out of date, at SCALE (quick)
	@began=$$(date +%s); status=0; \
	$(RUN) snakemake --cores $(CORES) --resources gpu=$(GPU_JOBS) --keep-going --rerun-incomplete --nolock \
	    --rerun-triggers mtime --scheduler greedy --quiet $(QUIET) \
	    --config scale="$(SCALE)" $(if $(NOTEBOOKS),notebooks="$(NOTEBOOKS)") $(if $(ITEMS),items="$(ITEMS)") || status=$$?; \
	$(VENV)/bin/python workflow/batch.py summary --scale "$(SCALE)" --since $$began; \
	[ $$status = 0 ] || echo "Not everything could be made; if nothing above says why, try: make figures QUIET=progress"; \
	exit $$status
# --nolock: nothing is left to unlock after a kill. Two calls at once are safe, as jobs lock what they write.

plan: $(INSTALLED)  ## list what figures would make at SCALE, and roughly how long it would take here
	@$(VENV)/bin/python workflow/plan.py --scale "$(SCALE)" --notebooks "$(NOTEBOOKS)" --items "$(ITEMS)" \
	    --cores "$(CORES)" --gpu-jobs "$(GPU_JOBS)"

test: $(INSTALLED)  ## lint, unit tests, doctests, and every notebook at smoke scale
	@$(RUN) ruff check --quiet . && status=0 || status=1; \
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT; \
	REPAIRLIB_RUNS="$$scratch/runs" REPAIRLIB_FIGURES="$$scratch/figures" OMP_NUM_THREADS=1 \
	$(RUN) pytest -q -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
	    --ignore-glob 'notebooks/*.py' notebooks tests repairlib companion workflow docs/guide.md || status=1; \
	exit $$status
# Empty folders for runs and figures, so that nothing made earlier hides a fault.

lab: $(INSTALLED)  ## open JupyterLab
	$(RUN) jupyterlab notebooks/00_quickstart.ipynb

sync: $(INSTALLED)  ## bring every notebook's .py and .ipynb in line (the newer wins) and strip outputs
	@$(VENV)/bin/python workflow/batch.py sync

readme: figures  ## copy the pictures and the scorecard that README.md shows
	@mkdir -p figures/readme && cp figures/quick/repair/fig2_left.png figures/quick/repair/fig3_middle.png \
	    figures/quick/combine/fig3.png figures/quick/combine/figB21.png figures/readme/
	@cp figures/scorecard.md docs/

clean:  ## remove what smoke and quick made; keeps .venv, data, checkpoints, fast and paper
	rm -rf build .snakemake figures/smoke figures/quick figures/.staging figures/gallery.html .pytest_cache .ruff_cache

$(INSTALLED): requirements.txt pyproject.toml companion/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "repairlib needs Python >= 3.10, and $(PYTHON) is not; say which: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(VENV) (1 of 3): an empty environment"
	@$(PYTHON) -m venv $(if $(wildcard $(VENV)/.installing),--clear) $(VENV) && touch $(VENV)/.installing
	@echo "Setting up $(VENV) (2 of 3): packages, several GB, mostly PyTorch; a few minutes"
	@$(PIP) -r requirements.txt
	@echo "Setting up $(VENV) (3 of 3): repairlib and its companion"
	@$(PIP) --no-build-isolation -e . -e ./companion
	@rm $(VENV)/.installing && touch $@
# .installing: an installation that was interrupted is started again from nothing.

.PHONY: help figures plan test lab sync readme clean
