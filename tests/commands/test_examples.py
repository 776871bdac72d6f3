"""The shipped examples: every configuration is one of its algorithm, and every script names what there is."""

import ast
import importlib
from pathlib import Path

import pytest

from taurl.llm import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from taurl.runtime.config import read_yaml, validated

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = {"dpo": DPOConfig, "grpo": GRPOConfig, "ppo": PPOConfig, "reward": RewardConfig, "sft": SFTConfig}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations_are_valid_and_their_first_lines_run_them(file):
    algorithm = file.stem.partition("_")[0]
    validated(CONFIGS[algorithm], read_yaml(file), source=str(file))
    assert f"taurl llm {algorithm} --config examples/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: file.stem)
def test_what_the_scripts_import_is_there(file):
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    assert any(node.module.startswith("taurl") for node in imports)
    for node in imports:
        for alias in node.names:
            assert hasattr(importlib.import_module(node.module), alias.name), alias.name
