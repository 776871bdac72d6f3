"""What a row of supervised data says, in whatever form it came: a chat, raw text, or token ids. Imports no torch.

Forms, by the columns that hold a value (the first that fits): `input_ids` with or without `labels`; `messages`;
`conversations` (as ShareGPT writes them, or messages); `prompt` with `completion`; `text`. Beside a chat, `tools` and
`chat_template_kwargs` reach the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from taurl.llm.data.chat import prompt_problem, prompt_text, shown
from taurl.llm.data.data_files import Row
from taurl.llm.data.token_rows import TokenRow
from taurl.runtime.errors import InputError, one_line

UNTRAINED = -100  # in `labels`: not a target, as PyTorch's cross entropy and transformers have it
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
NO_TEXTS = ("input_ids", "labels", "attention_mask", "messages", "conversations", "tools", "chat_template_kwargs")
MASKS = ("completion_mask", "assistant_masks")  # of token ids, by TRL's names: what is trained on
EXPECTED = "input_ids, messages, conversations, prompt with completion, or text"

Messages: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: all of it.
        first: index of the message that a completion begins with; None for a conversation without a prompt apart.
        begun: the prompt, where its last message is the beginning of the answer that the completion goes on with.
        options: for the chat template, `tools` among them.
    """

    messages: Messages
    first: int | None = None
    begun: Messages | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Raw text: a completion of a prompt, or (without a prompt) all of it."""

    text: str
    prompt: str | None = None


def read_form(row: Row, *, strings_are_messages: bool) -> Chat | Text | TokenRow:
    """The content of a row, checked.

    Args:
        strings_are_messages: a string as prompt is a message of the user, and as completion one of the assistant.
    Raises: InputError, naming column and value, without the row.
    """
    if _has(row, "input_ids"):
        return _ids(row)
    for column in ("messages", "conversations"):
        if _has(row, column):
            return Chat(_messages(row, column), options=template_options(row))
    if _has(row, "prompt") and _has(row, "completion"):
        return _completion(row, strings_are_messages)
    if _has(row, "text"):
        if problem := prompt_problem(row["text"], "it"):
            raise InputError(f"column 'text': {problem}")
        if not isinstance(row["text"], str):
            raise InputError(f"column 'text': it is {shown(row['text'])}; expected a string")
        return Text(row["text"])
    raise InputError(f"its columns are {', '.join(n for n in row if _has(row, n)) or 'empty'}; {_expected(row)}")


def _expected(row: Row) -> str:
    if _has(row, "chosen"):
        return "to train on what was chosen, rename it with columns: chosen=completion (with a prompt apart)"
    return f"expected {EXPECTED}; rename with columns, for example question=prompt answer=completion"


def _has(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is not None and not (isinstance(value, str) and value == "" and column in NO_TEXTS)


def question(row: Row) -> str:
    """What makes two rows the same question: the prompt, or what stands before the first answer of a conversation.

    So a conversation and its continuations are the same question. Of token ids it is those before the first target; of
    a text, and of a row that is not well formed, all of it.
    """
    column = next((name for name in ("prompt", "messages", "conversations") if _has(row, name)), None)
    if column is None and _has(row, "input_ids"):
        try:
            found = _ids(row)
        except InputError:
            return str(row)
        ids, trained = found.ids, found.trained
        first = trained.index(True) if found.targets else 0
        return str(ids[:first] if first > 1 else ids)
    if column is None:
        return str(row["text"] if _has(row, "text") else row)
    try:
        asked = row["prompt"] if column == "prompt" else _messages(row, column)
    except InputError:
        return str(row)
    if prompt_problem(asked):
        return str(row)
    return prompt_text(asked if column == "prompt" else asked[: next(filter(None, _answers(asked)), None)])


def last_exchange(row: Row) -> tuple[Any, Any]:
    """What stands before the last answer, which a model is asked that is to give it, and that answer, None if none."""
    column = next((name for name in ("messages", "conversations") if _has(row, name)), None)
    if column is None:
        return row["prompt"] if _has(row, "prompt") else question(row), row.get("completion")
    messages = _messages(row, column)
    place = next(filter(None, reversed(_answers(messages))), None)
    return prompt_text(messages[:place]), None if place is None else messages[place].get("content")


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _messages(row: Row, column: str) -> Messages:
    """Messages of a column, also where they stand there as JSON (a CSV file has no other way) or as ShareGPT's."""
    value = _parsed(row, column)
    if column == "conversations" and isinstance(value, Sequence):
        value = [_from_sharegpt(message, number) for number, message in enumerate(value, start=1)]
        if isinstance(row.get("system"), str) and row["system"] and not (value and _role(value[0]) == "system"):
            value = [{"role": "system", "content": row["system"]}, *value]
    if problem := prompt_problem(value, "it"):
        raise InputError(f"column '{column}': {problem}")
    return [said(message) for message in value]


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _from_sharegpt(message: object, number: int) -> object:
    if not isinstance(message, Mapping) or message.get("from") is None:
        return message
    role = SHAREGPT_ROLES.get(message["from"])
    if role is None:
        raise InputError(
            f"column 'conversations': message {number} is from {message['from']!r}; "
            f"expected one of {', '.join(SHAREGPT_ROLES)}"
        )
    if message["from"] != "function_call":
        return {"role": role, "content": message.get("value")}
    called = message.get("value")
    try:
        called = json.loads(called or "") if isinstance(called, str | None) else called
    except ValueError as error:
        raise InputError(
            f"column 'conversations': message {number} is a function_call, but no JSON: {error}"
        ) from error
    calls = called if isinstance(called, list) else [called]
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _completion(row: Row, strings_are_messages: bool) -> Chat | Text:
    prompt, completion = row["prompt"], row["completion"]
    if problem := prompt_problem(prompt, "it"):
        raise InputError(f"column 'prompt': {problem}")
    if isinstance(completion, str):
        if isinstance(prompt, str) and not strings_are_messages:
            return Text(completion, prompt)
        answer: Messages = [{"role": "assistant", "content": completion}]
    else:
        answer = _messages(row, "completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = [said(message) for message in prompt]
    if answer[0]["role"] != "assistant":
        raise InputError(f"column 'completion': its first message is of role {answer[0]['role']!r}; expected assistant")
    if prompt[-1]["role"] != "assistant":
        return Chat(prompt + answer, len(prompt), options=template_options(row))
    if not isinstance(prompt[-1].get("content"), str):
        raise InputError("column 'prompt': its last message is the assistant's and has no content to go on with")
    whole = {**prompt[-1], **answer[0], "content": prompt[-1]["content"] + answer[0].get("content", "")}
    return Chat([*prompt[:-1], whole, *answer[1:]], len(prompt) - 1, prompt, template_options(row))


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template beside the messages: `chat_template_kwargs`, and `tools` among them.

    Raises: InputError for values of another type.
    """
    options = (_parsed(row, "chat_template_kwargs") if _has(row, "chat_template_kwargs") else None) or {}
    if not isinstance(options, Mapping):
        raise InputError(f"column 'chat_template_kwargs': it is {shown(options)}; expected a dict")
    if tools := _parsed(row, "tools") if _has(row, "tools") else None:  # "[]" and "null" are no tools either
        if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError(f"column 'tools': it is {shown(tools)}; expected a list of JSON schemas")
        options = {**options, "tools": list(tools)}
    return {name: value for name, value in options.items() if value is not None}


def _parsed(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column that holds no string, read as JSON where it is one."""
    value = row[column]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"column '{column}': it is {shown(value)}; expected a list, or JSON of one") from error


