"""From files and objects to token rows: every form, lengths, templates, mixing, streams, and what is refused."""

import csv
import json
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from chat_families import CHATML_MARKED, QWEN3, SPECIAL, character_tokenizer
from tiny_policy import tiny_model

from taurl.llm import GRPOConfig
from taurl.llm.data.chat import encode_prompt, prompt_text, stop_token_ids
from taurl.llm.data.chat_templates import CHATML_TEXT, set_chat_template
from taurl.llm.data.datasets import key
from taurl.llm.data.row_forms import last_exchange, question, read_form
from taurl.llm.data.row_order import Mixture, RowCycle, RowStream
from taurl.llm.data.row_reader import RowReader
from taurl.llm.data.tasks import PromptReader, train_and_held_out
from taurl.llm.data.token_rows import TokenRow, fit
from taurl.llm.settings import RowSettings
from taurl.runtime.errors import InputError

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "six"},
]


def reader_of(template=CHATML_TEXT, tokenizer=None, model=None, **settings):
    tokenizer = tokenizer or character_tokenizer(template)
    return RowReader.of(RowSettings(**settings), tokenizer, model)


def shown(row, reader):
    """The row's text with its targets in brackets."""
    text, inside = "", False
    for token, trained in zip(row.ids, row.trained, strict=True):
        text += "[" * (trained and not inside) + "]" * (inside and not trained) + reader.tokenizer.decode([token])
        inside = trained
    return text + "]" * inside


def read(rows, **settings):
    """What the rows become, as text."""
    reader = reader_of(**settings)
    return [shown(row, reader) for row in reader.read(rows).token_rows]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
WHOLE = ASKED + "[four<|im_end|>]\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n[six<|im_end|>]\n"


# Forms ----------------------------------------------------------------------------------------------------------------


