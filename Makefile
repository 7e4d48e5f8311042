# Each target makes what it needs, from a bare clone on: `make quickstart` and `make test` are the two to know.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test test-long format clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/rlhf-duplex train configs/quickstart.yaml
	@echo "Open runs/quickstart/report.html in a browser."

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-long: install
	$(BIN)/pytest -m long

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
