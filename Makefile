# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Either makes .venv if need be.

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
DATA := datasets/openmoji32
MASKALIGN := $(VENV)/bin/maskalign

.PHONY: help quickstart test install clean

help:
	@echo "make quickstart   install, build the example data, train for about seven minutes, draw pictures"
	@echo "make test         install and run the tests (PYTEST_ARGS='-m slow' chooses others)"
	@echo "make install      only make $(VENV)"
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
	@cat configs/quickstart-next.txt

test: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(DATA) $(RUN)
