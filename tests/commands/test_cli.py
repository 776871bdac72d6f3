"""The first words of the command line, and options that do not fit."""

import io
import shlex
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from taurl import __version__
from taurl.cli import COMMANDS, main
from taurl.commands.options import pair, parse, take_option
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.runtime.config import read_yaml
from taurl.runtime.errors import InputError

OPTIONS = """
    --rewards last_number my_file.py:my_reward --reward-weights 1 0.5 --importance-cap None --mask-truncated
    --dataset reasoning-gym:chain_sum --dataset-args min_terms=2 max_terms=2 --columns question=prompt
    --lora-rank 4 --lora-targets q_proj v_proj --stop </answer> --chat-template-kwargs enable_thinking=False
    --prompts-per-step 4 --adam-betas 0.9 0.95 --out runs/x
"""


def grpo(*words):
    return parse(GRPOConfig, words, prog="taurl llm grpo")


def test_help_answers_without_anything_heavy():
    code = "import sys; from taurl.cli import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    for words in (["--help"], ["llm"], ["--version"], ["report", "--help"], ["llm", "grop"]):
        output = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
        loaded = set(output.splitlines()[-1].split())
        assert "taurl.cli" in loaded
        assert loaded.isdisjoint({"torch", "numpy", "pydantic", "tyro", "rich", "yaml", "transformers"})


