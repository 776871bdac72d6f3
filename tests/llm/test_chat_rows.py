"""The masks of conversations and texts, by hand, for templates that behave as the families do."""

import json
from itertools import groupby

import pytest
from chat_families import (
    CHATML_MARKED,
    CHATML_MARKED_SHORT,
    FAMILIES,
    GEMMA3,
    LLAMA3,
    MISTRAL_LAST,
    QWEN3,
    character_tokenizer,
)

from taurl.llm.data.chat import encode_prompt, stop_token_ids
from taurl.llm.data.chat_rows import RowEncoder
from taurl.llm.data.chat_templates import CHATML_TEXT
from taurl.llm.data.completion_ids import Conversations
from taurl.llm.data.preference_rows import PreferenceReader
from taurl.llm.data.row_forms import Chat, Text
from taurl.llm.data.row_reader import RowReader
from taurl.llm.models.loading import load_tokenizer
from taurl.llm.settings import RowSettings
from taurl.runtime.errors import InputError


def says(role, content):
    return {"role": role, "content": content}


SYSTEM = says("system", "Be brief.")
TALK = [says("user", "2+2?"), says("assistant", "four"), says("user", "3+3?"), says("assistant", "six")]


def encoder(tokenizer, mask="auto", **options):
    return RowEncoder(tokenizer, stop_token_ids(None, tokenizer), mask, options)


def trained(row, tokenizer):
    """The text of each run of targets."""
    runs = groupby(zip(row.ids, row.trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in pairs]) for target, pairs in runs if target]


def require_as_seen_when_answering(row, prompt, tokenizer, **options):
    """The row begins with what a sampler is given for the prompt, and the last run of targets begins behind it."""
    ids = encode_prompt(prompt, tokenizer, chat_template_kwargs=options)
    assert row.ids[: len(ids)] == ids
    assert row.trained[len(ids)]
    assert not row.trained[len(ids) - 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [False, True])
def test_the_answers_and_what_ends_them_are_trained(family, system):
    template, end, takes_system = FAMILIES[family]
    if system and not takes_system:
        pytest.skip("has no system role")
    tokenizer = character_tokenizer(template)
    messages = [SYSTEM] * system + TALK
    space = " " if family == "mistral" else ""
    answers = [f"{space}four{end}", f"{space}six{end}"]
    for mask, expected in {"auto": answers, "assistant": answers, "last": answers[1:]}.items():
        row = encoder(tokenizer, mask).chat(Chat(messages))
        assert trained(row, tokenizer) == expected
        assert row.ids == tokenizer.apply_chat_template(messages, return_dict=False)
        require_as_seen_when_answering(row, messages[:-1], tokenizer)
    row = encoder(tokenizer).chat(Chat(messages, first=len(messages) - 1))  # prompt and completion
    assert trained(row, tokenizer) == answers[1:]
    row = encoder(tokenizer, "assistant").chat(Chat(messages, first=len(messages) - 1))
    assert trained(row, tokenizer) == answers
    row = encoder(tokenizer, "all").chat(Chat(messages))
    assert row.trained == [False] + [True] * (len(row.ids) - 1)


def test_white_space_between_the_mark_and_the_end_of_the_turn():
    tokenizer = character_tokenizer(CHATML_MARKED_SHORT.replace("'<|im_end|>", "'\n <|im_end|>", 1))
    row = encoder(tokenizer).chat(Chat(TALK))
    assert trained(row, tokenizer) == ["four\n <|im_end|>", "six\n <|im_end|>"]


def test_a_completion_of_several_turns_trains_only_the_assistants():
    tokenizer = character_tokenizer(CHATML_TEXT)
    row = encoder(tokenizer).chat(Chat([*TALK, *TALK], first=3))
    assert trained(row, tokenizer) == ["six<|im_end|>", "four<|im_end|>", "six<|im_end|>"]


def test_the_date_in_llama_3s_header_may_be_given():
    tokenizer = character_tokenizer(LLAMA3)
    row = encoder(tokenizer, date_string="26 Jul 2024").chat(Chat(TALK))
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(row.ids)
    require_as_seen_when_answering(row, TALK[:-1], tokenizer, date_string="26 Jul 2024")
    own = Chat(TALK, options={"date_string": "1 Jan 2025"})
    assert "Today Date: 1 Jan 2025" in tokenizer.decode(encoder(tokenizer, date_string="no").chat(own).ids)