def test_every_form_by_hand():
    sharegpt = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]
    answered = ASKED + "[four<|im_end|>]\n"
    for row, expected in [
        ({"messages": TALK}, WHOLE),
        ({"conversations": TALK}, WHOLE),
        ({"conversations": sharegpt}, answered),
        ({"prompt": "2+2?", "completion": "four"}, answered),
        ({"prompt": TALK[:1], "completion": "four"}, answered),
        ({"prompt": TALK[:1], "completion": TALK[1:2]}, answered),
        ({"prompt": "2+2?", "completion": TALK[1:]}, WHOLE),
        (
            {"prompt": [*TALK[:1], {"role": "assistant", "content": "fo"}], "completion": "ur"},
            ASKED + "fo[ur<|im_end|>]\n",
        ),
        ({"text": "2+2 is 4"}, "2[+2 is 4</s>]"),
        ({"input_ids": [20, 21, 22]}, None),
        ({"input_ids": [20, 21, 22, 0], "labels": [-100, -100, 22, -100], "attention_mask": [1, 1, 1, 0]}, None),
    ]:
        texts = read([row])
        if expected is not None:
            assert texts == [expected], row
    rows = reader_of().read([{"input_ids": [20, 21, 22]}, {"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, -100]}])
    assert rows.token_rows == [
        TokenRow([20, 21, 22], [False, True, True]),
        TokenRow([5, 6, 7, 0], [False, False, True, False]),
    ]
    padded = {"input_ids": [0, 5, 6], "labels": [-100, 5, 6], "attention_mask": [0, 1, 1]}
    assert reader_of().read([padded]).token_rows == [TokenRow([5, 6], [False, True])]


def test_a_mask_of_token_ids_trains_all_of_them_or_is_refused():
    row = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    assert reader_of(mask="all").read([row]).token_rows == [TokenRow([5, 6, 7], [False, True, True])]
    for mask in ("completion", "assistant", "last"):
        with pytest.raises(
            InputError, match=f"row 1 of the data: mask {mask} needs a conversation, and this row is token"
        ):
            reader_of(mask=mask).read([row])


def test_a_row_takes_some_six_bytes_a_token():
    row = TokenRow(range(40_000, 40_500), [False, *[True] * 499])
    assert sum(map(sys.getsizeof, (row, *vars(row).values()))) <= 6 * len(row) + 200
    assert (row.last_target, row.targets, TokenRow([1, 2], [False, False]).last_target) == (499, 499, 0)
    assert row == TokenRow(row.ids, row.trained) != TokenRow(row.ids, [False] * 500)


def test_masks_of_token_ids_by_trls_names():
    for name in ("completion_mask", "assistant_masks"):
        (row,) = reader_of().read([{"input_ids": [5, 6, 7, 8], name: [0, 0, 1, 0]}]).token_rows
        assert row == TokenRow([5, 6, 7, 8], [False, False, True, False])
    with pytest.raises(InputError, match="column 'completion_mask': it has 1 values for 2 input_ids"):
        reader_of().read([{"input_ids": [5, 6], "completion_mask": [1]}])


def test_sharegpts_system_column_and_function_calls():
    talk = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]
    assert read([{"conversations": talk, "system": "Sing."}]) == [
        "<|im_start|>system\nSing.<|im_end|>\n" + ASKED + "[four<|im_end|>]\n"
    ]
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
    chat = read_form({"conversations": [talk[0], call]}, strings_are_messages=True)
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    parsed = {**call, "value": {"name": "add", "arguments": {"a": 2}}}
    again = read_form({"conversations": [talk[0], parsed]}, strings_are_messages=True)
    assert again.messages == chat.messages
    with pytest.raises(InputError, match="message 2 is a function_call, but no JSON"):
        read_form({"conversations": [talk[0], {"from": "function_call", "value": "add"}]}, strings_are_messages=True)


def test_what_makes_two_rows_the_same_question():
    assert question({"messages": TALK}) == question({"messages": TALK[:2]})  # one goes on where the other ends
    assert question({"messages": TALK}) != question({"messages": TALK[2:]})
    asked = prompt_text(TALK[:3])  # what its last answer answers
    assert last_exchange({"messages": TALK}) == (asked, TALK[3]["content"])
    assert last_exchange({"messages": TALK, "prompt": TALK[0]["content"]})[0] == asked  # as it is trained on
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    assert last_exchange({"messages": [*TALK[:3], call]}) == (asked, None)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    assert last_exchange({"messages": [*TALK[:3], call]}) == (asked, None)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    assert last_exchange({"messages": [*TALK[:3], call]}) == (asked, None)
    first, other = ({"input_ids": np.array([5, 6, last]), "labels": [-100, -100, last]} for last in (7, 8))
    assert question(first) == question(other) == "[5, 6]"
    assert question({"input_ids": torch.tensor([5, 6])}) == "[5, 6]"


def test_empty_cells_are_no_values_where_a_list_would_stand():
    row = {"messages": "", "tools": "", "chat_template_kwargs": "", "prompt": "2+2?", "completion": "four"}
    assert read([row]) == [ASKED + "[four<|im_end|>]\n"]


def test_nothing_is_evaluated_where_that_is_asked_for(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "x"} for i in range(3)]
    train, held_out, _ = train_and_held_out(reader_of(), rows, rows, 0, 0)
    assert (len(train), len(held_out)) == (3, 0)


def test_an_answer_is_cut_in_a_mixed_data_set_whose_column_is_renamed(tmp_path):
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "solution": "x #### 7"}])
    reader = reader_of(mix={other: 1}, answer_after="####", columns={"solution": "answer"})
    found = reader.for_other(other).prepare([{"prompt": "a", "solution": "x #### 7"}])
    assert found == [{"prompt": "a", "answer": "7"}]


def test_strings_are_raw_text_without_a_template_or_where_asked():
    row = {"prompt": "2+2=", "completion": "4"}
    assert read([row], template=None) == read([row], prompt_format="text") == ["2+2=[4</s>]"]
    with pytest.raises(InputError, match="row 1 of the data: system_prompt needs a chat template"):
        read([row], template=None, system_prompt="Be brief.")


