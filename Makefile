# taurl: make demo | test | lint | docs | bench | scores | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint docs bench scores clean

install: $(INSTALLED)

# Every install is pinned by constraints.txt, the versions this tree was tested with.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/taurl llm grpo --config examples/grpo_arithmetic.yaml

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

# MathJax comes from a package of Jupyter's whose own requirements, a server, are not wanted.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps jupyter-server-mathjax
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/functional_agreement.py
	$(BIN)/python benchmarks/sampling.py --rows 32x64 64x64
	$(BIN)/python benchmarks/control_speed.py

# Every preset of the control wing, three seeds each: more than an hour.
scores: $(INSTALLED)
	$(BIN)/python benchmarks/control_scores.py

clean:
	rm -rf $(VENV) site .hypothesis .mypy_cache .ruff_cache .pytest_cache dist