THINKING = [
    says("user", "2+2?"),
    says("assistant", "<think>\ntwo twos\n</think>\n\nfour"),
    says("user", "3+3?"),
    says("assistant", "<think>\ntwo threes\n</think>\n\nsix"),
]


def test_thinking_that_is_dropped_from_earlier_turns_is_refused_and_each_way_out_works():
    tokenizer = character_tokenizer(QWEN3)
    with pytest.raises(InputError) as caught:
        encoder(tokenizer).chat(Chat(THINKING))
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "message 2",
        r"assistant\n<think>\ntwo twos",
        r"assistant\nfour<|im_end|>",
        "mask last",
        "separate_turns",
    ):
        assert part in text
    row = encoder(tokenizer, "last").chat(Chat(THINKING))
    assert trained(row, tokenizer) == ["<think>\ntwo threes\n</think>\n\nsix<|im_end|>"]
    require_as_seen_when_answering(row, THINKING[:-1], tokenizer)
    for turn in (1, 3):  # what separate_turns makes of it
        row = encoder(tokenizer).chat(Chat(THINKING[: turn + 1]), [turn])
        assert trained(row, tokenizer) == [THINKING[turn]["content"] + "<|im_end|>"]
        require_as_seen_when_answering(row, THINKING[:turn], tokenizer)


def test_an_opening_with_an_empty_thought_is_context():
    tokenizer = character_tokenizer(QWEN3)
    row = encoder(tokenizer, enable_thinking=False).chat(Chat(TALK[:2]))
    assert trained(row, tokenizer) == ["four<|im_end|>"]
    require_as_seen_when_answering(row, TALK[:1], tokenizer, enable_thinking=False)


def test_a_system_message_that_moves_is_refused():
    tokenizer = character_tokenizer(MISTRAL_LAST)
    messages = [SYSTEM, *TALK]
    with pytest.raises(InputError, match=r"up to message 3 as …'<bos>.*Be brief.*within the whole as …'<bos>"):
        encoder(tokenizer).chat(Chat(messages))
    assert trained(encoder(tokenizer, "last").chat(Chat(messages)), tokenizer) == [" six</s>"]


def test_a_role_that_the_template_refuses():
    with pytest.raises(InputError, match="the chat template refuses the messages: System role not supported"):
        encoder(character_tokenizer(GEMMA3)).chat(Chat([SYSTEM, *TALK]))


def test_tools_reach_the_template_and_their_results_are_context():
    tokenizer = character_tokenizer(QWEN3)
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    messages = [says("user", "2+2?"), call, says("tool", "4"), says("assistant", "four")]
    row = encoder(tokenizer, "last").chat(Chat(messages, options={"tools": tools}))
    assert tokenizer.decode(row.ids).startswith(
        '<|im_start|>system\n[{"type": "function", "function": {"name": "add"}}]'
    )
    require_as_seen_when_answering(row, messages[:-1], tokenizer, tools=tools)
    row = encoder(tokenizer).chat(Chat(messages, options={"tools": tools}))
    called = '{"name": "add", "arguments": {"a": 2}}<|im_end|>'
    thought = "<think>\n\n</think>\n\n"
    assert trained(row, tokenizer) == [thought + called, thought + "four<|im_end|>"]


def test_arguments_of_calls_that_are_json_become_objects():
    """As servers give and many data sets have them: a template would write the string with its quotes escaped.

    Where a template joins strings, objects become JSON.
    """
    tokenizer = character_tokenizer(QWEN3)

    def forms(arguments, tokenizer=tokenizer):
        calls = [{"function": {"name": "add", "arguments": arguments}}]
        talk = [says("user", "2+2?"), {**says("assistant", ""), "tool_calls": calls}, says("tool", "4")]
        (row,) = RowReader.of(RowSettings(), tokenizer, None).read([{"messages": talk[:2]}]).token_rows
        pair = {"prompt": talk[:1], "chosen": talk[1:2], "rejected": "five"}
        (judged,) = PreferenceReader("pairs", Conversations(tokenizer), 999).read([pair]).judged
        return row.ids, encode_prompt(talk, tokenizer), judged.completions

    assert forms('{"a": 2}') == forms({"a": 2})
    assert '"arguments": {"a": 2}' in tokenizer.decode(forms('{"a": 2}')[0])
    joining = QWEN3.replace("call.function | tojson", "call.function.name + '(' + call.function['arguments'] + ')'")
    assert joining != QWEN3
    joins = character_tokenizer(joining)
    assert forms('{"a": 2}', joins) == forms({"a": 2}, joins)
    assert 'add({"a": 2})' in joins.decode(forms({"a": 2}, joins)[0])
    for free in ("no JSON", "2", ""):  # stays as it is
        assert f'"arguments": {json.dumps(free)}' in tokenizer.decode(forms(free)[0])


