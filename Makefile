# make demo, make test, make lint, make docs: each sets up .venv first.
# In an environment of your own, without network: make test PYTHON=python3 NO_INSTALL=1

PYTHON ?= python3
VENV ?= .venv
# The CUDA wheels of JAX where there is an NVIDIA GPU; CUDA=cuda12 for drivers before 580, CUDA= for the CPU alone.
CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda13)
EXTRAS ?= torch,transformers,dev,docs$(if $(CUDA),$(comma)$(CUDA))
PYTEST_FLAGS ?= -n auto
SECONDS ?= 60
comma := ,

ifdef NO_INSTALL
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready-$(subst $(comma),-,$(EXTRAS))
endif

.PHONY: demo test coverage fuzz mutants sanitize lint format docs dist clean

demo: $(READY)
	$(RUN) -m benchmarks demo

test: $(READY)
	$(RUN) -m pytest $(PYTEST_FLAGS)

# The lines that the tests run, in .coverage.cpu or .coverage.gpu. Both together, side by side in one tree:
# python -m coverage combine --keep .coverage.cpu .coverage.gpu && python -m coverage report
coverage: export COVERAGE_FILE := .coverage.$(if $(CUDA),gpu,cpu)
coverage: $(READY)
	$(RUN) -m pytest $(PYTEST_FLAGS) --cov --cov-report=term

fuzz: $(READY)
	$(RUN) -m tests.fuzz --seconds $(SECONDS)

mutants: $(READY)
	$(RUN) -m tests.mutations

sanitize: $(READY)
	$(RUN) -m tests.sanitize

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# -E reads every page anew: a warning of an unchanged one would otherwise pass in the second run.
docs: $(READY)
	$(RUN) -m sphinx -E -W --keep-going -n -q -c docs . docs/_build
	cp docs/_build/README.html docs/_build/index.html

dist: $(READY)
	$(RUN) -m tests.release

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .coverage* dist docs/_build
