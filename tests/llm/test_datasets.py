import json
import subprocess
import sys
import time
from collections import Counter
from datetime import date

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from taurl.llm.data.datasets import PromptOrder, as_rows, check_prompts, distinct_from, load_rows, prepare_rows, split
from taurl.llm.data.tasks import fingerprint
from taurl.runtime.errors import InputError


def refuses(call, *parts):
    """The call is refused with one line that holds all the parts."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    for part in parts:
        assert part in text, text


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# reasoning-gym --------------------------------------------------------------------------------------------------------


def test_chain_sum_has_its_questions_and_exact_answers():
    arguments = {"size": 50, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "seed": 7}
    rows = load_rows("reasoning-gym:chain_sum", arguments=arguments)
    assert len(rows) == 50
    for row in rows:
        assert set(row) == {"prompt", "question", "answer", "metadata"}
        left, sign, right = row["prompt"].split(": ")[1].removesuffix(" =").split()
        assert row["question"] == row["prompt"]
        assert int(row["answer"]) == int(left) + {"+": 1, "-": -1}[sign] * int(right)
        assert max(int(left), int(right)) < 100
        assert row["metadata"]["source_dataset"] == "chain_sum"
    assert rows == load_rows("reasoning-gym:chain_sum", arguments=arguments)
    shifted = load_rows("reasoning-gym:chain_sum", arguments=arguments | {"seed": 8})
    assert [row["prompt"] for row in shifted[:-1]] == [row["prompt"] for row in rows[1:]]  # why `split` goes by text


def test_the_default_size_and_seed():
    rows = load_rows("reasoning-gym:chain_sum")
    assert len(rows) == 5000
    assert rows == load_rows("reasoning-gym:chain_sum", arguments={"seed": 0})


def test_arguments_written_as_text_are_read_as_the_task_declares_them():
    given = {"size": "4", "seed": "3", "allow_negation": "true", "min_digits": 2}
    meant = {"size": 4, "seed": 3, "allow_negation": True, "min_digits": 2}
    assert load_rows("reasoning-gym:chain_sum", arguments=given) == load_rows(
        "reasoning-gym:chain_sum", arguments=meant
    )
    rows = load_rows("reasoning-gym:basic_arithmetic", arguments={"size": 20, "operators": "['+']"})
    assert not any(sign in row["metadata"]["expression"] for row in rows for sign in "*/")


def test_mistakes_in_a_task_are_named():
    refuses(lambda: load_rows("reasoning-gym:chainsum"), "no task 'chainsum'", "chain_sum")
    refuses(lambda: load_rows("reasoning-gym:zzzz"), "no task 'zzzz'")

    def chain_sum(**arguments):
        return load_rows("reasoning-gym:chain_sum", arguments=arguments)

    refuses(lambda: chain_sum(digits=2), "no argument 'digits'", "min_terms", "max_digits", "seed", "size")
    refuses(lambda: chain_sum(min_terms=5, max_terms=2), "max_terms must be >= min_terms", "min_terms=5 max_terms=2")
    refuses(lambda: chain_sum(min_terms="two"), "min_terms='two'", "integer")
    refuses(lambda: chain_sum(min_terms=1.5), "min_terms=1.5", "integer")


# Files ----------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "2 + 4?", "answer": "6"}, {"prompt": "a “quoted”, word\u2028", "answer": "é"}]


def test_every_format_gives_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    names = [
        written(tmp_path / "a.jsonl", lines + "\n\n"),
        written(tmp_path / "bom.jsonl", "\ufeff" + lines),
        written(tmp_path / "lines.json", lines),
        written(tmp_path / "array.json", json.dumps(ROWS, indent=1)),
        written(tmp_path / "a.csv", 'prompt,answer\r\n2 + 4?,6\r\n\r\n"a “quoted”, word\u2028",é\r\n'),
        str(tmp_path / "a.parquet"),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), names[-1])
    for name in names:
        assert load_rows(name) == ROWS, name


def test_messages_stand_as_json_in_a_csv_file(tmp_path):
    messages = [{"role": "user", "content": "2 + 4?"}]
    cell = json.dumps(messages).replace('"', '""')
    name = written(tmp_path / "m.csv", f'prompt,completion\r\n"{cell}","[{{6}}]"\r\n')
    assert load_rows(name) == [{"prompt": messages, "completion": "[{6}]"}]
    long = written(tmp_path / "long.csv", f"prompt\r\n{'a' * 200_000}\r\n")
    assert len(load_rows(long)[0]["prompt"]) == 200_000


def test_what_arrow_fills_in_is_left_out_and_what_json_says_is_null_stays(tmp_path):
    calls = [{"a": 1, "b": None}, {"b": 2}]
    rows = [{"prompt": [{"role": "user", "content": "x", "arguments": call}]} for call in calls]
    lines = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_rows(lines) == rows
    expected = [{"a": 1}, {"b": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    for found in (load_rows(str(tmp_path / "m.parquet")), as_rows(datasets.Dataset.from_list(rows))):
        assert [row["prompt"][0]["arguments"] for row in found] == expected


def test_message_prompts_survive_parquet(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "2 + 4?"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    loaded = load_rows(str(tmp_path / "m.parquet"))
    assert loaded == rows
    check_prompts(loaded)


def test_an_unreadable_row_is_named_by_line(tmp_path):
    good = json.dumps(ROWS[0])
    torn = written(tmp_path / "torn.jsonl", f'{good}\n\n{good}\n{{"prompt": "2 +\n{good}\n')
    refuses(lambda: load_rows(torn), f"{torn}:4: not JSON", '{"prompt": "2 +')
    array = written(tmp_path / "row.jsonl", f"{good}\n[1, 2]\n")
    refuses(lambda: load_rows(array), f"{array}:2: found [1, 2]; expected an object")
    item = written(tmp_path / "item.json", f'[{good}, "x"]')
    refuses(lambda: load_rows(item), f'{item}: item 2: found "x"; expected an object')
    cut = written(tmp_path / "cut.json", f"[{good},")
    refuses(lambda: load_rows(cut), f"{cut}: not JSON")
    ragged = written(tmp_path / "ragged.csv", 'prompt,answer\n"two\nlines",6\n1,2,3\n')
    refuses(lambda: load_rows(ragged), f"{ragged}:4: 3 values for the 2 columns prompt, answer")
    short = written(tmp_path / "short.csv", "prompt,answer\n1\n")
    refuses(lambda: load_rows(short), f"{short}:2: 1 values for the 2 columns")
    twice = written(tmp_path / "twice.csv", "prompt,prompt\n1,2\n")
    refuses(lambda: load_rows(twice), f"{twice}:1: the header names a column twice", "'prompt'")
    open_quote = written(tmp_path / "open.csv", 'prompt,answer\n"1,2\n')
    refuses(lambda: load_rows(open_quote), f"{open_quote}:2: not CSV")
    (tmp_path / "latin.csv").write_bytes("prompt\né\n".encode("latin-1"))
    refuses(lambda: load_rows(str(tmp_path / "latin.csv")), "not UTF-8 text")
    broken = written(tmp_path / "broken.parquet", "PAR1")
    refuses(lambda: load_rows(broken), f"{broken}: not a readable Parquet file")


def test_files_that_are_missing_empty_or_of_another_kind(tmp_path):
    refuses(lambda: load_rows(str(tmp_path / "none.jsonl")), "no such data file", "none.jsonl")
    refuses(lambda: load_rows("none.csv"), "no such data file: 'none.csv'")
    refuses(lambda: load_rows(written(tmp_path / "empty.jsonl", "\n")), "empty.jsonl: holds no rows")
    refuses(lambda: load_rows(written(tmp_path / "empty.csv", "prompt,answer\n")), "empty.csv: holds no rows")
    refuses(lambda: load_rows(written(tmp_path / "a.txt", "x")), "ends in '.txt'; expected one of .jsonl, .json, .csv")
    refuses(lambda: load_rows(str(tmp_path)), "is a folder; give one file in it")
    refuses(lambda: load_rows(written(tmp_path / "a.json", "[]"), arguments={"size": 3}), "takes no arguments (size")


def test_answers_after_a_marker_are_numbers_alone(tmp_path):
    rows = [
        {"question": "How many in all?", "answer": "48 / 2 = <<48/2=24>>24 in May.\n48 + 24 = 72\n#### 72"},
        {"question": "How much is left?", "answer": "She has 1,200 - 3,400 dollars.\n#### -2,200"},
        {"question": "What is half of it?", "answer": "#### is a marker too\n#### 0.5 "},
    ]
    file = written(tmp_path / "gsm8k.jsonl", "\n".join(map(json.dumps, rows)))
    read = load_rows(file, columns={"question": "prompt"}, answer_after="####")
    check_prompts(read)
    assert [row["answer"] for row in read] == ["72", "-2200", "0.5"]


# The hub and Python objects -------------------------------------------------------------------------------------------


def test_a_hub_name_that_cannot_be_fetched_is_one_quick_line():
    start = time.monotonic()
    name = "taurl-tests-nobody/no-such-data:main:test"
    refuses(lambda: load_rows(name), name, "hub", "reasoning-gym:TASK")
    refuses(lambda: load_rows("a/b:c:d:e"), "owner/name:config:split")
    assert time.monotonic() - start < 120  # and not the minutes of a client that tries again and again


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", None, "train")),
        ("a/b:test", ("a/b", None, "test")),
        ("a/b:main:test", ("a/b", "main", "test")),
        ("a/b:train[:100]", ("a/b", None, "train[:100]")),
    ],
)
def test_what_a_hub_name_asks_for(monkeypatch, name, expected):
    def load_dataset(repository, config, *, split, streaming):
        return datasets.Dataset.from_list([{"prompt": str((repository, config, split, streaming))}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("taurl.llm.data.datasets.hub_problem", lambda *_: None)
    assert load_rows(name)[0]["prompt"] == str((*expected, False))


def test_a_dataset_object_and_a_list_give_the_same_rows():
    dataset = datasets.Dataset.from_list(ROWS)
    assert as_rows(dataset) == as_rows(ROWS) == as_rows(tuple(ROWS)) == ROWS
    assert as_rows([{"prompt": "a"}, {"prompt": "b", "answer": "1"}])[0] == {"prompt": "a", "answer": None}
    copy = as_rows(ROWS)
    copy[0]["prompt"] = "changed"
    assert ROWS[0]["prompt"] == "2 + 4?"


def test_objects_that_are_no_rows_are_refused():
    dataset = datasets.Dataset.from_list(ROWS)
    refuses(lambda: as_rows(datasets.DatasetDict(train=dataset, test=dataset)), "train, test", "a split")
    refuses(
        lambda: as_rows(dataset.to_iterable_dataset()), "IterableDataset", "give list(rows), or to SFT streaming=True"
    )
    refuses(lambda: as_rows("prompt"), "str")
    refuses(lambda: as_rows([{"prompt": "a"}, "b"]), "row 2 of the data is a str")
    refuses(lambda: as_rows([]), "empty")


def test_rows_of_any_objects_have_a_fingerprint_that_another_process_finds_again():
    def of(rows):
        return fingerprint([rows, [[1, 2]]])

    assert of([{"check": lambda: 1}]) == of([{"check": lambda: 2}])  # shown with their place in memory
    assert of([{"at": date(2026, 1, 1)}]) != of([{"at": date(2026, 1, 2)}])
    assert of([{"a": {1: "x", "b": "y"}}]) != of([{"a": {1: "x", "b": "z"}}])
    assert of([{"a": {(1, 2): "x"}}]) != of([{"a": {(1, 3): "x"}}])
    one, other = set(range(0, 80, 8)), set(range(72, -8, -8))  # the same, met in another order
    assert list(one) != list(other)
    assert of([{"a": one}]) == of([{"a": other}])


# Columns --------------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_even_swapped():
    rows = prepare_rows([{"question": "q", "answer": "a"}], columns={"question": "prompt"})
    assert rows == [{"prompt": "q", "answer": "a"}]
    rows = prepare_rows([{"a": 1, "b": 2}], columns={"a": "b", "b": "a"})
    assert rows == [{"b": 1, "a": 2}]


def test_renaming_mistakes_name_the_columns_there_are():
    rows = [{"question": "q", "prompt": "p", "answer": "a"}]
    refuses(lambda: prepare_rows(rows, columns={"qestion": "prompt"}), "'qestion'", "question, prompt, answer")
    refuses(lambda: prepare_rows(rows, columns={"question": "prompt"}), "'prompt'", "question, prompt, answer")
    refuses(lambda: prepare_rows(rows, columns={"question": "x", "answer": "x"}), "'x'")


def test_a_question_is_a_prompt_where_there_is_none():
    assert prepare_rows([{"question": "q", "answer": "a"}]) == [{"prompt": "q", "question": "q", "answer": "a"}]
    for other in ("prompt", "text", "messages"):
        rows = [{"question": "q", other: "p"}]
        assert prepare_rows(rows) == rows
        assert prepare_rows([{"question": "q", other: None}])[0]["prompt"] == "q"
    assert prepare_rows([{"question": "q", "text": "t", "chosen": "a", "rejected": "b"}])[0]["prompt"] == "q"


def test_the_answer_after_its_marker():
    def answer(text):
        return prepare_rows([{"answer": text}], answer_after="####")[0]["answer"]

    assert answer("2 #### 3\n#### 1,234,567 ") == "1234567"
    assert answer("#### -12,000.50") == "-12000.50"
    assert answer("####1,2,3") == "1,2,3"  # a list, not thousands
    rows = [{"answer": "#### 1"}, {"answer": "no marker here"}]
    refuses(lambda: prepare_rows(rows, answer_after="####"), "row 2", "no '####'", "no marker here")
    refuses(lambda: prepare_rows([{"answer": 3}], answer_after="####"), "row 1", "'3'")
    refuses(lambda: prepare_rows([{"prompt": "x"}], answer_after="####"), "no column 'answer'", "prompt")


def test_prompts_are_checked_and_the_row_named():
    check_prompts(ROWS)
    refuses(lambda: check_prompts([]), "empty")
    refuses(lambda: check_prompts([{"question": "q"}]), "no column 'prompt'", "question", "question=prompt")
    refuses(lambda: check_prompts([ROWS[0], {"prompt": ""}]), "row 2 of the data", "empty string")
    refuses(lambda: check_prompts([ROWS[0], {"prompt": [{"role": "user"}]}]), "row 2", "no 'content'")


# Splits and order -----------------------------------------------------------------------------------------------------


def test_a_split_of_real_questions_cannot_overlap():
    # 200 distinct one-digit questions at most, so 1,000 rows repeat most of them several times
    arguments = {"size": 1000, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = load_rows("reasoning-gym:chain_sum", arguments=arguments)
    train, held_out, removed = split(rows, 40, seed=1)
    texts = {row["prompt"] for row in held_out}
    counts = Counter(row["prompt"] for row in rows)
    assert len(held_out) == len(texts) == 40
    assert not texts & {row["prompt"] for row in train}
    assert removed == sum(counts[text] - 1 for text in texts) > 40
    assert len(train) + len(held_out) + removed == 1000
    assert {row["prompt"] for row in train} | texts == set(counts)  # nothing else is lost
    assert split(rows, 40, seed=1) == (train, held_out, removed)
    assert {row["prompt"] for row in split(rows, 40, seed=2)[1]} != texts


def test_equal_text_is_equal_in_any_form():
    forms = ["2 + 4?", " 2 +  4?\n", [{"role": "user", "content": "2 + 4?"}]]
    rows = [{"prompt": form} for form in [*forms, "3 + 4?"]]
    for seed in range(8):  # either text may be drawn
        train, held_out, removed = split(rows, 1, seed=seed)
        assert (len(train), len(held_out), removed) in [(1, 1, 2), (3, 1, 0)]
    assert distinct_from(rows, [{"prompt": "2 + 4?"}]) == (rows[3:], 3)


def test_too_few_distinct_rows_are_said_with_the_numbers():
    rows = [{"prompt": text} for text in "aabb"]
    refuses(lambda: split(rows, 2, seed=0), "hold out 2 of 4 rows", "2 distinct prompts")
    refuses(lambda: distinct_from(rows, [{"prompt": "a"}, {"prompt": "b"}]), "all 4", "2 held-out")
    assert split(rows, 0, seed=0) == (rows, [], 0)
    assert split(rows, 1, seed=0)[2] == 1


def test_the_order_is_a_function_of_seed_and_position():
    order = PromptOrder(7, seed=3)
    stream = order.take(0, 70)
    epochs = [stream[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5  # reshuffled
    for start in (0, 5, 6, 7, 20, 63):  # as a resumed run asks, from anywhere and in any order
        assert PromptOrder(7, seed=3).take(start, 7) == stream[start : start + 7]
    assert order.take(3, 4) == stream[3:7]
    assert PromptOrder(7, seed=4).take(0, 70) != stream
    assert order.take(5, 0) == []
    refuses(lambda: PromptOrder(0, seed=1), "no rows")


def test_the_module_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, taurl.llm.data.datasets; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