def test_tools_that_the_template_does_not_read_are_refused():
    tokenizer = character_tokenizer(CHATML_TEXT)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    talk = [says("user", "2+2?"), says("assistant", "four")]
    rows = [
        ({"messages": talk, "tools": [{"type": "function", "function": {"name": "add"}}]}, "the row has tools, which"),
        ({"messages": [talk[0], call, says("tool", "4"), talk[1]]}, "the row has tool_calls, which"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": "{}"}]}, "tool_calls"),
        ({"messages": [talk[0], {**talk[1], "thinking": "2 and 2"}]}, "the row has thinking, which"),
    ]
    for row, message in rows:
        with pytest.raises(InputError, match=f"row 1 of the data: .*{message}"):
            RowReader.of(RowSettings(), tokenizer, None).read([row])
    pair = {"prompt": "2+2?", "chosen": "four", "rejected": "five", "tools": json.dumps([{"name": "add"}])}
    with pytest.raises(InputError, match="row 1 of the data: the row has tools, which"):
        PreferenceReader("pairs", Conversations(tokenizer), 999).read([pair])


def test_thinking_of_any_name_goes_to_a_template_that_reads_one():
    tokenizer = character_tokenizer(
        CHATML_TEXT.replace("message['content'] +", "(message.thinking or '') + message.content +")
    )
    row = {"messages": [says("user", "2+2?"), {**says("assistant", "four"), "reasoning_content": "so: "}]}
    (found,) = RowReader.of(RowSettings(), tokenizer, None).read([row]).token_rows
    assert trained(found, tokenizer) == ["so: four<|im_end|>"]


@pytest.mark.parametrize("tools", ["[]", "null", [], None, ""])
def test_no_tools_are_no_tools_in_whatever_form(tools):
    tokenizer = character_tokenizer(
        "{% if tools is defined and tools is not none %}{{ 'tools' }}{% endif %}" + CHATML_TEXT
    )
    talk = [says("user", "2+2?"), says("assistant", "four")]
    rows = [{"messages": talk, "tools": tools, "chat_template_kwargs": "null"}, {"messages": talk}]
    one, other = RowReader.of(RowSettings(), tokenizer, None).read(rows).token_rows
    assert one == other


def test_tools_of_a_pair_and_what_a_row_gives_its_template_reach_the_model():
    tokenizer = character_tokenizer(QWEN3)
    row = {"prompt": "2+2?", "chosen": "four", "rejected": "five", "chat_template_kwargs": {"enable_thinking": False}}
    row |= {"tools": [{"type": "function", "function": {"name": "add"}}]}
    (found,) = PreferenceReader("pairs", Conversations(tokenizer), 999).read([row]).judged
    options = {"tools": row["tools"], "enable_thinking": False}
    asked = tokenizer.apply_chat_template(
        [says("user", "2+2?")], add_generation_prompt=True, return_dict=False, **options
    )
    assert found.prompt == asked
    assert '"name": "add"' in tokenizer.decode(asked)
    assert tokenizer.decode(found.completions[0]) == "four<|im_end|>"


def test_an_answer_that_was_begun_is_trained_where_it_goes_on():
    for template in (CHATML_TEXT, CHATML_MARKED):
        tokenizer = character_tokenizer(template)
        begun = [TALK[0], says("assistant", "The sum is ")]
        chat = Chat([TALK[0], says("assistant", "The sum is four")], first=1, begun=begun)
        row = encoder(tokenizer).chat(chat)
        assert trained(row, tokenizer) == ["four<|im_end|>"]
        require_as_seen_when_answering(row, begun, tokenizer)


def test_an_answer_that_begins_with_a_line_break_is_cut_where_the_model_is_asked():
    tokenizer = character_tokenizer(CHATML_TEXT)
    messages = [*TALK[:3], says("assistant", "\nsix")]
    assert len(tokenizer("\n\nsix")["input_ids"]) == 4  # the template's line break and the answer's are one token
    row = encoder(tokenizer).chat(Chat(messages))
    assert trained(row, tokenizer) == ["four<|im_end|>", "\nsix<|im_end|>"]
    require_as_seen_when_answering(row, messages[:-1], tokenizer)
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_an_answer_that_the_template_leaves_open_is_closed():
    tokenizer = character_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = encoder(tokenizer).chat(Chat(TALK))
    assert trained(row, tokenizer) == ["four\n", "six\n</s>"]
    asked = encoder(tokenizer).chat(Chat([*TALK, says("user", "5?")]))
    assert trained(asked, tokenizer) == ["four\n", "six\n"]


def test_a_greeting_of_the_assistant_is_context():
    tokenizer = character_tokenizer(CHATML_TEXT)
    row = encoder(tokenizer).chat(Chat([says("assistant", "Hello."), *TALK]))
    assert trained(row, tokenizer) == ["four<|im_end|>", "six<|im_end|>"]


@pytest.mark.parametrize("mask", ["auto", "last"])
def test_an_end_of_sequence_behind_the_last_turn_is_not_trained(mask):
    """As Phi's templates have it: a render up to an earlier answer then ends in what the whole has not."""
    closed = CHATML_TEXT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = character_tokenizer(closed)
    row = encoder(tokenizer, mask).chat(Chat(TALK))
    assert trained(row, tokenizer) == ["four<|im_end|>", "six<|im_end|>"][-1 if mask == "last" else 0 :]
    assert tokenizer.decode(row.ids).endswith("six<|im_end|>\n</s>")


def test_what_has_no_target_is_named():
    tokenizer = character_tokenizer(CHATML_TEXT)
    for chat, mask, problem in [
        (Chat(TALK[:1]), "auto", "no message has the role assistant"),
        (Chat(TALK[1:3]), "auto", "the first message is the assistant's"),
        (Chat(TALK), "completion", "mask completion needs a prompt with a completion"),
    ]:
        with pytest.raises(InputError, match=problem):
            encoder(tokenizer, mask).chat(chat)
    with pytest.raises(InputError, match="mask last needs a prompt with a completion, or messages; this row is text"):
        encoder(tokenizer, "last").text(Text("2+2"))
    silent = character_tokenizer("{% if false %}{% generation %}x{% endgeneration %}{% endif %}" + CHATML_TEXT)
    with pytest.raises(InputError, match="marks no token"):
        encoder(silent).chat(Chat(TALK))


def test_raw_text_is_ended_and_its_completion_begins_behind_the_prompt():
    tokenizer = character_tokenizer()
    row = encoder(tokenizer).text(Text("2+2=4"))
    assert tokenizer.decode(row.ids) == "2+2=4</s>"
    assert row.trained == [False] + [True] * 5
    for mask in ("auto", "completion", "assistant", "last"):
        assert trained(encoder(tokenizer, mask).text(Text("4", "2+2=")), tokenizer) == ["4</s>"]
    assert trained(encoder(tokenizer, "all").text(Text("4", "2+2=")), tokenizer) == ["+2=4</s>"]
    row = encoder(tokenizer).text(Text("\nfour</s>", "2+2\n"))  # the border is inside a token of the whole
    assert trained(row, tokenizer) == ["\nfour</s>"]
    assert row.ids[:4] == encode_prompt("2+2\n", tokenizer)


@pytest.mark.model
def test_the_embedded_models_template():
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    for messages in (TALK, [SYSTEM, *TALK]):
        row = encoder(tokenizer).chat(Chat(messages))
        assert trained(row, tokenizer) == ["four<|im_end|>", "six<|im_end|>"]
        require_as_seen_when_answering(row, messages[:-1], tokenizer)
    strange = [TALK[0], says("assistant", "\n\n\n\tüñ 日本 four ")]
    row = encoder(tokenizer).chat(Chat(strange))
    assert trained(row, tokenizer) == ["\n\n\n\tüñ 日本 four <|im_end|>"]
    require_as_seen_when_answering(row, strange[:1], tokenizer)
