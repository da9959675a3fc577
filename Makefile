# `make talk` and `make test` do all the set-up that is missing. `make help` lists every target.

# The first of these that runs and is new enough; say make PYTHON=/path/to/python for another.
ifndef PYTHON
PYTHON := $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
PYTHON := $(or $(PYTHON),python3)
endif
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help talk tiny test test-all lint format clean distclean voices

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{ printf "make %-10s %s\n", $$1, $$2 }'

talk: $(VENV)/.core voices  ## ask the tiny talker a spoken question, or WAV=your.wav; its reply goes to build/reply.wav
	$(BIN)/python examples/talk_offline.py $(if $(WAV),--question "$(WAV)") $(ARGS)

tiny: $(VENV)/.tiny voices  ## train the tiny talker of examples/tiny_talker from nothing (hours; goes on after a stop)
	$(BIN)/python examples/tiny_talker/make.py $(ARGS)

test: $(VENV)/.dev voices  ## run the tests (pass options on with ARGS="-k delay")
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.dev voices  ## run every test: all model families, slow ones too
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/.dev  ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built and cached
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)

voices:
	@scripts/setup.sh programs espeak-ng flite

$(VENV)/.core: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh venv
	@touch $@

# With the extras comes all that .core promises.
$(VENV)/.tiny: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh venv tiny
	@touch $(VENV)/.core $@

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh venv dev
	@touch $(VENV)/.core $@
