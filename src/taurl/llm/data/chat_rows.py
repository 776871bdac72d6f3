"""A conversation, or a text, as token ids with the mask of its targets.

Of a conversation the assistant's turns are targets: what the model itself would write, from behind the opening of its
turn to the token that ends it. Where they lie comes from the template's `{% generation %}` if it has one. Otherwise it
is rendered again and again, up to each answer and with it; these renderings must be prefixes of the whole, in token
ids, and their lengths are then the places. Either way the row is what the model sees when it answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from taurl.llm.data.chat import (
    Message,
    encode_prompt,
    encode_text,
    end_of_answer,
    is_blank,
    plain_ids,
    template_refusals,
)
from taurl.llm.data.row_forms import Chat, Text
from taurl.llm.data.token_rows import TokenRow
from taurl.runtime.errors import InputError

Mask: TypeAlias = Literal["auto", "completion", "assistant", "last", "all"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BEFORE, AFTER = 30, 60  # characters of two renderings that are shown around where they part


@dataclass
class RowEncoder:
    """Turns chats and texts into token rows.

    Attributes:
        stops: ids of the tokens that end an answer.
        template_options: for the chat template; a row's own win.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: Collection[int]
    mask: Mask = "auto"
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def text(self, row: Text) -> TokenRow:
        """Raw text, ended by the end of sequence. Trained: all of it, or the completion of a prompt."""
        if row.prompt is None:
            if self.mask not in ("auto", "all"):
                raise InputError(f"mask {self.mask} needs a prompt with a completion, or messages; this row is text")
            ids, first = encode_text(row.text, self.tokenizer), 1
        else:
            prompt = encode_prompt(row.prompt, self.tokenizer, prompt_format="text")
            ids = encode_text(row.prompt + row.text, self.tokenizer)
            if ids[: len(prompt)] != prompt:  # a token spans the border, which no sampler would have drawn
                ids = prompt + self._ids(row.text)
            first = 1 if self.mask == "all" else len(prompt)
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, int(end)]
        return TokenRow(ids, [place >= first for place in range(len(ids))])

    def chat(self, row: Chat, turns: Sequence[int] | None = None) -> TokenRow:
        """A conversation through the chat template.

        An answer at the end that the template leaves open is closed by the end of sequence.

        Args:
            turns: which messages are trained; by default those that `turns` finds. With mask `all`, every token is.
        """
        if self.mask == "all":
            ids = self._ids(self._render(row.messages, row))
            trained = [True] * len(ids)
        elif self._has_marks(row):
            ids, trained = self._marked_by_template(row, turns or self.turns(row))
        else:
            ids, trained = self._marked_by_prefixes(row, turns or self.turns(row))
        end = self.tokenizer.eos_token_id
        if row.messages[-1]["role"] == "assistant" and end is not None and not self._stop(ids, 0, len(ids)):
            ids, trained = [*ids, int(end)], [*trained, True]
        return TokenRow(ids, [False, *trained[1:]])

    def turns(self, row: Chat) -> list[int]:
        """Which messages are trained: the assistant's in the completion, in the whole conversation, or the last one."""
        mask = self.mask
        if mask == "completion" and row.first is None:
            raise InputError("mask completion needs a prompt with a completion; for messages give assistant or last")
        if mask == "auto":
            mask = "assistant" if row.first is None else "completion"
        first = row.first if mask == "completion" and row.first is not None else 0
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant" and i >= first]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in row.messages))
            raise InputError(f"nothing to train on: no message has the role assistant (they have {roles})")
        answers = [turn for turn in turns if turn > 0]  # a greeting at the beginning answers nothing
        if not answers:
            raise InputError("the first message is the assistant's; expected one to answer before it")
        return answers[-1:] if mask == "last" else answers

    def _has_marks(self, row: Chat) -> bool:
        template = self.tokenizer.get_chat_template(tools=row.options.get("tools"))
        return self.tokenizer.is_fast and GENERATION.search(template) is not None

    def _marked_by_template(self, row: Chat, turns: Sequence[int]) -> tuple[list[int], list[bool]]:
        with template_refusals():
            encoded: Any = self.tokenizer.apply_chat_template(
                row.messages, return_dict=True, return_assistant_tokens_mask=True, **self._options(row)
            )
        ids, trained = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        for end in range(1, len(ids)):  # templates differ in whether the end of a turn stands inside the mark
            if trained[end - 1] and not trained[end] and not self._stop(ids, 0, end):
                place = next((p for p in range(end, len(ids)) if not self._is_blank(ids[p])), end)
                if ids[place] in self.stops:
                    trained[end : place + 1] = [True] * (place + 1 - end)
        if any(message["role"] == "assistant" for message in (row.begun or row.messages[: turns[0]])):
            _, (opening,) = self._places(self._render(row.messages, row), [(turns[0], self._opening(row, turns[0]))])
            trained = [mark and place >= len(opening) for place, mark in enumerate(trained)]
        if not any(trained):
            raise InputError("the chat template marks no token of its answers with {% generation %}")
        return ids, trained

    def _marked_by_prefixes(self, row: Chat, turns: Sequence[int]) -> tuple[list[int], list[bool]]:
        whole = self._render(row.messages, row)
        pieces = []
        for turn in turns:
            at_end = turn == len(row.messages) - 1
            answered = whole if at_end else self._render(row.messages[: turn + 1], row)
            if not whole.startswith(answered) and (end := self.tokenizer.eos_token):
                answered = answered.removesuffix(str(end))  # which some templates write behind the last turn only
            pieces += [(turn, self._opening(row, turn)), (turn, answered)]
        ids, prefixes = self._places(whole, pieces)
        trained = [False] * len(ids)
        for opening, answer in zip(prefixes[::2], prefixes[1::2], strict=True):
            start = len(opening)
            end = self._stop(ids, start, len(answer)) or len(answer)
            trained[start:end] = [True] * (end - start)
        return ids, trained

    def _opening(self, row: Chat, turn: int) -> str:
        """The text that the model sees before it writes this message."""
        if row.begun is not None and turn == row.first:
            return self._render(row.begun, row, continue_final_message=True)
        return self._render(row.messages[:turn], row, add_generation_prompt=True)

    def _places(self, whole: str, pieces: Sequence[tuple[int, str]]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the whole, and of pieces of growing length which it must begin with.

        Where a token of the whole would span the end of a piece (an answer that begins with line breaks), the whole is
        cut there, as it is when the model answers.

        Args:
            pieces: each with the message that it is about.
        """
        for turn, piece in pieces:
            if not whole.startswith(piece):
                raise InputError(_parted(turn, piece, whole))
        texts = [piece for _, piece in pieces]
        ids = self._ids(whole)
        prefixes = [ids if text == whole else self._ids(text) for text in texts]
        if all(ids[: len(prefix)] == prefix for prefix in prefixes):
            return ids, prefixes
        cut: list[list[int]] = [[]]
        for before, text in zip(["", *texts], [*texts, whole], strict=True):
            cut.append(cut[-1] + self._ids(text[len(before) :]))
        return cut[-1], cut[1:-1]

    def _stop(self, ids: Sequence[int], start: int, end: int) -> int | None:
        return end_of_answer(ids[:end], self.stops, self.tokenizer, start)

    def _is_blank(self, token: int) -> bool:
        return token not in self.stops and is_blank(token, self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        return plain_ids(text, self.tokenizer) if text else []

    def _render(self, messages: Sequence[Message], row: Chat, **how: bool) -> str:
        options = {**self._options(row), **how, "tokenize": False}
        with template_refusals():
            return cast(str, self.tokenizer.apply_chat_template(cast(Any, messages), **options))

    def _options(self, row: Chat) -> dict[str, Any]:
        return {**self.template_options, **row.options}


def _parted(turn: int, piece: str, whole: str) -> str:
    """That a rendering is no prefix of another: both, from a little before where they part."""
    place = next((i for i, (a, b) in enumerate(zip(piece, whole, strict=False)) if a != b), min(len(piece), len(whole)))
    start = max(0, place - BEFORE)
    one, other = (repr(text[start : place + AFTER]) for text in (piece, whole))
    return (
        f"the chat template renders the conversation up to message {turn + 1} as …{one}, but within the whole as "
        f"…{other}, so its tokens cannot be told apart; give mask last, separate_turns, or a template with "
        "{% generation %}"
    )
