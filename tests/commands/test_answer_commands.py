"""evaluate, generate, chat and report on a tiny model."""

import io
import json
import os

import pytest
import torch
from tiny_policy import tiny_tokenizer

from taurl import llm
from taurl.cli import main
from taurl.commands import chat
from taurl.llm import inference
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model
from taurl.runtime.errors import InputError

SETTINGS = ["--model", "model", "--threads", "1", "--precision", "float32", "--max-tokens", "6"]


def evaluate(*words):
    return ["llm", "evaluate", *SETTINGS, "--dataset", "rows.jsonl", *words]


def generate(*words):
    return ["llm", "generate", *SETTINGS, "--prompts", "rows.jsonl", *words]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(messages, max_tokens=6):
    """The greedy answer of the model, by transformers itself."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = load_model("model", dtype=torch.float32)
    output = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=1, pad_token_id=0)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


# --- evaluate


def test_evaluate_scores_greedy_answers_and_writes_them(here, capsys):
    assert main(evaluate("--rewards", "rewards.py:letter_a", "rewards.py:right", "--out", "out/answers.jsonl")) == 0
    table = capsys.readouterr().out
    assert "12 rows in" in table
    answers = lines(here / "out/answers.jsonl")
    assert [a["prompt"] for a in answers] == [row["prompt"] for row in lines(here / "rows.jsonl")]
    assert [a["answer"] for a in answers] == [row["answer"] for row in lines(here / "rows.jsonl")]
    for index in (0, 7):
        assert answers[index]["completion"] == greedy([{"role": "user", "content": answers[index]["prompt"]}])
    for answer in answers:
        text = answer["completion"]
        assert answer["rewards"]["letter_a"] == text.count("a") / max(1, len(text))
        assert answer["reward"] == sum(answer["rewards"].values())
    mean = sum(a["reward"] for a in answers) / 12
    assert next(line for line in table.splitlines() if " reward " in line).split()[3] == f"{mean:.4g}"
    assert [path.name for path in (here / "out").iterdir()] == ["answers.jsonl"]


def test_evaluate_takes_the_first_rows_only(here):
    assert main(evaluate("--rewards", "rewards.py:letter_a", "--rows", "3", "--out", "answers.jsonl")) == 0
    assert len(lines(here / "answers.jsonl")) == 3


def test_evaluate_draws_by_its_seed_at_a_temperature(here):
    def answers(name, seed):
        words = evaluate("--rewards", "rewards.py:letter_a", "--temperature", "1", "--seed", str(seed), "--out", name)
        assert main(words) == 0
        return [a["completion"] for a in lines(here / name)]

    first = answers("a.jsonl", 1)
    assert answers("b.jsonl", 1) == first
    assert answers("c.jsonl", 2) != first


def test_a_reward_that_fails_costs_no_answer(here, failing):
    words = evaluate("--rewards", "rewards.py:division", "--out", "answers.jsonl")
    line = failing(words, 2)
    assert "reward function 'division' raised ZeroDivisionError" in line
    assert line.endswith("; the answers are in answers.jsonl, without rewards")
    answers = lines(here / "answers.jsonl")
    assert len(answers) == 12
    assert answers[0]["completion"] == greedy([{"role": "user", "content": "0+0?"}])
    assert all("reward" not in answer for answer in answers)


def test_an_interruption_keeps_the_batches_that_are_done(here, monkeypatch, capsys):
    monkeypatch.setattr(inference, "BATCH", 4)
    real, calls = SlotSampler.generate, []

    def interrupted(self, prompts, *arguments, **keywords):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, *arguments, **keywords)

    monkeypatch.setattr(SlotSampler, "generate", interrupted)
    assert main(generate("--out", "answers.jsonl")) == 130
    assert calls == [4, 4, 4]
    assert len(lines(here / "answers.jsonl")) == 8
    assert capsys.readouterr().err.endswith("taurl: interrupted\n")


# --- generate


def test_generate_completes_every_row_and_keeps_its_columns(here, capsys):
    assert main(generate("--out", "answers.jsonl")) == 0
    assert capsys.readouterr().out == ""
    rows, answers = lines(here / "rows.jsonl"), lines(here / "answers.jsonl")
    assert [{k: v for k, v in a.items() if k not in ("completion", "finish")} for a in answers] == rows
    assert {answer["finish"] for answer in answers} == {"length"}  # none has ended in six tokens
    assert answers[3]["completion"] == greedy([{"role": "user", "content": rows[3]["prompt"]}])


def test_generate_writes_to_standard_output_in_the_form_of_the_prompts(here, capsys):
    prompt = [{"role": "user", "content": "1+2?"}]
    (here / "talk.jsonl").write_text(json.dumps({"prompt": prompt, "id": 7}) + "\n")
    assert main(["llm", "generate", *SETTINGS, "--prompts", "talk.jsonl"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    said = [{"role": "assistant", "content": greedy(prompt)}]
    assert answer == {"prompt": prompt, "id": 7, "completion": said, "finish": "length"}


def test_generate_from_python_gives_what_the_command_writes(here):
    sampled = ["--count", "2", "--temperature", "1", "--seed", "3"]
    assert main(generate(*sampled, "--out", "answers.jsonl")) == 0
    config = llm.GenerateConfig(
        model="model", threads=1, precision="float32", max_tokens=6, count=2, temperature=1.0, seed=3
    )
    rows = lines(here / "rows.jsonl")
    assert list(llm.generate(rows, config)) == lines(here / "answers.jsonl")
    assert list(llm.generate("rows.jsonl", config)) == lines(here / "answers.jsonl")


def test_generate_from_python_refuses_rows_before_it_answers(here):
    config = llm.GenerateConfig(model="model", threads=1, max_tokens=6)
    with pytest.raises(InputError, match=r"row 2.*empty string"):
        llm.generate([{"prompt": "1+2?"}, {"prompt": " "}], config)
    with pytest.raises(InputError, match="a column finish already"):
        llm.generate([{"prompt": "1+2?", "finish": "line"}], config)


def test_generate_makes_several_and_draws_anew_in_every_batch(here, monkeypatch):
    """One prompt, twelve times: at the same place in the second batch of six it is answered otherwise."""
    monkeypatch.setattr(inference, "BATCH", 18)
    rows = [{"prompt": "1+2?", "id": number} for number in range(12)]
    (here / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["llm", "generate", *SETTINGS, "--prompts", "equal.jsonl", "--count", "3", "--temperature", "1"]
    assert main([*words, "--slots", "5", "--out", "answers.jsonl"]) == 0
    answers = lines(here / "answers.jsonl")
    assert [answer["id"] for answer in answers] == [number for number in range(12) for _ in range(3)]
    said = [answer["completion"] for answer in answers]
    assert all(len(set(said[start : start + 3])) == 3 for start in range(0, 36, 3))
    assert len(set(said)) > 30
    assert all(first != second for first, second in zip(said[:18], said[18:], strict=True))


def test_the_sampler_is_asked_for_what_the_settings_say(here, monkeypatch):
    real, asked = SlotSampler.generate, []

    def generate_noted(self, prompts, count, sampling, **keywords):
        asked.append((count, sampling, keywords["key"]))
        return real(self, prompts, count, sampling, **keywords)

    monkeypatch.setattr(SlotSampler, "generate", generate_noted)
    words = ["--count", "2", "--seed", "3", "--temperature", "0.7", "--top-k", "9", "--top-p", "0.8", "--min-p", "0.1"]
    assert main(generate(*words, "--stop", "a", "b.", "--out", "answers.jsonl")) == 0
    sampling = Sampling(6, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, stop=("a", "b."))
    assert asked == [(2, sampling, (3, 0))]


def test_a_system_prompt_stands_before_the_prompt(here):
    assert main(generate("--system-prompt", "be kind", "--out", "answers.jsonl")) == 0
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "4+1?"}]
    assert lines(here / "answers.jsonl")[4]["completion"] == greedy(messages)


def test_generate_takes_text_as_it_is_where_asked(here):
    assert main(generate("--prompt-format", "text", "--out", "answers.jsonl")) == 0
    model = load_model("model", dtype=torch.float32)
    ids = tiny_tokenizer()("4+1?")["input_ids"]
    ((completion,),) = SlotSampler(model, stop_token_ids=(1,)).generate([ids], 1, Sampling(6, temperature=0))
    expected = tiny_tokenizer().decode(completion.tokens, skip_special_tokens=True)
    assert lines(here / "answers.jsonl")[4]["completion"] == expected


def test_generate_reads_what_a_data_set_may_be(here, capsys):
    words = ["llm", "generate", *SETTINGS, "--prompts", "reasoning-gym:chain_sum", "--dataset-args", "size=2"]
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_values_that_json_does_not_know_are_written_as_text(here, capsys):
    import datetime

    import pyarrow
    import pyarrow.parquet

    day = datetime.date(2024, 5, 6)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1?"], "day": [day]}), here / "rows.parquet")
    words = ["llm", "generate", *SETTINGS, "--prompts", "rows.parquet"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["day"] == "2024-05-06"
    assert main([*words, "--out", "answers.jsonl"]) == 0
    assert lines(here / "answers.jsonl")[0]["day"] == "2024-05-06"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llm", "generate"], "no prompts given: name a .jsonl"),
        (["llm", "generate", "--model", "model", "--prompts", "absent.jsonl"], "no such data file: 'absent.jsonl'"),
        (["llm", "evaluate"], "no data set given: name one with --dataset"),
        (["llm", "evaluate", "--dataset", "rows.jsonl"], "no reward function given"),
        (evaluate("--rewards", "leter"), "no reward function 'leter' ships with taurl"),
        (
            evaluate("--rewards", "rewards.py:right", "--columns", "answer=solution"),
            "'right' needs the column 'answer'",
        ),
        (["llm", "chat", "--model", "./absent"], "no such model folder: './absent'"),
        (["llm", "generate", "--model", "./absent", "--prompts", "rows.jsonl"], "no such model folder: './absent'"),
        (
            ["llm", "evaluate", "--model", "./absent", "--dataset", "rows.jsonl", "--rewards", "last_number"],
            "no such model",
        ),
        (generate("--out", "rows.jsonl"), "rows.jsonl exists already; give another file or remove it"),
        (evaluate("--rewards", "last_number", "--out", "rows.jsonl"), "rows.jsonl exists already"),
        (generate("--out", "rows.jsonl/x"), "rows.jsonl/x: cannot write there: "),
        (["report", "absent"], "absent: found nothing there, expected a run directory"),
        (["report", "model"], "model: no run directory"),
        (["report"], "expected one run directory, found nothing; usage: taurl report RUN"),
        (["report", "a", "b"], "expected one run directory, found a b"),
    ],
)
def test_what_is_wrong_is_one_line(here, failing, words, message):
    assert message in failing(words, 2)
    assert {path.name for path in here.iterdir()} == {"model", "rows.jsonl", "rewards.py"}


# --- chat


@pytest.fixture
def talk(here, monkeypatch, capsys):
    def run(text, *words):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["llm", "chat", *SETTINGS, "--temperature", "0", *words])
        return code, capsys.readouterr()

    return run


def test_chat_answers_line_by_line_and_remembers(talk):
    code, captured = talk("1+1?\n2+2?\n")
    assert code == 0
    first = greedy([{"role": "user", "content": "1+1?"}])
    messages = [("user", "1+1?"), ("assistant", first), ("user", "2+2?")]
    second = greedy([{"role": role, "content": content} for role, content in messages])
    assert second != greedy([{"role": "user", "content": "2+2?"}])
    assert captured.out == f"{first}\n{second}\n"
    assert captured.err == ""


def test_chat_ends_with_an_empty_line_and_takes_a_system_prompt(talk):
    code, captured = talk("1+1?\n\n2+2?\n", "--system-prompt", "be kind")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "1+1?"}]
    assert (code, captured.out) == (0, f"{greedy(messages)}\n")


def test_chat_forgets_the_oldest_turns_where_the_context_ends(talk, failing, monkeypatch):
    code, captured = talk("".join(f"{'12345678 ' * 4}{i}\n" for i in range(4)))
    assert code == 0
    assert len(captured.out.splitlines()) == 4
    assert "(the first 1 turns no longer fit in the context)" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO("1" * 200 + "\n"))
    line = failing(["llm", "chat", *SETTINGS], 2)
    assert (
        "the line has 203 tokens with its template; with max_tokens 6 that is more than the model's context of 128"
        in line
    )


def test_chat_streams(here, monkeypatch, capsys):
    """What is printed as the tokens come is the answer, piece by piece."""
    pieces = []
    monkeypatch.setattr(chat, "print", lambda text, end="\n", **kwargs: pieces.append(text + end), raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1?\n"))
    assert main(["llm", "chat", *SETTINGS, "--temperature", "0"]) == 0
    assert len(pieces) > 3
    assert "".join(pieces) == greedy([{"role": "user", "content": "1+1?"}]) + "\n"


# --- report


def test_report_is_made_again_from_the_run_directory_alone(here, words, capsys):
    assert main(words(steps=1)) == 0
    page = here / "run/report.html"
    os.remove(page)
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    assert "letter_a" in page.read_text()
    assert main(["report", "--help"]) == 0
    assert "usage: taurl report RUN" in capsys.readouterr().out
