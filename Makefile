# Everything runs in .venv, which is made at the first use and again when pyproject.toml or constraints.txt change.
# Needs GNU make and Python 3.11 or newer with venv; another interpreter: make test PYTHON=python3.12

PYTHON ?= python3

version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
bin := .venv/bin
python := $(bin)/python
pip_install := $(python) -m pip install --disable-pip-version-check --constraint constraints.txt
runtime := .venv/runtime-$(version)
develop := .venv/develop-$(version)
pytest := OMP_NUM_THREADS=1 $(python) -m pytest

.PHONY: help demo test test-all test-gpu gates lint format-check types layers tail format bench clean

help:
	@echo 'make demo      train a policy that decides about growth a little further, compare it, grow one network with it'
	@echo 'make test      the tests but the slow ones'
	@echo 'make test-all  the slow ones as well'
	@echo 'make test-gpu  the ones that need a CUDA device'
	@echo 'make gates     lint, format, types, layers, tail'
	@echo 'make format    repair what ruff can repair'
	@echo 'make bench     the benchmarks, one after the other'
	@echo 'make clean     remove .venv and the caches; runs/ is kept'

demo: out := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: $(runtime)
	$(bin)/morphogen train --task digits --from digits --executor processes --steps 1152 \
	  --set 'ppo.learning_rate={kind: linear, start: 0.0002, end: 0.0}' --out $(out)/train
	$(bin)/morphogen evaluate $(out)/train --executor processes --episodes 6 --out $(out)/evaluation
	$(bin)/morphogen grow --task digits --policy $(out)/train --repeats 1 --out $(out)/network

test: $(develop)
	$(pytest) -n 2 -m 'not slow and not gpu'

test-all: $(develop)
	$(pytest) -n 2 -m 'not gpu'

test-gpu: $(develop)
	$(pytest) -m gpu

gates: lint format-check types layers tail

lint: $(develop)
	$(bin)/ruff check

format-check: $(develop)
	$(bin)/ruff format --check

types: $(develop)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(python) -m pyright --pythonpath $(python)

layers: $(develop)
	$(bin)/lint-imports --no-logo

tail: $(develop)
	$(python) tools/tail_gate.py

format: $(develop)
	$(bin)/ruff check --fix
	$(bin)/ruff format

bench: $(runtime)
	for file in benchmarks/*.py $(addprefix benchmarks/governor/,costs.py first_update.py detection.py recovery.py) \
	    $(addprefix benchmarks/growth/,newborn.py incubators.py); do \
	    echo "== $$file"; $(python) "$$file" || exit 1; done

clean:
	rm -rf .venv .import_linter_cache .hypothesis .pytest_cache .ruff_cache

# An interrupted set-up leaves no stamp, so the next make goes on with it: pip skips what is installed already. A virtual
# environment of another Python version, or one without a working pip, is made anew. torch comes first and alone, so that
# its long download is not repeated when something after it fails.
$(runtime): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'morphogen needs Python 3.11 or newer, $(PYTHON) is $(or $(version),not there). Name another: make PYTHON=python3.12' >&2; exit 1; }
	@$(python) -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(version)")' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(pip_install) torch
	$(pip_install) --quiet --editable .
	@touch $@

$(develop): $(runtime)
	$(pip_install) --quiet --editable '.[dev]'
	@touch $@
