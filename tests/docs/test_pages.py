"""The pages say what is in the code: every function has its place on the road, and every link has its function."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from taurl import control, llm
from taurl.control import play_config
from taurl.functional.kl import KL_GRADIENTS
from taurl.functional.loss_types import LOSS_TYPES
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.llm.inference_config import EvaluateConfig, GenerateConfig, InspectConfig, ScoreConfig
from taurl.llm.rewards import SHIPPED
from taurl.runtime.other_names import OTHER_NAMES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FUNCTIONAL = [file.stem for file in (ROOT / "src/taurl/functional").glob("[a-z]*.py")]
LINK = re.compile(r"\[`(\w+)`\]\[taurl\.functional\.(\w+)\.(\w+)\]")


def public_functions(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"src/taurl/functional/{module}.py").read_text())
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}


def test_every_function_stands_on_the_road_from_q_learning_to_grpo():
    linked = {(module, name) for _, module, name in LINK.findall((DOCS / "mathematics.md").read_text())}
    assert linked == {(module, name) for module in FUNCTIONAL for name in public_functions(module)}


def test_a_link_is_named_as_what_it_leads_to():
    for shown, _, name in LINK.findall((DOCS / "mathematics.md").read_text()):
        assert shown == name


def test_the_reference_has_every_module():
    listed = re.findall(r"::: taurl\.functional\.(\w+)", (DOCS / "reference.md").read_text())
    assert sorted(listed) == sorted(FUNCTIONAL)


def test_the_table_of_loss_types_is_that_of_the_code():
    page = (DOCS / "mathematics.md").read_text()
    for name, definition in LOSS_TYPES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == definition.surrogate
        assert cells[3] == (definition.ratio_level or "trajectory")
        assert cells[4] == definition.meaning


@pytest.mark.parametrize(("estimator", "level"), sorted({(e, level) for e, _, level in KL_GRADIENTS}))
def test_the_table_of_gradients_is_that_of_the_code(estimator, level):
    """The page rounds the exact expressions to words; these are the words' meanings."""
    (row,) = re.findall(rf"^\| {estimator}, {level} \|.*$", (DOCS / "mathematics.md").read_text(), re.MULTILINE)
    for place, words in zip(("reward", "loss", "weighted_loss"), row.strip("|").split("|")[1:], strict=True):
        exact, words = KL_GRADIENTS[estimator, place, level], words.strip()
        assert ("hardly pulls" in words) == ("hardly pulls" in exact)
        assert words.startswith("0") == exact.startswith("0")
        if words.startswith("∇KL") and "but for" not in words:
            assert exact.startswith("∇KL(π‖π_ref)")
        assert ("mathrm{ref}} \\Vert" in words) == exact.startswith("∇KL(π_ref‖π)")


def test_the_help_says_which_gradient_each_place_gives():
    help_text = GRPOConfig.model_fields["kl_place"].description
    for words in ("In the reward", "As a loss", "weighted by the", "k1 gives ∇KL", "k1 gives 0", "∇KL(π_ref‖π)"):
        assert words in " ".join(help_text.split())


def test_every_setting_named_in_the_pages_exists():
    configs = [getattr(control, f"{algorithm}Config") for algorithm in control.ALGORITHMS]
    configs += [getattr(llm, name) for name in llm.__all__ if name.endswith("Config")]
    configs += [
        EvaluateConfig,
        GenerateConfig,
        InspectConfig,
        ScoreConfig,
        play_config.EvaluateConfig,
        play_config.PlayConfig,
    ]
    settings = {name for config in configs for name in config.model_fields}
    known = {*settings, "config", "resume", "no_preset", "help"}
    known |= {"data", "minutes", "rounds", "to_500"}  # of benchmarks
    for page in [*DOCS.glob("*.md"), *ROOT.glob("README*.md"), ROOT / "examples" / "README.md"]:
        for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", page.read_text()):
            assert option.replace("-", "_") in known, f"{page.name}: --{option}"


def test_the_page_of_rewards_has_all_that_are_shipped():
    page = (DOCS / "rewards.md").read_text()
    for name in set(SHIPPED) - {"reward_model"}:  # which is written model:FOLDER
        assert re.search(rf"^\| `{name}[`(]", page, re.MULTILINE), name


def test_the_table_of_other_names_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (`[\w` orand]+`) \|$", (DOCS / "coming_from.md").read_text(), re.MULTILINE)
    assert {there: tuple(re.findall(r"\w+(?=`)", here)) for there, here in rows} == OTHER_NAMES
    configs = [getattr(control, f"{algorithm}Config") for algorithm in control.ALGORITHMS]
    configs += [getattr(llm, name) for name in llm.__all__ if name.endswith("Config")]
    for there, here in OTHER_NAMES.items():
        for name in here:
            assert any(name in config.model_fields and there not in config.model_fields for config in configs), there


def modules_of_control():
    root = ROOT / "src/taurl/control"
    for file in sorted(root.rglob("[a-z]*.py")):
        if file.stem != "pools":  # which needs envpool
            yield importlib.import_module(".".join(file.relative_to(ROOT / "src").with_suffix("").parts))


def test_every_place_in_the_table_of_details_exists():
    page = (DOCS / "control.md").read_text()
    rows = page[page.index("## PPO's implementation details") :].splitlines()
    cells = [row.split("|")[1:4] for row in rows if row.startswith("| ")]
    numbers = [int(number) for number, _, _ in cells for number in number.split(",") if number.strip().isdecimal()]
    assert sorted(numbers) == list(range(1, 38))
    modules = list(modules_of_control())
    known = {module.__name__.rpartition(".")[2]: module for module in modules}
    known |= {name: one for module in modules for name, one in vars(module).items() if inspect.isclass(one)}
    for place in (place for _, _, where in cells for place in re.findall(r"`([\w.]+)`", where)):
        first, *rest = place.split(".")
        found = known[first] if first in known else importlib.import_module(f"taurl.{first}.{rest.pop(0)}")
        for name in rest:
            assert hasattr(found, name) or name in getattr(found, "model_fields", {}), place
            found = getattr(found, name, None)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_example_is_in_its_list():
    examples = ROOT / "examples"
    listed = re.findall(r"^\| `([\w/]+\.\w+)` \|", (examples / "README.md").read_text(), re.MULTILINE)
    found = {file.relative_to(examples).as_posix() for file in examples.rglob("*") if file.suffix in (".py", ".yaml")}
    assert set(listed) == found


def test_both_readmes_have_the_same_code_figures_and_links():
    """But for comments, which are translated."""

    def code(text: str) -> list[str]:
        lines = re.findall(r"^    .*$", text, re.MULTILINE) + re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        return [re.sub(r" *# .*", "", line) for line in lines]

    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert code(english) == code(chinese)
    for what in (r"\b\d+\.\d+\b", r"\]\(((?!README)[^)]*)\)"):
        assert sorted(re.findall(what, english)) == sorted(re.findall(what, chinese))


def test_every_docstring_says_what_goes_in():
    for module in FUNCTIONAL:
        loaded = importlib.import_module(f"taurl.functional.{module}")
        for name in public_functions(module):
            text = inspect.getdoc(getattr(loaded, name)) or ""
            assert "Args" in text or "as `" in text, f"{module}.{name}"
