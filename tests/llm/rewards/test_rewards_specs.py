"""From what a user writes to a reward function."""

import functools
import inspect
import sys

import pytest

from taurl.llm import rewards
from taurl.llm.rewards.specs import callable_name, load, parse
from taurl.runtime.errors import InputError


def resolve(spec):
    """Name and function, as a RewardSet takes them."""
    source = parse(spec) if isinstance(spec, str) else spec
    return source.name if isinstance(spec, str) else callable_name(source), load(source)


def refusal(spec):
    with pytest.raises(InputError) as caught:
        resolve(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shipped_names_and_modules_lead_to_the_same_function():
    assert resolve("last_number") == ("last_number", rewards.last_number)
    assert resolve("taurl.llm.rewards:last_number") == ("last_number", rewards.last_number)
    for name in rewards.SHIPPED:
        assert callable(getattr(rewards, name))


def test_settings_are_literals_for_a_factory():
    name, function = resolve("taurl.llm.rewards:overlong_penalty(max_tokens=64,buffer=16)")
    assert name == "overlong_penalty"
    assert function(completion_ids=[[1] * 56]) == [-0.5]
    assert resolve("repetition_penalty()")[1](completions=["x x x x"]) == [-0.5]


def test_a_file_is_executed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("marks = []\ndef a(completions): return marks\ndef b(completions): return marks\n")
    assert resolve("mine.py:a")[1]([]) is resolve(f"{file}:b")[1]([])
    file.write_text("marks = 1 \ndef a(completions): return marks\ndef b(completions): return marks\n")
    assert resolve("mine.py:a")[1]([]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py"]


def test_strings_in_settings_may_hold_what_a_spec_is_made_of(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def make(**settings):\n    return lambda completions: settings\n")
    _, function = resolve(f"""{file}:make(a="m.py:f()", b={{"x": [1, (2,)]}})""")
    assert function([]) == {"a": "m.py:f()", "b": {"x": [1, (2,)]}}


def test_callables_are_named():
    class Judge:
        def __call__(self, completions): ...

    def plain(completions, k=1): ...

    judge = Judge()
    assert resolve(plain) == ("plain", plain)
    assert resolve(judge) == ("Judge", judge)
    assert resolve(functools.partial(plain, k=2))[0] == "plain"
    assert resolve(lambda completions: None)[0] == "lambda"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("last_numbr", ["'last_numbr'", "did you mean last_number"]),
        ("taurl.llm.rewards:xmlcount_reward", ["'xmlcount_reward'", "did you mean xmlcount_reward_func"]),
        ("taurl.llm.rewards:zzz", ["'zzz' in taurl.llm.rewards", "last_number"]),
        ("no_such_package.rewards:f", ["no module 'no_such_package'", "path/to/file.py:name"]),
        ("json.nothing:f", ["no module 'json.nothing'"]),
        ("no/such/file.py:f", ["no/such/file.py not found"]),
        ("my_file.py", ["'my_file.py' not understood", "path/to/file.py:function"]),
        ("", ["'' not understood"]),
        ("math:pi", ["'pi' in math is a float"]),
        ("overlong_penalty", ["accepts no `completions`", "overlong_penalty(max_tokens=…, buffer=…)"]),
        ("overlong_penalty(max_token=3)", ["'overlong_penalty'", "max_token"]),
        ("overlong_penalty(max_tokens=8, buffer=9)", ["buffer is 9 and max_tokens 8"]),
        ("overlong_penalty(8, 9)", ["(8, 9)", "literal keyword arguments"]),
        ("overlong_penalty(max_tokens=open('x'), buffer=1)", ["literal keyword arguments"]),
        ("overlong_penalty(max_tokens=8)(buffer=9)", ["literal keyword arguments"]),
        ("overlong_penalty(**{'max_tokens': 8})", ["overlong_penalty"]),
        ("overlong_penalty(max_tokens=)", ["literal keyword arguments"]),
        ("last_number(answer=['1'])", ["'last_number'", "cannot be made"]),
    ],
)
def test_what_is_not_found_is_named(spec, words):
    message = refusal(spec)
    for word in words:
        assert word in message, message


def test_settings_that_a_factory_has_not_are_named():
    with pytest.raises(InputError, match="has no setting normalise; did you mean normalize"):
        load(parse("model:runs/rm/final(normalise=True)"))
    with pytest.raises(InputError, match="has no setting size; known: ngram_size"):
        load(parse("repetition_penalty(size=3)"))
    with pytest.raises(InputError, match=r"not understood: .*settings in parentheses"):
        parse("model:runs/rm/final(normalize=True")


def test_something_that_is_no_function_is_refused():
    assert "is a int, expected a function" in refusal(3)


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("import math\n\nraise RuntimeError('two\\nlines')\n", 3, "RuntimeError: two lines"),
        ("import math\nimport no_such_thing\n", 2, "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def f(:\n", 1, "SyntaxError"),
        ("def g():\n    return 1 / 0\ng()\n", 2, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, source, line, error):
    file = tmp_path / "broken.py"
    file.write_text(source)
    message = refusal(f"{file}:f")
    assert f"{file} failed at line {line}: {error}" in message


def test_a_module_that_fails_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_reward_module.py").write_text("x = 1\nimport no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal("broken_reward_module:f")
    assert "importing broken_reward_module failed at" in message
    assert "broken_reward_module.py:2: ModuleNotFoundError" in message


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("WORTH = 3.0\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from beside_the_reward import WORTH\n"
        "def f(completions, **_):\n"
        "    import imported_by_the_call\n"
        "    return [WORTH + imported_by_the_call.MORE for _ in completions]\n"
    )
    (tmp_path / "imported_by_the_call.py").write_text("MORE = 0.5\n")
    before = list(sys.path)
    assert resolve(f"{file}:f")[1](["a"]) == [3.5]
    assert sys.path == [*before, str(tmp_path)]  # behind what is installed


def test_a_module_of_this_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "reward_of_this_folder.py").write_text("def f(completions, **_): return [0.5 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("reward_of_this_folder:f")[1](["a"]) == [0.5]


def test_every_shipped_function_takes_whatever_columns_there_are():
    for name in rewards.SHIPPED:
        function = getattr(rewards, name)
        if not name.endswith(("penalty", "_model")):  # those make a function
            kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD in kinds, name