def test_a_system_prompt_stands_before_every_conversation_without_one():
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    own = [{"role": "system", "content": "Sing."}, *TALK[:2]]
    begun = {"prompt": [*TALK[:1], {"role": "assistant", "content": "fo"}], "completion": "ur"}
    assert read([{"messages": TALK}, {"messages": own}, begun], system_prompt="Be brief.") == [
        system + WHOLE,
        system.replace("Be brief.", "Sing.") + ASKED + "[four<|im_end|>]\n",
        system + ASKED + "fo[ur<|im_end|>]\n",
    ]


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": TALK[:2], "tools": tools, "chat_template_kwargs": {"enable_thinking": True}}
    names = [jsonl(tmp_path / "a.jsonl", [row]), str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]
    with open(names[1], "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow({name: json.dumps(value) for name, value in row.items()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), names[2])
    tools_text = '<|im_start|>system\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
    expected = [tools_text + ASKED + "[<think>\n\n</think>\n\nfour<|im_end|>]\n"]
    for source in (*names, datasets.Dataset.from_list([row])):
        assert read(source, template=QWEN3) == expected


def test_keys_that_parquet_adds_are_taken_away(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "see", "arguments": {"b": 2}}}]}
    rows = [{"messages": [TALK[0], call]}, {"messages": [TALK[0], other]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    template = "{% for m in messages %}{{ m.role + (m.tool_calls or m.content) | tojson + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    assert read(str(tmp_path / "a.parquet"), template=template) == read(rows, template=template)


def test_settings_of_masks_and_turns():
    assert read([{"messages": TALK}], mask="last") == [WHOLE.replace("[four<|im_end|>]", "four<|im_end|>")]
    thought = "<think>\n\n</think>\n\n"
    apart = read([{"messages": TALK}], template=QWEN3, separate_turns=True)
    assert apart == [
        f"{ASKED}[{thought}four<|im_end|>]\n",
        WHOLE.replace("[four<|im_end|>]", "four<|im_end|>").replace("[six", f"[{thought}six"),
    ]
    with pytest.raises(InputError, match="row 1 of the data: the chat template renders"):
        read([{"messages": TALK}], template=QWEN3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "x", "answer": "y"}, "its columns are question, answer; expected input_ids, messages"),
        ({"prompt": "x", "chosen": "y"}, "rename it with columns: chosen=completion"),
        ({"prompt": "x", "completion": 3}, r"column 'completion': it is 3 \(int\)"),
        ({"prompt": 3, "completion": "x"}, r"column 'prompt': it is 3 \(int\); expected a string or a list"),
        ({"prompt": "x", "completion": TALK[:1]}, "first message is of role 'user'; expected assistant"),
        ({"text": " "}, "column 'text': it is an empty string"),
        ({"text": TALK}, "column 'text': it is .*expected a string"),
        ({"messages": "hello"}, r"column 'messages': it is 'hello' \(str\); expected a list, or JSON of one"),
        ({"messages": [{"role": "user"}]}, "column 'messages': message 1 has no 'content'"),
        (
            {"prompt": [{"role": "assistant", "content": None, "tool_calls": [{}]}], "completion": "x"},
            "column 'prompt': its last message is the assistant's and has no content",
        ),
        ({"messages": TALK[:1]}, "nothing to train on: no message has the role assistant"),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "message 1 is from 'bing'; expected one of system, human",
        ),
        ({"messages": TALK, "tools": {"a": 1}}, "column 'tools': it is .*expected a list of JSON schemas"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "column 'chat_template_kwargs': it is .*expected a dict"),
        ({"input_ids": [1, 999]}, "column 'input_ids': value 1 is 999; expected a token id below"),
        ({"input_ids": [1, 2.5]}, r"column 'input_ids': it is \[1, 2.5\]"),
        ({"input_ids": [1, 2**31]}, r"column 'input_ids': it is \[1, 2147483648\]"),
        ({"input_ids": "abc"}, "column 'input_ids': it is 'abc'"),
        ({"input_ids": [1, 2], "labels": [1]}, "column 'labels': it has 1 values for 2 input_ids"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "column 'labels': value 0 is 2; expected -100 or the token"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing to train on: none of its tokens is a target"),
    ],
)
def test_what_is_wrong_is_named_with_file_row_column_and_value(tmp_path, row, problem):
    good = {"prompt": "2+2?", "completion": "four"}
    name = jsonl(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(InputError, match=f"rows.jsonl: row 2 of the data: .*{problem}") as caught:
        reader_of().read(name)
    assert "\n" not in str(caught.value)


# Lengths --------------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_truncated_dropped_or_split_and_counted():
    rows = [{"text": "abcdefghij"}, {"text": "abc"}]
    for how, texts, counted in [
        ("truncate", ["a[bcd]", "a[bc</s>]"], {"truncated": 1, "split": 0, "dropped": 0}),
        ("drop", ["a[bc</s>]"], {"truncated": 0, "split": 0, "dropped": 1}),
        ("split", ["a[bcd]", "d[efg]", "g[hij]", "j[</s>]", "a[bc</s>]"], {"truncated": 0, "split": 1, "dropped": 0}),
    ]:
        reader = reader_of(max_length=4, overlong=how)
        found = reader.read(rows)
        assert [shown(row, reader) for row in found.token_rows] == texts
        assert found.counts == counted
        assert found.rows == (rows[1:] if how == "drop" else rows)
    row = {"input_ids": list(range(12)), "labels": [-100] * 10 + [10, 11]}
    with pytest.raises(InputError, match="none of 1 rows is left within 4 tokens"):
        reader_of(max_length=4).read([row])
    assert reader_of(max_length=4, overlong="split").read([row]).token_rows == [
        TokenRow([9, 10, 11], [False, True, True])
    ]


@pytest.mark.parametrize("length", range(5, 30))
def test_splitting_loses_no_target(length):
    whole = TokenRow(list(range(length)), [False] + [place % 3 > 0 for place in range(1, length)])
    targets = [token for part in fit(whole, 5, "split") for token, t in zip(part.ids, part.trained, strict=True) if t]
    assert targets == [token for token in whole.ids if token % 3]
    assert all(len(part.ids) <= 5 and not part.trained[0] for part in fit(whole, 5, "split"))


def test_the_models_context_is_the_longest_row():
    model = tiny_model(max_position_embeddings=16, vocab_size=200)
    assert len(reader_of(model=model).read([{"text": "a" * 50}]).token_rows[0].ids) == 16
    with pytest.raises(InputError, match="max_length is 17, more than the model's context of 16"):
        reader_of(model=model, max_length=17)


# Templates ------------------------------------------------------------------------------------------------------------


def base_model():
    """A model whose vocabulary has no token of ChatML, nor a template."""
    tokenizer = character_tokenizer(special=tuple(token for token in SPECIAL if "im_" not in token))
    return tokenizer, tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)


