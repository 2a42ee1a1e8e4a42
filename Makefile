# Everything a newcomer types.  Each target sets up what it needs in $(VENV) and can be run again at any time.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-whole test-slow test-latest bench-allocation bench-depth bench-recovery bench-search bench-masks bench-mixtures recipes families docs check clean
help:
	@echo "make demo       prune a real model and see what it cost (first run fetches about 120 MB)"
	@echo "make test       the fast test suite"
	@echo "make test-whole  every case of every law, of which the fast suite runs a covering set"
	@echo "make test-slow  the tests on the real model"
	@echo "make test-latest  the fast test suite with the newest releases of what billhook needs, in an environment of its own"
	@echo "make bench-allocation CALIBRATION=train.txt TEXTS='valid.txt demo'   the table of allocations and layouts (hours)"
	@echo "make bench-depth TRAIN=train.txt TEXTS='valid.txt demo'   which layers to drop, for which training budget (hours; goes on)"
	@echo "make bench-recovery STUDENT=smaller TRAIN=train.txt TEXTS='valid.txt demo'   what heals a cut best (goes on)"
	@echo "make bench-search TRAIN=train.txt VALID=valid.txt TEXTS=demo   what a search for samples and metric is worth (hours; goes on)"
	@echo "make bench-masks CALIBRATION=train.txt TEXTS='valid.txt demo'   what each method that makes zeros leaves (hours; goes on)"
	@echo "make bench-mixtures CALIBRATION=train.txt TEXTS=valid.txt   fewer experts in a small mixture, trained for it (minutes)"
	@echo "make recipes    run every recipe, compare its numbers (an hour; TEXTS=FOLDER: where wiki_train.txt lies)"
	@echo "make families   write docs/families.md anew, and docs/derived.json where it lacks a type (goes on)"
	@echo "make docs       build the site into build/site, strictly: no broken link"
	@echo "make check      lint, format, types"
	@echo "make clean      remove $(VENV) and $(VENV)-latest"

demo: $(VENV)/.base
	$(VENV)/bin/billhook demo

# at most 5 minutes on two cores: what a law's cases multiply to is thinned by tests/covering.py
test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --durations=20

test-whole: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --durations=20 -m 'not slow'

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

# whatever is newest today, but for torch, of which only the version is fixed that constraints.txt names
test-latest:
	@rm -rf $(VENV)-latest
	@$(PYTHON) -m venv $(VENV)-latest
	@grep '^torch==' constraints.txt > $(VENV)-latest/torch.txt
	@$(VENV)-latest/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-latest/torch.txt -e '.[test]'
	$(VENV)-latest/bin/python -m pip list | grep -i -E '^(torch|transformers|accelerate|peft|pytest) '
	$(VENV)-latest/bin/python -m pytest -n 2 --dist worksteal

bench-allocation: $(VENV)/.base
	$(VENV)/bin/python benchmarks/allocation.py demo $(CALIBRATION) $(TEXTS) --evaluate-dtype bfloat16

bench-depth: $(VENV)/.base
	$(VENV)/bin/python benchmarks/depth.py demo $(TRAIN) $(TEXTS)

bench-recovery: $(VENV)/.test
	$(VENV)/bin/python benchmarks/recovery.py $(STUDENT) demo $(TRAIN) $(TEXTS)

bench-search: $(VENV)/.test
	$(VENV)/bin/python benchmarks/search.py demo $(TRAIN) $(VALID) $(TEXTS)

bench-masks: $(VENV)/.base
	$(VENV)/bin/python benchmarks/masks.py demo $(CALIBRATION) $(TEXTS)

bench-mixtures: $(VENV)/.base
	$(VENV)/bin/python benchmarks/mixtures.py $(CALIBRATION) $(firstword $(TEXTS))

recipes: $(VENV)/.base
	$(VENV)/bin/python benchmarks/recipes.py $(if $(TEXTS),--texts $(TEXTS))

families: $(VENV)/.dev
	$(VENV)/bin/python tests/derived_types.py
	$(VENV)/bin/python tests/families_page.py > docs/families.md

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python src

clean:
	rm -rf $(VENV) $(VENV)-latest

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("billhook needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing billhook into $(VENV)"
	@$(PIP) -e . && touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing billhook with its test extra into $(VENV)"
	@$(PIP) -e '.[test]' && touch $@ $(VENV)/.base

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing billhook with its docs extra into $(VENV)"
	@$(PIP) -e '.[docs]' && touch $@ $(VENV)/.base

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing billhook with its dev extra into $(VENV)"
	@$(PIP) -e '.[dev]' && touch $@ $(VENV)/.test $(VENV)/.base
