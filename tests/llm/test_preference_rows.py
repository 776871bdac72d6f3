"""Judged rows: which columns they have, what becomes of them as token ids, and what is refused by name."""

import json

import pytest
from tiny_policy import TEMPLATE, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from taurl.llm.data.completion_ids import Conversations
from taurl.llm.data.datasets import Reading
from taurl.llm.data.preference_rows import PreferenceReader, train_and_held_out_preferences
from taurl.runtime.errors import InputError

TOKENIZER = tiny_tokenizer()
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}


def reader(form="pairs", longest=64, tokenizer=TOKENIZER, columns=None, **settings):
    return PreferenceReader(form, Conversations(tokenizer, **settings), longest, Reading(columns=columns or {}))


def texts(row, tokenizer=TOKENIZER):
    return [tokenizer.decode(ids) for ids in (row.prompt, *row.completions)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": [user("1+1?")], "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {"prompt": "1+1?", "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {"prompt": [user("1+1?")], "chosen": "2", "rejected": "3"},
        {"chosen": [user("1+1?"), assistant("2")], "rejected": [user("1+1?"), assistant("3")]},
        {"prompt": "1+1?", "chosen": [user("1+1?"), assistant("2")], "rejected": [user("1+1?"), assistant("3")]},
        {"prompt": [user("1+1?")], "chosen": [user("1+1?"), assistant("2")], "rejected": [assistant("3")]},
    ],
)
def test_all_forms_of_a_pair_give_the_same_tokens(row):
    (found,) = reader().read([row]).judged
    assert texts(found) == ["<user>1+1?<end><assistant>", "2<end>", "3<end>"]
    assert found.margin == 0


def test_a_completion_that_is_the_whole_conversation_is_what_follows_its_prompt():
    talk = [{"role": "system", "content": "s"}, user("1+1?"), assistant("2")]
    rows = [
        {"prompt": "1+1?", "completion": talk[1:], "label": 1},
        {"prompt": talk[:2], "completion": talk, "label": 1},
    ]
    assert [texts(row)[-1] for row in reader("label").read(rows).judged] == ["2<end>", "2<end>"]
    for completion in (talk, [user("2+2?"), assistant("4")], [user("1+1?")]):
        with pytest.raises(
            InputError, match=r"row 1 of the data: its completion begins with a message of role '\w+', and"
        ):
            reader("label").read([{"prompt": "1+1?", "completion": completion, "label": 1}])


def test_conversations_may_part_at_a_turn_of_the_user():
    talk = [user("a"), assistant("b")]
    (row,) = (
        reader()
        .read([{"chosen": [*talk, user("c"), assistant("d")], "rejected": [*talk, user("e"), assistant("f")]}])
        .judged
    )
    assert [text.count("<user>") for text in texts(row)] == [1, 1, 1]