def test_a_base_model_gets_chatml_with_embeddings_of_average_and_its_stop_token():
    tokenizer, model = base_model()
    size, old = len(tokenizer), model.get_input_embeddings().weight.detach().clone()
    old_head = model.get_output_embeddings().weight.detach().clone()
    random = torch.random.get_rng_state()
    reader = reader_of(tokenizer=tokenizer, model=model)
    assert tokenizer.chat_template is None
    (row,) = reader.read([{"messages": TALK}]).token_rows
    assert shown(row, reader) == WHOLE
    assert reader.new_tokens == [size, size + 1] == [row.ids[0], row.ids[-2]]
    assert row.trained[-2:] == [True, False]
    for before, after in ((old, model.get_input_embeddings()), (old_head, model.get_output_embeddings())):
        assert torch.equal(after.weight[:size], before)
        mean = torch.stack([before[:, column].sum() / size for column in range(before.shape[1])])
        assert torch.allclose(after.weight[size], mean, atol=1e-12)
        assert torch.equal(after.weight[size], after.weight[size + 1])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.config.vocab_size == size + 2
    assert model.generation_config.eos_token_id == [1, size + 1] == list(stop_token_ids(model, tokenizer))
    logits = model(input_ids=torch.tensor([row.ids])).logits
    assert torch.allclose(logits[..., size], logits[..., :size].mean(dim=-1))


def test_what_was_read_for_an_outline_is_then_given_to_the_model():
    tokenizer, model = base_model()
    with torch.device("meta"):
        outline = tiny_model(vocab_size=len(tokenizer))
    reader = reader_of(tokenizer=tokenizer, model=outline)
    reader.read([{"messages": TALK}])
    reader.settle(model)
    other_tokenizer, other = base_model()
    other_reader = reader_of(tokenizer=other_tokenizer, model=other)
    other_reader.read([{"messages": TALK}])
    other_reader.settle(other)  # has it already
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.config.vocab_size == other.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == other.generation_config.eos_token_id


def test_a_base_model_keeps_its_vocabulary_where_it_is_given_text():
    tokenizer, model = base_model()
    reader = reader_of(tokenizer=tokenizer, model=model)
    reader.read([{"text": "abc"}, {"prompt": "a", "completion": "b"}])
    assert tokenizer.chat_template is None
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_spare_rows_of_the_embedding_are_used_first():
    tokenizer, _ = base_model()
    model = tiny_model(vocab_size=len(tokenizer) + 10)
    known = len(tokenizer)
    assert set_chat_template("chatml", tokenizer, model) == [known, known + 1]
    weight = model.get_input_embeddings().weight
    assert len(weight) == known + 10
    assert torch.allclose(weight[known], weight[:known].mean(dim=0), atol=1e-6)


