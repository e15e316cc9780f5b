# make demo, make test, make lint, make docs: each sets up .venv first.
# In an environment of your own, without network: make test PYTHON=python3 NO_INSTALL=1

PYTHON ?= python3
VENV ?= .venv
# The CUDA wheels of JAX where there is an NVIDIA GPU; CUDA=cuda12 for drivers before 580, CUDA= for the CPU alone.
CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda13)
EXTRAS ?= torch,transformers,dev,docs$(if $(CUDA),$(comma)$(CUDA))
PYTEST_FLAGS ?= -n auto --dist worksteal
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

# Where there is a GPU, the tests marked `alone` follow the others in one process. Both sessions run, and both count; 5
# is pytest's status where the flags name no test of a session.
ifneq ($(CUDA),)
define run_tests
first=0; second=0; \
$(RUN) -m pytest $(PYTEST_FLAGS) $(1) -m "not alone" || first=$$?; \
$(RUN) -m pytest $(PYTEST_FLAGS) $(1) -m alone -n 0 || second=$$?; \
case $$first/$$second in 0/0 | 0/5 | 5/0) ;; *) exit 1 ;; esac
endef
else
run_tests = $(RUN) -m pytest $(PYTEST_FLAGS) $(1)
endif

test: $(READY)
	$(run_tests)

# The lines that the tests run, in .coverage.cpu or .coverage.gpu. Both together, side by side in one tree:
# python -m coverage combine --keep .coverage.cpu .coverage.gpu && python -m coverage report
coverage: export COVERAGE_FILE := .coverage.$(if $(CUDA),gpu,cpu)
coverage: $(READY)
	rm -f $(COVERAGE_FILE)
	$(call run_tests,--cov --cov-append --cov-report=term)

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
