# `make quickstart` and `make test` are all that a fresh machine needs: both create .venv where it is missing.

PYTHON ?= python3
VENV ?= .venv
PYTHON_IN := $(VENV)/bin/python
# One per core; each may need 3 GB of memory.
TEST_PROCESSES ?= logical --maxprocesses 4
RUN := runs/quickstart
DATA := datasets/openmoji32
MASKALIGN := $(VENV)/bin/maskalign

define NEXT

Look at:
  $(RUN)/samples/          what the model draws, a row per class, at several stages of training
  $(RUN)/curves.png        loss, alignment, gradient norm, speed; the numbers are in metrics.csv
  $(DATA)/contact_sheet.png  what it learned from, with the teacher's features as colors
Try next:
  $(MASKALIGN) sample $(RUN) --out $(RUN)/pictures --sampler heun --cfg-scale 3
  $(MASKALIGN) train --config configs/quickstart.yaml --run_dir runs/repa --model.mixer none --method.keep_ratio 1.0
  $(VENV)/bin/tensorboard --logdir runs
The pictures are by OpenMoji (openmoji.org), CC BY-SA 4.0; so are samples of a model trained on them.
endef
export NEXT

.PHONY: help quickstart test lint docs install clean

help:
	@echo "make quickstart   install, build the example data, train for about seven minutes, draw pictures"
	@echo "make test         install and run the tests, one process per core (PYTEST_ARGS='-m slow' chooses others)"
	@echo "make lint         formatting, imports, spelling, types of the public functions, and the order of the layers"
	@echo "make docs         build the documentation into site/ and check its links"
	@echo "make install      only create $(VENV)"
	@echo "make clean        remove $(VENV), the example data and its run"

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@

quickstart: install
	$(MASKALIGN) data build openmoji --out $(DATA) --size 32
	$(MASKALIGN) data encode --data $(DATA) --teacher efficientnet-lite0 --normalize mean
	$(MASKALIGN) data show $(DATA) --out $(DATA)/contact_sheet.png
	$(MASKALIGN) train --config configs/quickstart.yaml
	@echo "$$NEXT"

$(VENV)/.lint: setup.py | install
	$(PYTHON_IN) -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

$(VENV)/.docs: setup.py | install
	$(PYTHON_IN) -m pip install --disable-pip-version-check -q -e '.[docs]'
	@touch $@

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/pyright --pythonpath $(PYTHON_IN)
	$(PYTHON_IN) -m pytest -q tests/test_layers.py

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

test: install
# The tests start hundreds of programs, each of which would compile the package anew without its .pyc files.
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(DATA) $(RUN) site build