def test_a_template_of_another_family_whose_end_of_turn_the_model_does_not_know_is_refused(tmp_path):
    (tmp_path / "other.jinja").write_text(CHATML_TEXT.replace("im_end", "eot"))
    with pytest.raises(InputError, match=r"it ends a turn with <\|eot\|>, which is no token of this model"):
        reader_of(chat_template=str(tmp_path / "other.jinja"))


def test_another_template_by_name_file_or_folder(tmp_path):
    tokenizer = character_tokenizer("{{ 'another' }}")
    assert (
        shown(
            reader_of(tokenizer=tokenizer, chat_template="chatml").read([{"messages": TALK}]).token_rows[0],
            reader_of(tokenizer=tokenizer),
        )
        == WHOLE
    )
    (tmp_path / "mine.jinja").write_text(CHATML_MARKED)
    assert read([{"messages": TALK}], template=None, chat_template=str(tmp_path / "mine.jinja")) == [WHOLE]
    character_tokenizer(CHATML_TEXT).save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    assert read([{"messages": TALK}], template=None, chat_template=str(tmp_path / "model")) == [WHOLE]
    (tmp_path / "torn.jinja").write_text("a\n{% if %}")
    for name, problem in [
        ("absent.jinja", "chat_template is 'absent.jinja'; expected chatml, a template file or a model's folder"),
        (str(tmp_path / "torn.jinja"), r"torn.jinja:2: not a Jinja template"),
    ]:
        with pytest.raises(InputError, match=problem):
            reader_of(chat_template=name)


# Order, mixing, streams -----------------------------------------------------------------------------------------------


def texts(letter, count):
    return [{"text": f"{letter}{number}"} for number in range(count)]


def taken(feed, count, reader):
    return [reader.tokenizer.decode(row.ids).removesuffix("</s>") for row in feed.take(count)]


def test_data_sets_are_mixed_by_weight_each_in_epochs_of_its_own(tmp_path):
    other = jsonl(tmp_path / "other.jsonl", texts("b", 7))
    reader = reader_of(mix={other: 0.25})
    cycle = RowCycle(reader.read(texts("a", 20)), seed=3)
    drawn = taken(cycle, 5000, reader)
    of_other = [text for text in drawn if text[0] == "b"]
    assert abs(len(of_other) / 5000 - 0.2) < 0.02
    for epoch in range(0, len(of_other) - 7, 7):
        assert len(set(of_other[epoch : epoch + 7])) == 7
    of_first = [text for text in drawn if text[0] == "a"]
    assert len(set(of_first[:20])) == 20
    again = RowCycle(reader.read(texts("a", 20)), seed=3)
    again.load_state_dict({"position": 4000})
    assert taken(again, 1000, reader) == drawn[4000:]
    assert taken(RowCycle(reader.read(texts("a", 20)), seed=4), 50, reader) != drawn[:50]


def test_a_mixture_counts_its_draws():
    mixture, seen = Mixture([1, 2, 0.5], seed=1), [0, 0, 0]
    for position in range(2500):
        source, before = mixture.at(position)
        assert before == seen[source]
        seen[source] += 1
    assert Mixture([1, 2, 0.5], seed=1).at(2400) == mixture.at(2400)


def test_columns_are_renamed_in_a_further_data_set_where_it_has_them(tmp_path):
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    rows = [{"question": "c", "completion": "d"}]
    reader = reader_of(mix={other: 1}, columns={"question": "prompt"})
    assert [row["prompt"] for row in reader.read(rows).rows] == ["c", "a"]
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expected a number above 0|should be a finite number"):
            RowSettings(mix={"x": weight})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "list", "datasets"])
