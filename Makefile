# taurl: make demo | test | slow | lint | docs | bench | bench-long | scores | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA ?= ../shared/data/gsm8k

.PHONY: install demo test slow lint docs bench bench-long scores clean

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

# What learns for long: it does, keeps near its target, remembers, sees. And the embedded model built again.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# MathJax comes from a package of Jupyter's whose own requirements, a server, are not wanted.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps jupyter-server-mathjax
	$(BIN)/mkdocs build --strict

# The short set, under half an hour: where the minutes end before five updates are measured, the table says how many.
# GSM8K's files lie in DATA (docs/performance.md): make bench DATA=folder.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/functional_agreement.py --write
	$(BIN)/python benchmarks/record.py "Sampling" sampling.py --rows 32x64 stops --rounds 5
	$(BIN)/python benchmarks/sft.py --data $(DATA) --steps 5 --minutes 4 --write
	$(BIN)/python benchmarks/grpo_step.py --data $(DATA) --steps 5 --minutes 7 --write
	$(BIN)/python benchmarks/preference.py --data $(DATA) --steps 5 --minutes 7 --write
	$(BIN)/python benchmarks/record.py "Control: steps a second, one round" control_speed.py --rounds 1

# What takes hours: PPO beside GRPO, the demo's task on both sides, and the control wing's medians of five.
bench-long: $(INSTALLED)
	$(BIN)/python benchmarks/record.py "Sampling, 64 prompts" sampling.py --rows 64x64
	$(BIN)/python benchmarks/record.py "Sampling: how cost grows, one round" sampling_growth.py --rounds 1
	$(BIN)/python benchmarks/ppo.py --data $(DATA) --steps 5 --write
	$(BIN)/python benchmarks/demo_task.py --minutes 180 --write
	$(BIN)/python benchmarks/record.py "Control: steps a second" control_speed.py

# The presets of the control wing that have a bound, three seeds each: more than an hour.
scores: $(INSTALLED)
	$(BIN)/python benchmarks/control_scores.py

clean:
	rm -rf $(VENV) site .hypothesis .mypy_cache .ruff_cache .pytest_cache dist
