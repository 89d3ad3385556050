# Thin: every target is a command one could type. All go through .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8000

.PHONY: help venv demo test faults check serve cluster format gpu gpu-wheels
help:    ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv: .venv/.complete  ## make .venv and install everything, pinned (first time: several minutes)
.venv/.complete: pyproject.toml constraints.txt
	@echo "==> installing into .venv with the versions of constraints.txt"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed (make PYTHON=...)"'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$$(grep -i '^resemblyzer==' constraints.txt)"
	@touch $@

demo: venv  ## corpus, tokens, AR, NAR, registry, endpoint, one sentence: the whole path
	@$(BIN)/valle demo --recipe demo --port $(PORT)

test: venv  ## all tests but those of `faults`
	@$(BIN)/python -m pytest -q -m "not faults"

faults: venv  ## outages of minutes, soaks and long fuzzing: half an hour or more
	@$(BIN)/python -m pytest -q -m "faults or fuzz" --hypothesis-profile=long --timeout=3600

check: venv  ## format, lint, types, results in documents, and the fast tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m valle.jobs.include_results --check
	@$(BIN)/python -m pytest -q -m "not ray and not slow and not faults"

serve: venv  ## the endpoint with the registry's champion, on PORT (ARGS="--api-keys keys.yaml")
	@$(BIN)/valle starter-voices
	@$(BIN)/valle serve --port $(PORT) $(ARGS)

cluster: venv  ## check cluster.yaml (AWS) without a network; what is still to be set
	@$(BIN)/valle check-cluster cluster.yaml

format: venv  ## format and sort imports
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

gpu-wheels:  ## collect what `make gpu` needs on a bare machine with a GPU: .whl, at most 64 MiB with the tree
	@$(PYTHON) jobs/bench/gpu/wheels.py

gpu: .site/.complete  ## correctness and speed on this machine's GPU: gpu/gpu.json (ARGS="--phases all")
	@PYTHONPATH=.site $(PYTHON) jobs/bench/gpu/run.py --out gpu $(ARGS)
.site/.complete: $(wildcard .whl/*.whl)
	@test -n "$^" || { echo "no wheels in .whl: \`make gpu-wheels\` where there is a network"; exit 1; }
	@$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site $^
	@touch $@