def said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that are None, such as the calls of one that calls nothing."""
    return {key: value for key, value in message.items() if value is not None}


def _ids(row: Row) -> TokenRow:
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if _has(row, "labels") else ids
    for mask in (name for name in MASKS if _has(row, name) and not _has(row, "labels")):
        marks = _integers(row, mask)
        if len(marks) != len(ids):
            raise InputError(f"column '{mask}': it has {len(marks)} values for {len(ids)} input_ids")
        labels = [token if mark else UNTRAINED for token, mark in zip(ids, marks, strict=True)]
    kept = _integers(row, "attention_mask") if _has(row, "attention_mask") else [1] * len(ids)
    if len(labels) != len(ids) or len(kept) != len(ids):
        other = ("labels", labels) if len(labels) != len(ids) else ("attention_mask", kept)
        raise InputError(f"column '{other[0]}': it has {len(other[1])} values for {len(ids)} input_ids")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, UNTRAINED):
            raise InputError(
                f"column 'labels': value {place} is {label}; expected {UNTRAINED} or the token itself, {token} "
                "(labels are not shifted)"
            )
    places = [place for place in range(len(ids)) if kept[place]]  # without padding
    trained = [labels[place] != UNTRAINED for place in places]
    return TokenRow([ids[place] for place in places], [False, *trained[1:]])


def _integers(row: Row, column: str) -> list[int]:
    value = _parsed(row, column)
    try:
        numbers = [int(item) for item in value]
        exact = numbers == list(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"column '{column}': it is {shown(value)}: {one_line(error)}") from error
    if not exact or not numbers or max(map(abs, numbers)) >= 2**31:  # which no vocabulary reaches
        raise InputError(f"column '{column}': it is {shown(value)}; expected a list of token ids")
    return numbers