def test_a_completion_ends_where_the_same_answer_ends_in_supervised_training():
    """Behind the first of several tokens that end a turn; with the end of sequence where the template has none."""
    tokenizer = tiny_tokenizer()
    end = "<end>" + "{% if loop.last and not add_generation_prompt %}<system>{% endif %}"  # as Phi's end of sequence
    tokenizer.chat_template = TEMPLATE.replace("'<end>' }}", "'<end>' }}" + end.removeprefix("<end>"))
    tokenizer.eos_token = "<system>"
    answers = texts(reader(tokenizer=tokenizer).read([PAIR]).judged[0], tokenizer)[1:]
    assert answers == ["2<end>", "3<end>"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(" + '<end>'", "")
    assert texts(reader(tokenizer=tokenizer).read([PAIR]).judged[0])[1:] == ["2<end>", "3<end>"]


def test_a_blank_before_what_differs_belongs_to_the_completion():
    read = reader(prompt_format="text").read([{"chosen": "a b", "rejected": "a c"}])
    assert read.rows == [{"chosen": " b", "rejected": " c", "prompt": "a"}]
    assert texts(read.judged[0]) == ["a", " b<end>", " c<end>"]


def test_a_conversation_of_several_turns_and_a_continued_answer():
    prompt = [user("a"), assistant("b"), user("c")]
    (found,) = reader(system_prompt="s").read([{"prompt": prompt, "chosen": "d", "rejected": "e"}]).judged
    assert texts(found)[0] == "<system>s<end><user>a<end><assistant>b<end><user>c<end><assistant>"
    begun = [user("a"), assistant("is")]
    (found,) = reader().read([{"prompt": begun, "chosen": " b", "rejected": " c"}]).judged
    assert texts(found) == ["<user>a<end><assistant>is", " b<end>", " c<end>"]


def test_white_space_that_a_template_writes_after_the_end_of_a_turn_is_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("'<end>'", "'<end> '")
    (found,) = reader(tokenizer=tokenizer).read([{**PAIR, "chosen": "2 "}]).judged
    assert texts(found) == ["<user>1+1?<end> <assistant>", "2 <end>", "3<end>"]


def test_raw_text_ends_with_the_end_of_sequence_once():
    (found,) = reader(prompt_format="text").read([{**PAIR, "chosen": "2<end>"}]).judged
    assert texts(found) == ["1+1?", "2<end>", "3<end>"]


def test_margins_rankings_labels_scores():
    (pair,) = reader().read([{**PAIR, "margin": "1.5"}]).judged
    assert pair.margin == 1.5
    (ranked,) = reader("ranking").read([{"prompt": "a", "completions": ["b", [assistant("c")], "d"]}]).judged
    assert texts(ranked)[1:] == ["b<end>", "c<end>", "d<end>"]
    labelled = reader("label").read(
        [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": "False"}]
    )
    assert [row.values for row in labelled.judged] == [[1.0], [0.0]]
    for said in ("", " "):
        (silent,) = reader("label").read([{"prompt": "a", "completion": said, "label": 0}]).judged
        assert texts(silent)[1] == f"{said}<end>"
    (unknown,) = reader().read([{**PAIR, "margin": ""}]).judged  # as CSV has it
    assert unknown.margin == 0
    (scored,) = reader("score").read([{"prompt": "a", "completion": "b", "score": 7}]).judged
    assert scored.values == [7.0]
    (unpaired,) = reader("label").read([PAIR]).judged
    assert unpaired.values == [1.0, 0.0]
    assert texts(unpaired)[1:] == ["2<end>", "3<end>"]


@pytest.mark.parametrize("settings", [{}, {"prompt_format": "text"}])
def test_steps_end_at_their_separator_and_the_last_at_its_last_word(settings):
    steps = reader("process", **settings)
    (row,) = steps.read([{"prompt": "a", "completions": ["1+1", " 2", "ab"], "labels": [True, 0, 0.5]}]).judged
    assert row.step_labels == [1.0, 0.0, 0.5]
    ids = row.completions[0]
    assert row.step_ends == [3, 6, 8]  # 1+1\n· 2\nab<end>
    assert TOKENIZER.decode([ids[-1]]) == "<end>"
    assert len(ids) == 10


@pytest.mark.parametrize(("settings", "begins"), [({}, " "), ({"prompt_format": "text"}, "")])
def test_steps_end_where_they_should_with_a_tokenizer_that_puts_a_blank_before_a_text(settings, begins):
    """After raw text the completion has other tokens than alone; after a special token it gets the blank, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    (row,) = (
        reader("process", tokenizer=tokenizer, **settings)
        .read([{"prompt": "a", "completions": ["1+1", "2", "ab"], "labels": [True, 0, 1]}])
        .judged
    )
    ids = row.completions[0]
    assert tokenizer.decode(ids) == f"{begins}1+1?2?ab<end>"  # the tokenizer has no line break
    assert row.step_ends == [len(begins) + place for place in (3, 5, 7)]


def test_a_step_whose_token_merges_with_its_prompt_has_a_place():
    """Then the completion's tokens are those that it has alone."""
    vocabulary = {token: i for i, token in enumerate(["?", "a", "b", "ab", "<end>"])}
    backend = Tokenizer(BPE(vocabulary, [("a", "b")], unk_token="?"))
    backend.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    (row,) = (
        reader("process", tokenizer=tokenizer).read([{"prompt": "ba", "completions": ["b"], "labels": [True]}]).judged
    )
    assert (row.prompt, row.completions, row.step_ends) == ([2, 1], [[2, 4]], [0])


def test_what_an_assistant_has_begun_goes_on_with_its_calls():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "+ '<end>'", "+ (message['tool_calls'][0]['function']['name'] if message['tool_calls'] else '') + '<end>'"
    )
    begun = [user("a"), assistant("is")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    row = {"prompt": begun, "chosen": [call], "rejected": [assistant(" b")]}
    try:
        (found,) = reader(tokenizer=tokenizer).read([row]).judged
    except InputError as error:  # the opening of a message that goes on
        pytest.fail(str(error))
    assert texts(found, tokenizer)[1:] == ["add<end>", " b<end>"]


def test_too_long_rows_are_counted_and_limit_and_distinct_hold_for_those_that_are_kept():
    rows = [{**PAIR, "chosen": "2" * 60}, PAIR, {**PAIR, "rejected": "4"}, {**PAIR, "prompt": "2+2?"}]
    read = reader(longest=32).read(rows)
    assert (len(read), read.too_long) == (3, 1)
    assert [row["prompt"] for row in reader(longest=32).read(rows, 2).rows] == ["1+1?", "1+1?"]
    assert [row["prompt"] for row in reader().read(rows[1:], 5, distinct=True).rows] == ["1+1?", "1+1?", "2+2?"]
    assert [row["prompt"] for row in reader().read(rows[1:], 1, distinct=True).rows] == ["1+1?", "1+1?"]
    with pytest.raises(InputError, match="all 1 rows are longer than 32 tokens; raise max_length"):
        reader(longest=32).read(rows[:1])


def test_a_question_is_a_prompt_where_there_is_none():
    rows = [{"question": "1+1?", "chosen": "2", "rejected": "3"}]
    assert texts(reader().read(rows).judged[0]) == texts(reader().read([{**rows[0], "prompt": "1+1?"}]).judged[0])


def test_all_rows_of_held_out_prompts_are_held_out_and_not_trained_on():
    rows = [{**PAIR, "prompt": f"{i % 5}+1?", "rejected": str(i + 3)} for i in range(20)]
    notes = []
    train, held_out = train_and_held_out_preferences(reader(), rows, None, 2, 0, notes.append)
    assert (len(train), len(held_out)) == (12, 8)
    assert notes == []
    assert {row["prompt"] for row in train.rows}.isdisjoint(row["prompt"] for row in held_out.rows)
    for read in (train, held_out):
        for row, judged in zip(read.rows, read.judged, strict=True):
            assert texts(judged)[2] == f"{row['rejected']}<end>"
    assert train.fingerprint() != held_out.fingerprint()
    train, held_out = train_and_held_out_preferences(reader(), rows, rows[:1], 5, 0, notes.append)
    assert (len(train), len(held_out), notes[0][:2]) == (16, 1, "4 ")


def test_pairs_of_equal_answers_are_counted():
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(4)]
    notes = []
    train_and_held_out_preferences(reader(), rows, None, 0, 0, notes.append)
    assert notes == ["1 of 4 training rows compare a completion with itself"]


def test_a_file_with_renamed_columns(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "chosen": "2", "rejected": "3"}) + "\n")
    (row,) = reader(columns={"question": "prompt"}).read(str(path)).judged
    assert texts(row)[0] == "<user>1+1?<end><assistant>"


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("pairs", {"prompt": "a", "chosen": "b"}, "no column 'rejected'; the data has prompt, chosen; expected prompt"),
        (
            "pairs",
            {"prompt": "a", "completion": "b", "label": True},
            "by loss_type kto of dpo, and by loss bce of reward",
        ),
        (
            "pairs",
            {"prompt": [{"role": "usr", "content": "a"}], "chosen": "b", "rejected": "c"},
            "did you mean 'user'?",
        ),
        ("pairs", {**PAIR, "chosen": 3}, r"row 1 of the data: its chosen is 3 \(int\)"),
        ("pairs", {**PAIR, "rejected": ""}, "row 1 of the data: its rejected is an empty string"),
        ("pairs", {**PAIR, "prompt": ""}, "row 1 of the data: the prompt is an empty string"),
        ("pairs", {**PAIR, "margin": "wide"}, "row 1 of the data: its margin is 'wide'; expected a finite number"),
        ("pairs", {"chosen": "1+1?2", "rejected": "1+1?3"}, "row 1 of the data has no prompt, .* prompt_format text"),
        ("pairs", {"chosen": [user("a")], "rejected": [user("b")]}, "its chosen and rejected begin with nothing alike"),
        ("pairs", {"chosen": [user("a")], "rejected": [user("a")]}, "do not differ after what they begin with"),
        ("pairs", {"chosen": [user("a"), assistant("b")], "rejected": "ab"}, "one of chosen and rejected is text"),
        ("ranking", {"prompt": "a", "completions": ["b"]}, "its completions is .*; expected a list of 2 or more"),
        ("ranking", {"prompt": "a", "completions": ["b", ""]}, r"its completions\[1\] is an empty string"),
        ("label", {"prompt": "a", "completion": None, "label": 1}, r"row 1 of the data: its completion is None"),
        ("label", {"prompt": "a", "completion": "b"}, "no column 'label'"),
        ("score", {"prompt": "a", "completion": "b", "score": float("nan")}, "its score is nan"),
        ("process", {"prompt": "a", "completions": ["b"], "labels": [1, 0]}, "2 labels for 1 completions"),
        ("process", {"prompt": "a", "completions": ["b", " "], "labels": [1, 0]}, r"its completions\[1\] is ' '"),
    ],
)
def test_bad_rows_are_refused_by_row_and_column(form, row, message):
    with pytest.raises(InputError, match=message) as caught:
        reader(form).read([row])
    assert "\n" not in str(caught.value)