def test_help_names_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert all(f"taurl {name} " in text for name in COMMANDS)
    assert main(["llm"]) == main(["llm", "--help"]) == 0
    assert "taurl llm chat" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"taurl {__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["llm", "grop"], "taurl: unknown command `llm grop`; did you mean `taurl llm grpo`?"),
        (["reprot", "runs/demo"], "taurl: unknown command `reprot`; did you mean `taurl report`?"),
        (["train"], f"taurl: unknown command `train`; known: {', '.join(COMMANDS)}"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_closest(capsys, words, line):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{line}\n"
    assert captured.out == ""


@pytest.mark.parametrize("command", ["llm grpo", "llm evaluate", "llm generate", "llm chat", "llm inspect"])
def test_each_command_has_its_options_in_its_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--model" in text
    assert "--config FILE reads settings from YAML" in text


def test_options_are_the_fields_of_the_config():
    config = grpo(*shlex.split(OPTIONS))
    assert config.rewards == ("last_number", "my_file.py:my_reward")
    assert config.reward_weights == (1.0, 0.5)
    assert config.importance_cap is None
    assert config.mask_truncated is True
    assert config.dataset_args == {"min_terms": 2, "max_terms": 2}
    assert pair("velocity=1e-2") == ("velocity", 0.01)
    assert pair("name=@a") == ("name", "@a")  # which YAML has another use for
    for words in (["--resume", ""], ["--resume="]):
        with pytest.raises(InputError, match="--resume needs a value"):
            take_option(words, "--resume")
    assert config.columns == {"question": "prompt"}
    assert config.lora_targets == ("q_proj", "v_proj")
    assert config.stop == ("</answer>",)
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.adam_betas == (0.9, 0.95)
    assert grpo() == GRPOConfig()


def test_flags_may_have_a_value():
    assert grpo("--mask-truncated", "True").mask_truncated is True
    assert grpo("--mask_truncated", "false", "--steps", "3").mask_truncated is False
    assert grpo("--mask-truncated=False").mask_truncated is False
    assert grpo("--no-mask-truncated").mask_truncated is False
    assert grpo("--mask-truncated", "--stop", "true").stop == ("true",)
    with pytest.raises(InputError, match="--mask-truncated is 'yes', expected True or False"):
        grpo("--mask-truncated=yes")
    with pytest.raises(InputError, match="Unrecognized options: false"):
        grpo("--mask-truncated", "true", "false")


def test_of_an_option_of_one_value_the_last_counts():
    assert grpo("--steps", "3", "--steps", "4").steps == 4


def test_one_word_may_stand_where_several_may(tmp_path):
    (tmp_path / "one.yaml").write_text("rewards: last_number\nstop: '</answer>'\n")
    config = grpo("--config", str(tmp_path / "one.yaml"))
    assert (config.rewards, config.stop) == (("last_number",), ("</answer>",))
    assert GRPOConfig(rewards="last_number") == GRPOConfig(rewards=("last_number",))
    assert GRPOConfig(reward_weights=0.5).reward_weights == (0.5,)
    assert GRPOConfig(lora_rank=2, lora_targets="all-linear").lora_targets == "all-linear"
    with pytest.raises(ValidationError, match="rewards"):
        GRPOConfig(rewards="")


def test_yaml_may_merge_what_it_repeats(tmp_path):
    file = tmp_path / "merged.yaml"
    file.write_text("chat_template_kwargs: &A {x: 1}\ndataset_args: {<<: *A, x: 2, 1: a, '1': b}\n")
    assert read_yaml(file)["dataset_args"] == {"x": 2, 1: "a", "1": "b"}


def test_a_config_file_is_overridden_by_options_and_written_back_the_same(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("model: m\ndataset_args: {min_terms: 2}\nrewards: [last_number]\nlearning_rate: 1e-5\n")
    config = grpo("--config", str(file), "--learning-rate", "3e-5", f"--steps={7}")
    assert (config.model, config.learning_rate, config.steps) == ("m", 3e-5, 7)
    assert config.dataset_args == {"min_terms": 2}
    assert config.rewards == ("last_number",)
    file.write_text(config.to_yaml())
    assert grpo(f"--config={file}") == config
    # On top of a stored config, a file changes only what it names.
    file.write_text("steps: 9")
    merged = parse(GRPOConfig, ["--config", str(file)], prog="taurl llm grpo", default=config)
    assert merged == config.model_copy(update={"steps": 9})
    assert yaml.safe_load(config.to_yaml())["out"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "3"], "--stepz, 3 Perhaps you meant: --steps"),
        (["--steps", "abc"], "--steps: 'abc' is no whole number, such as 100000; see taurl llm grpo --help"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--steps", "0"], "steps is 0: Input should be greater than or equal to 1; see taurl llm grpo --help"),
        (["--clip-low", "2"], "clip_low is 2.0: Input should be less than 1"),
        (["--schedule", "linea"], "invalid choice 'linea' for argument '--schedule'"),
        (["--columns", "question"], "--columns: 'question' is not NAME=VALUE"),
        (["--minibatches", "17"], "minibatches 17 exceed prompts_per_step 16"),
        (["--rewards", "last_number", "--reward-weights", "1", "2"], "2 reward_weights for 1 rewards"),
        (["--reward-process"], "reward_process needs a reward_timeout"),
        (["--lora-alpha", "8"], "lora_alpha is 8, but without a lora_rank there is no adapter: leave it out"),
        (["--num-generations", "8"], "unknown option --num-generations; did you mean --group-size?"),
        (["--max-completion-length=8"], "unknown option --max-completion-length=8; did you mean --max-tokens?"),
        (["--num-train-epochs", "2"], "unknown option --num-train-epochs; did you mean --steps?"),
        (["--epsilon", "0.1"], "unknown option --epsilon; did you mean --clip-low and --clip-high?"),
        (
            ["--rewards", "a.py:f", "--rewards=b.py:g"],
            "--rewards is there twice: give it once, its values one after the other",
        ),
        (["--dataset-args", "a=1", "--dataset_args", "b=2"], "--dataset-args is there twice"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is there twice"),
        (["--config"], "--config needs a value"),
        (["--config", "--steps", "3"], "--config needs a value"),
        (["--config", "absent.yaml"], "absent.yaml: cannot read the settings: No such file or directory"),
        (["word"], "'word' stands where an option was expected; did you mean --model word"),
        (["rows.jsonl"], "'rows.jsonl' stands where an option was expected; did you mean --dataset rows.jsonl"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro frames its errors by it
def test_options_that_do_not_fit_are_one_line(failing, monkeypatch, words, message, encoding):
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(InputError) as caught:
            grpo(*words)
    line = str(caught.value)
    assert message in line
    assert not set(line) & set("│─╯\n")
    assert len(line) < 250
    assert failing(["llm", "grpo", *words], 2) == f"taurl: {line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1e-5", "grpo.yaml: unknown setting learning_rte; did you mean learning_rate?"),
        ("steps: many", "grpo.yaml: steps is 'many': "),
        ("steps: [", "grpo.yaml: not valid YAML: "),
        ("steps: 3\nstop: [a]\nsteps: 4", "grpo.yaml: not valid YAML: steps is there twice"),
        ("beta: 0.1", "grpo.yaml: unknown setting beta; did you mean kl_coefficient?"),
        ("- steps", "grpo.yaml: expected `setting: value` lines, found list"),
    ],
)
def test_a_bad_config_file_is_named_with_its_setting(failing, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpo.yaml").write_text(text)
    assert message in failing(["llm", "grpo", "--config", "grpo.yaml"], 2)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys):
    assert main(["llm", "grpo", "--config", "absent.yaml", "--debug"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "InputError: absent.yaml: cannot read the settings" in text


def test_taking_an_option_out():
    assert take_option(["a", "--x", "1", "b"], "--x") == ("1", ["a", "b"])
    assert take_option(["--x=1=2", "b"], "--x") == ("1=2", ["b"])
    assert take_option(["--xy", "1"], "--x") == (None, ["--xy", "1"])
    with pytest.raises(InputError, match="--x needs a value"):
        take_option(["--x"], "--x")