def test_a_stream_resumes_exactly_wherever_it_stood(tmp_path, kind):
    rows = [*texts("a", 10), {"text": "a" * 30}]
    source = rows
    if kind == "jsonl":
        source = jsonl(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        source = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    if kind == "datasets":
        source = datasets.Dataset.from_list(rows).to_iterable_dataset()
    other = jsonl(tmp_path / "other.jsonl", texts("b", 3))
    reader = reader_of(mix={other: 0.5}, shuffle_window=4, max_length=16, overlong="split")

    def stream():
        return RowStream(reader, source, seed=5)

    whole = stream()
    drawn = taken(whole, 60, reader)
    assert len({text for text in drawn if text[0] == "a"}) == 12  # the long row makes two
    first = [text for text in drawn if text[0] == "a"]
    assert {first[i] for i in range(4)} == {"a0", "a1", "a2", "a3"}
    for stop in (1, 7, 23, 41):
        begun = stream()
        assert taken(begun, stop, reader) == drawn[:stop]
        state = json.loads(json.dumps(begun.state_dict()))
        resumed = stream()
        resumed.load_state_dict(state)
        assert taken(resumed, 60 - stop, reader) == drawn[stop:]
        assert resumed.counts == whole.counts


def test_a_stream_passes_over_held_out_questions_and_names_its_rows(tmp_path):
    rows = texts("a", 6)
    without = {key(row) for row in rows[:3]}
    reader = reader_of(shuffle_window=2)
    assert set(taken(RowStream(reader, rows, 0, without=without), 20, reader)) == {"a3", "a4", "a5"}
    with pytest.raises(InputError, match="gives no row to train on"):
        RowStream(reader, rows[:3], 0, without=without).take(1)
    name = jsonl(tmp_path / "rows.jsonl", [*rows, {"text": 3}])
    with pytest.raises(InputError, match=r"rows.jsonl: row 7 of the data: column 'text': it is 3"):
        RowStream(reader, name, 0).take(7)


def test_a_stream_leaves_the_model_as_it_is_once_it_is_open():
    rows = [{"text": "a"}, {"text": "b"}, {"messages": TALK}]
    tokenizer, model = base_model()
    stream = RowStream(reader_of(tokenizer=tokenizer, model=model, shuffle_window=2), rows, 0)
    with pytest.raises(InputError, match=r"row 3 of the data: a conversation, .* give chat_template chatml"):
        stream.take(3)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    reader = reader_of(tokenizer=tokenizer, model=model, shuffle_window=2, chat_template="chatml")
    assert len(RowStream(reader, rows, 0).take(3)) == 3


def test_rows_are_named_by_their_number_in_the_data():
    texts = [{"text": "a"}, {"text": "a"}, {"text": 3}]
    with pytest.raises(InputError, match="row 3 of the data"):
        reader_of().read(texts, distinct=True)
    settings = GRPOConfig(max_tokens=8, eval_rows=0)
    model = tiny_model(vocab_size=256, max_position_embeddings=60)
    prompts = PromptReader.of(settings, character_tokenizer(CHATML_TEXT), model)
    with pytest.raises(InputError, match="row 3 of the data: its prompt has"):
        prompts.read([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b" * 99}], distinct=True)


def test_held_out_rows_share_no_question_with_training():
    talks = [
        {"messages": [{"role": "user", "content": f"{i % 5}?"}, {"role": "assistant", "content": str(i)}]}
        for i in range(20)
    ]
    train, held_out, dropped = train_and_held_out(reader_of(), talks, None, 2, 0)
    assert (len(train), len(held_out), dropped) == (12, 2, 6)
    assert {key(row) for row in train.rows}.isdisjoint({key(row) for row in held_out.rows})
    assert len(train.token_rows) == 12
    again = train_and_held_out(reader_of(), talks, None, 2, 0)[0]
    assert train.fingerprint() == again.fingerprint() != held_out.fingerprint()
    other, held_out, dropped = train_and_held_out(reader_of(), talks, talks[:8], 3, 0)
    assert (len(other), len(held_out), dropped) == (8, 3, 12)
    assert reader_of(mask="all").read(talks).fingerprint() != reader_of().read(talks).fingerprint()


def test_prompts_are_those_of_sampling():
    reader = reader_of(system_prompt="Be brief.")
    (row,) = reader.read([{"prompt": "2+2?", "completion": "4"}]).token_rows
    prompt = encode_prompt("2+2?", reader.tokenizer, system_prompt="Be brief.")
    assert row.ids[: len(prompt)] == prompt
    assert row.trained == [False] * len(prompt) + [True, True, False]
