# Everything runs inside .venv, which these rules make; nothing but Python 3.10+ and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: edit test check format notebooks clean

# pip gets every requirement of a rule in one call, with -c, so that each rule installs the same known set.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.run

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $@

edit: $(VENV)/.run  ## edit the example picture with the embedded model
	$(BIN)/python -m qwenedit.mini.demo examples/scene.png "make the circle red"

test: $(VENV)/.test  ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev  ## what CI runs: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/.test  ## execute the notebooks in place, as they are committed
	$(BIN)/python -m notebooks.build

clean:
	rm -rf $(VENV) edited.png before-after.png concat_and_cfg
