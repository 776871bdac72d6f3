"""A completion that somebody else wrote as the token ids that continue its prompt's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

from taurl.llm.data.chat import (
    Message,
    Prompt,
    PromptFormat,
    as_messages,
    encode_prompt,
    end_of_answer,
    for_template,
    plain_ids,
    require_all_read,
    require_known,
    special_ids,
    template_refusals,
    turn_ends,
)
from taurl.llm.data.row_forms import template_options
from taurl.llm.models.heads import known_tokens
from taurl.runtime.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 80  # characters of two renderings that differ


class Rewritten(InputError):
    """A chat template does not leave a completion as it is written."""


@dataclass(frozen=True)
class Conversations:
    """How prompts and completions, strings or messages, become token ids.

    Prompts are those of `encode_prompt`. A completion of a chat is the rest of the rendered conversation through the
    end of the assistant's turn; one of raw text is its tokens and the end of sequence.

    Attributes:
        known: how many tokens the model knows; text with others is refused, unless this is None.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    prompt_format: PromptFormat = "auto"
    chat_template_kwargs: Mapping[str, Any] | None = None
    known: int | None = None

    @classmethod
    def of(cls, settings: Any, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> Self:
        """With the settings of a config that has PromptSettings, for a model where it is known which."""
        known = None if model is None else known_tokens(model)
        return cls(tokenizer, settings.system_prompt, settings.prompt_format, settings.chat_template_kwargs, known)

    def of_row(self, row: Mapping[str, Any]) -> Self:
        """The same, with what the row itself gives the chat template: `tools`, `chat_template_kwargs`."""
        options = template_options(row)
        return replace(self, chat_template_kwargs={**(self.chat_template_kwargs or {}), **options}) if options else self

    @property
    def makes_turns(self) -> bool:
        """Whether a string prompt is a user's message, and what follows it the assistant's."""
        return self._messages("") is not None

    def prompt(self, prompt: Prompt, where: str) -> list[int]:
        """The prompt's token ids. Raises: InputError as `encode_prompt` does, about `where`."""
        ids = encode_prompt(
            prompt,
            self.tokenizer,
            system_prompt=self.system_prompt,
            prompt_format=self.prompt_format,
            chat_template_kwargs=self.chat_template_kwargs,
            where=where,
        )
        require_known(ids, self.known, f"{where}: ")
        return ids

    def completion(self, prompt: Prompt, completion: Prompt, prompt_ids: list[int], where: str) -> list[int]:
        """The completion's token ids; a string is the assistant's message where the prompt is a chat.

        Raises: InputError where the chat template refuses the conversation, or renders its beginning otherwise than
            the prompt alone.
        """
        ids = self._completion(prompt, completion, prompt_ids, where)
        require_known(ids, self.known, f"{where}: ")
        return ids

    def _completion(self, prompt: Prompt, completion: Prompt, prompt_ids: list[int], where: str) -> list[int]:
        messages = self._messages(prompt)
        if messages is None:
            return self._text_ids(cast(str, prompt), self._plain(completion, where), prompt_ids)
        text = self._render([*messages, *_said(completion)], where)
        ids = plain_ids(text, self.tokenizer)
        begins = ids[: len(prompt_ids)] == prompt_ids
        ids = ids[len(prompt_ids) :] if begins else plain_ids(self._rest(text, prompt, where), self.tokenizer)
        return self._through_end_of_turn(ids)

    def steps(
        self, prompt: Prompt, steps: Sequence[str], separator: str, prompt_ids: list[int], where: str
    ) -> tuple[list[int], list[int]]:
        """A completion of several steps with the separator between them, and where each step ends.

        Returns: token ids, and for each step that is not blank the place of the token that holds the last character of
            the separator after it (of the last one: its own last character).
        Raises: InputError as `completion`, where the template changes the text, or where the tokenizer does not tell
            which characters its tokens hold.
        """
        if not self.tokenizer.is_fast:
            raise InputError(f"{type(self.tokenizer).__name__} does not tell where its tokens stand in the text")
        content = separator.join(steps)
        ids = self.completion(prompt, content, prompt_ids, where)
        opening, text = self._parted(prompt, content, where)
        offsets = self._offsets(opening, text, ids)
        if (found := text.find(content.strip())) < 0:
            raise Rewritten(
                f"{where}: the chat template renders the completion as {shorten(repr(text), SHOWN)}, not as it is "
                "written, so that the ends of its steps are not known; leave out what the template changes"
            )
        start = found - (len(content) - len(content.lstrip()))
        ends, end = [], start
        for place, step in enumerate(steps):
            end += len(step) + (len(separator) if place < len(steps) - 1 else 0)
            if step.strip():
                ends.append(end)
        return ids, [max(token for token, (first, _) in enumerate(offsets) if first < end) for end in ends]

    def _parted(self, prompt: Prompt, content: str, where: str) -> tuple[str, str]:
        """The rendered prompt, and what follows it."""
        messages = self._messages(prompt)
        if messages is None:
            return cast(str, prompt), content
        whole = self._render([*messages, *_said(content)], where)
        rest = self._rest(whole, prompt, where)
        return whole[: len(whole) - len(rest)], rest

    def _offsets(self, opening: str, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Which characters of the text its tokens `ids` hold, which `completion` took after the prompt, or alone."""
        for before in (opening, ""):
            encoded = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
            prompt_ids = plain_ids(before, self.tokenizer)
            skipped = len(prompt_ids)
            stays, found = encoded["input_ids"][:skipped] == prompt_ids, encoded["input_ids"][skipped:]
            # Of what `completion` gave, an end of sequence may follow, or white space be left out.
            if stays and found[: len(ids)] == ids[: len(found)]:
                places = encoded["offset_mapping"][skipped:][: len(ids)]
                return [(first - len(before), last - len(before)) for first, last in places]
        raise AssertionError("a completion's tokens are those of its text, after the prompt or alone")

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]] | None:
        return as_messages(prompt, self.tokenizer, system_prompt=self.system_prompt, prompt_format=self.prompt_format)

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        joined: list[dict[str, Any]] = []
        for message in messages:  # a prompt that ends with the assistant's words is continued, not answered
            if joined and joined[-1]["role"] == message["role"] == "assistant":
                words = (joined[-1].get("content") or "") + (message.get("content") or "")
                joined[-1] = {**joined[-1], **message, "content": words}
            else:
                joined.append(dict(message))
        joined = for_template(joined, self.tokenizer)
        kwargs = self.chat_template_kwargs or {}
        require_all_read(self.tokenizer.get_chat_template(tools=kwargs.get("tools")), joined, kwargs, f"{where}: ")
        with template_refusals(f"{where}: "):
            return cast(str, self.tokenizer.apply_chat_template(joined, tokenize=False, **options, **kwargs))

    def _rest(self, text: str, prompt: Prompt, where: str) -> str:
        """What follows the prompt in the text of a whole conversation."""
        messages = self._messages(prompt) or []
        continued = messages[-1]["role"] == "assistant"
        opening = self._render(messages, where, add_generation_prompt=not continued, continue_final_message=continued)
        if not text.startswith(opening):
            place = next(i for i, (one, other) in enumerate(zip(opening, text + "\0", strict=False)) if one != other)
            found, expected = (shorten(repr(t[max(0, place - 10) : place + SHOWN]), SHOWN) for t in (text, opening))
            raise InputError(
                f"{where}: the chat template renders the whole conversation as …{found}… where the prompt alone is "
                f"…{expected}…; a completion must continue its prompt: see chat_template_kwargs"
            )
        return text[len(opening) :]

    def _text_ids(self, prompt: str, completion: str, prompt_ids: list[int]) -> list[int]:
        whole = encode_prompt(prompt + completion, self.tokenizer, prompt_format="text")
        continues = whole[: len(prompt_ids)] == prompt_ids
        ids = whole[len(prompt_ids) :] if continues else plain_ids(completion, self.tokenizer)
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, cast(int, end)]

    def _plain(self, completion: Prompt, where: str) -> str:
        if isinstance(completion, str):
            return completion
        raise InputError(f"{where}: its prompt is raw text and its completion messages; give both in one form")

    def _through_end_of_turn(self, ids: list[int]) -> list[int]:
        """Without what templates write after the token that ends a turn; with the end of sequence where none does."""
        for stops in self._ends:
            if (end := end_of_answer(ids, stops, self.tokenizer)) is not None:
                return ids[:end]
        last = self.tokenizer.eos_token_id
        return ids if last is None else [*ids, cast(int, last)]

    @cached_property
    def _ends(self) -> tuple[frozenset[int], frozenset[int]]:
        """Tokens that end a turn; and all special ones, for what ends otherwise (a call of a tool, for example)."""
        return turn_ends(self.tokenizer), special_ids(self.tokenizer)


def _said(completion: Prompt) -> Sequence[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
