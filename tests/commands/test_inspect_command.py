"""taurl llm inspect on a tiny model: what is printed, with and without colour."""

import json

import pytest
from rich.console import Console
from tiny_policy import tiny_tokenizer

from taurl.cli import main
from taurl.commands.inspect import painted
from taurl.llm.data.token_rows import TokenRow

ROWS = [
    {"prompt": "1+1?", "completion": "2"},
    {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    {"prompt": "1+1?"},
    {"text": "abcdefgh"},
]


@pytest.fixture
def rows(here):
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["llm", "inspect", "--model", "model", "--dataset", "data.jsonl"]


def test_rows_are_printed_with_their_targets_in_brackets(rows, capsys):
    assert main([*rows, "--rows", "4", "--max-length", "6", "--overlong", "split"]) == 0
    assert capsys.readouterr().out.splitlines() == [  # the beginning of a row without a target is left out
        "data.jsonl, row 1: 4 tokens, 2 trained",
        "<end><assistant>⟦2<end>⟧",
        "",
        "data.jsonl, row 3, prompt alone: 7 tokens, 0 trained",
        "<user>1+1?<end><assistant>",
        "",
        "data.jsonl, row 4, part 1 of 2: 6 tokens, 5 trained",
        "a⟦bcdef⟧",
        "",
        "data.jsonl, row 4, part 2 of 2: 4 tokens, 3 trained",
        "f⟦gh<end>⟧",
        "",
        "1 dropped, 2 split",  # a pair is never cut
    ]
    assert main([*rows, "--rows", "1"]) == 0
    assert "<user>1+1?<end><assistant>⟦2<end>⟧" in capsys.readouterr().out


def test_both_answers_of_a_pair_are_shown_whatever_stands_beside_them(rows, here, capsys):
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    other = [talk[0], {"role": "assistant", "content": "3"}]
    pairs = [
        {"prompt": "1+1?", "chosen": talk, "rejected": other, "messages": talk},
        {"prompt": "1+1?", "chosen": "2", "rejected": "3", "text": "2"},
        {"chosen": talk, "rejected": other},
    ]
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert main(rows) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("<user>")]
    both = ["<user>1+1?<end><assistant>⟦2<end>⟧", "<user>1+1?<end><assistant>⟦3<end>⟧"]
    assert shown == both * 3
    (here / "data.jsonl").write_text(json.dumps({"question": "1+1?", "chosen": "2", "rejected": "3"}))
    assert main(rows) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("<user>")] == both


def test_targets_are_bright_and_special_tokens_have_a_colour_of_their_own():
    tokenizer = tiny_tokenizer()
    row = TokenRow(tokenizer("<user>hi<end><assistant>yo<end>")["input_ids"], [False] * 5 + [True] * 3)
    text = painted(row, tokenizer, coloured=True)
    assert text.plain == "<user>hi<end><assistant>yo<end>"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {
        "<user>": "cyan",
        "hi": "dim",
        "<end><assistant>": "cyan",
        "yo": "bold bright_green",
        "<end>": "bold bright_yellow",
    }
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[1;92myo" in capture.get()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llm", "inspect"], "no data set given: name one with --dataset"),
        (["llm", "inspect", "--model", "model", "--dataset", "absent.jsonl"], "no such data file: 'absent.jsonl'"),
        (
            ["llm", "inspect", "--model", "model", "--dataset", "bad.jsonl"],
            "bad.jsonl: row 1 of the data: its columns are answer; expected input_ids, messages,",
        ),
        (["llm", "inspect", "--mix", "a=0"], "the weight of a is 0"),
    ],
)
def test_what_is_wrong_is_one_line(here, failing, words, message):
    (here / "bad.jsonl").write_text('{"answer": 3}\n')
    assert message in failing(words, 2)