def test_a_template_that_renders_the_prompt_otherwise_in_a_whole_conversation_is_refused_with_both_renderings():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(InputError, match=r"row 1 of the data: .*…'2<user>.*…'1<user>.*chat_template_kwargs"):
        reader(tokenizer=tokenizer).read([PAIR])


def test_steps_that_a_template_rewrites_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("message['content']", "message['content'] | replace('b', '')")
    row = {"prompt": "a", "completions": ["ab", "c"], "labels": [1, 0]}
    with pytest.raises(
        InputError, match=r"row 1 of the data: the chat template renders the completion as 'a\\nc<end>'"
    ):
        reader("process", tokenizer=tokenizer).read([row])


def test_messages_after_raw_text_are_refused():
    with pytest.raises(InputError, match="its prompt is raw text and its completion messages"):
        reader(prompt_format="text").read([{**PAIR, "chosen": [assistant("2")]}])


def test_the_model_and_the_settings_bound_the_length():
    from types import SimpleNamespace

    settings = SimpleNamespace(
        system_prompt=None,
        prompt_format="auto",
        chat_template_kwargs={},
        max_length=40,
        dataset_args={},
        columns={},
        answer_after=None,
    )
    assert PreferenceReader.of(settings, TOKENIZER, tiny_model(), "pairs").longest == 40
    settings.max_length = None
    assert PreferenceReader.of(settings, TOKENIZER, tiny_model(), "pairs").longest == 128
    settings.max_length = 129
    with pytest.raises(InputError, match="max_length is 129, more than the model's context of 128"):
        PreferenceReader.of(settings, TOKENIZER, tiny_model(), "pairs")
