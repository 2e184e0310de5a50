# Everything runs inside .venv and .venv-run, which these rules make; only Python 3.10+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAIN := .venv-run

.PHONY: edit test gpu smoke check format notebooks clean

# pip gets every requirement of a rule in one call, with -c, so that each rule installs the same known set.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

# The second references come without what they require (gigabytes): the tests import single modules of them.
$(VENV)/.test: pyproject.toml constraints.txt tests/oracles.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r tests/oracles.txt
	touch $@ $(VENV)/.run

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $@

# Made anew, so that it never has more than the runtime requirements.
$(PLAIN)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(PLAIN)
	$(PLAIN)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt .
	touch $@

edit: $(VENV)/.run  ## edit the example picture with the embedded model
	$(BIN)/python -m qwenedit.mini.demo examples/scene.png "make the circle red"

test: $(VENV)/.test  ## the whole test suite
	QWENEDIT_ORACLES=required $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

smoke: $(PLAIN)/.run  ## every public name and command, after a plain install
	rm -rf build
	$(PLAIN)/bin/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall .
	$(PLAIN)/bin/python -I tests/smoke.py

gpu: $(VENV)/.test  ## what a GPU can check and measure, in twelve minutes; without one it says so
	$(BIN)/python -m benchmarks.gpu

check: $(VENV)/.dev  ## what CI runs: format, lint, types, smoke test, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) smoke
	$(MAKE) test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/.test  ## execute the notebooks in place, as they are committed
	$(BIN)/python -m notebooks.build

clean:
	rm -rf $(VENV) $(PLAIN) build edited.png before-after.png concat_and_cfg
