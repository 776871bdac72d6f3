"""From a data set by name to rows of token ids, as supervised training takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.data.chat import for_template, require_all_read, require_known, with_system_prompt
from taurl.llm.data.chat_rows import RowEncoder
from taurl.llm.data.chat_templates import CHATML, make_room, set_chat_template, write_stop_tokens
from taurl.llm.data.data_files import Row
from taurl.llm.data.datasets import Rows, as_rows, distinct_rows, is_task, load_rows, prepare_rows
from taurl.llm.data.row_forms import Chat, Messages, Text, read_form
from taurl.llm.data.tasks import named
from taurl.llm.data.token_rows import TokenRow, TokenRows, fit
from taurl.llm.models.heads import context_length, known_tokens
from taurl.llm.settings import RowSettings
from taurl.runtime.errors import InputError, located

OUTCOME = {"truncate": "truncated", "split": "split"}


@dataclass
class RowReader:
    """Reads data sets for one model.

    Reading may change tokenizer and model: a model without a chat template gets ChatML with its tokens where a row
    holds a conversation. An outline is enough to read for; the model itself is then given the same by `settle`.

    Attributes:
        settings: of the reading.
        model: the model or its outline; None where there is only a tokenizer to look at.
        longest: most tokens of a row; None: no bound.
        strings_are_messages: whether a prompt that is a string is the user's message.
        new_tokens: ids of tokens that the model did not have.
        model_is_fixed: whether the model may not be changed any more.
        further: whether it reads a data set beside the one that the settings describe.
    """

    settings: RowSettings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    longest: int | None
    strings_are_messages: bool
    encoder: RowEncoder
    new_tokens: list[int] = field(default_factory=list)
    model_is_fixed: bool = False
    further: bool = False

    @classmethod
    def of(cls, settings: RowSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> RowReader:
        """A reader by the settings. Sets the template that they name, and writes the stop tokens to the model.

        Raises: InputError for a template that cannot be had, or a max_length beyond the model's context.
        """
        context = None if model is None else context_length(model)
        if settings.max_length and context and settings.max_length > context:
            raise InputError(f"max_length is {settings.max_length}, more than the model's context of {context}")
        new = [] if settings.chat_template is None else set_chat_template(settings.chat_template, tokenizer, model)
        as_messages = settings.prompt_format == "chat" or (
            settings.prompt_format == "auto" and bool(tokenizer.chat_template)
        )
        stops = write_stop_tokens(model, tokenizer)
        encoder = RowEncoder(tokenizer, stops, settings.mask, settings.chat_template_kwargs)
        return cls(settings, tokenizer, model, settings.max_length or context, as_messages, encoder, new)

    def settle(self, model: PreTrainedModel) -> None:
        """Give the model whose outline it read for what reading has changed: new tokens, and those that it stops at."""
        if model is not self.model:
            if self.new_tokens:
                make_room(self.new_tokens, self.tokenizer, model)
            write_stop_tokens(model, self.tokenizer)

    def read(self, source: object, limit: int | None = None, *, distinct: bool = False) -> TokenRows:
        """The first `limit` rows of a data set by name or as an object, and of those of the setting `mix`.

        With `distinct`, rows whose question came before are passed over.

        Raises: InputError, which names source, row, column and value, for what cannot be read or trained on.
        """
        rows: Rows = []
        parts: list[list[TokenRow]] = []
        sources: list[int] = []
        cuts: list[Counter[str]] = []
        lasts: list[TokenRow] = []
        left_out: Counter[str] = Counter()
        for index, (reader, name) in enumerate(self.sources(source)):
            with named(name):
                raw = load_rows(name, arguments=reader.settings.dataset_args) if isinstance(name, str) else name
                found = reader.prepare(as_rows(raw))
                number_of = {id(row): number for number, row in enumerate(found, start=1)}
                found = (distinct_rows(found) if distinct else found)[:limit]
                before = len(rows)
                for row in found:
                    wholes = reader.whole(row, number_of[id(row)])
                    cut: Counter[str] = Counter()
                    if row_parts := reader.fitted(wholes, cut):
                        rows.append(row)
                        parts.append(row_parts)
                        cuts.append(cut)
                        lasts.append(wholes[-1])
                    else:
                        left_out += cut
                if len(rows) == before and limit != 0:
                    raise InputError(f"none of {len(found)} rows is left within {self.longest} tokens: see overlong")
            sources += [index] * (len(rows) - before)
        return TokenRows(rows, parts, sources, self.weights, cuts, left_out, lasts)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the data set and of those mixed in."""
        return (1.0, *self.settings.mix.values())

    def sources(self, source: object) -> list[tuple[RowReader, object]]:
        """The data set and those mixed in, each with its reader."""
        if source is None:
            raise InputError("no data set given: name one with dataset (a .jsonl file, for example)")
        return [(self, source), *((self.for_other(name), name) for name in self.settings.mix)]

    def for_other(self, source: object) -> RowReader:
        """The reader of a further data set: without the mix, and without arguments that are a task's."""
        changes: dict[str, object] = {"mix": {}}
        if isinstance(source, str) and not is_task(source):
            changes["dataset_args"] = {}
        return replace(self, settings=self.settings.model_copy(update=changes), further=True)

    def prepare(self, rows: Rows, *, first: int = 1) -> Rows:
        """Raw rows, of which the first has this number, with columns renamed and answers cut out."""
        columns, answer_after = self.settings.columns, self.settings.answer_after
        return prepare_rows(rows, columns=columns, answer_after=answer_after, first=first, further=self.further)

    def encode(self, row: Row, number: int, counts: Counter[str]) -> list[TokenRow]:
        """The token rows of a row, one in most cases; what its length cost is added to `counts`.

        Args:
            number: of the row, from 1, for error messages.
        """
        return self.fitted(self.whole(row, number), counts)

    def whole(self, row: Row, number: int) -> list[TokenRow]:
        """The token rows of a row, of any length."""
        with located(f"row {number} of the data"):
            wholes = self._token_rows(row)
            for whole in wholes:
                require_known(whole.ids, None if self.model is None else known_tokens(self.model))
            if not all(whole.targets for whole in wholes):
                raise InputError("nothing to train on: none of its tokens is a target")
        return wholes

    def fitted(self, wholes: Sequence[TokenRow], counts: Counter[str]) -> list[TokenRow]:
        """Token rows within the length; what that cost is added to `counts`."""
        fitting: list[TokenRow] = []
        for whole in wholes:
            parts = fit(whole, self.longest, self.settings.overlong)
            if self.longest is not None and len(whole) > self.longest:
                counts[OUTCOME[self.settings.overlong] if parts else "dropped"] += 1
            fitting += parts
        return fitting

    def _token_rows(self, row: Row) -> list[TokenRow]:
        form = read_form(row, strings_are_messages=self.strings_are_messages)
        if isinstance(form, TokenRow):
            self._check_ids(form.ids)
            if self.settings.mask not in ("auto", "all"):
                raise InputError(
                    f"mask {self.settings.mask} needs a conversation, and this row is token ids; leave mask out: its "
                    "labels say what is trained, and without labels all of it is"
                )
        if not isinstance(form, Chat) and self.settings.system_prompt is not None:
            what = "token ids" if isinstance(form, TokenRow) else "raw text"
            raise InputError(f"system_prompt needs a chat template, and this row is {what}; put it into the data")
        if isinstance(form, TokenRow):
            everything = [False, *[True] * (len(form) - 1)]
            return [TokenRow(form.ids, everything) if self.settings.mask == "all" else form]
        if isinstance(form, Text):
            return [self.encoder.text(form)]
        self._require_template()
        chat = self._prepared(form)
        require_all_read(self.tokenizer.get_chat_template(tools=chat.options.get("tools")), chat.messages, chat.options)
        if not self.settings.separate_turns or self.settings.mask == "all":
            return [self.encoder.chat(chat)]
        turns = self.encoder.turns(chat)
        return [self.encoder.chat(replace(chat, messages=chat.messages[: turn + 1]), [turn]) for turn in turns]

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            if self.model_is_fixed:
                raise InputError(
                    "a conversation, the first one of this stream, and the model has no chat template: give "
                    f"chat_template {CHATML}, so that it is there before training begins"
                )
            self.new_tokens += set_chat_template(CHATML, self.tokenizer, self.model)
            self.encoder.stops = write_stop_tokens(self.model, self.tokenizer)

    def _prepared(self, chat: Chat) -> Chat:
        """As the template takes it, with the system prompt before it."""

        def prepared(messages: Messages) -> Messages:
            return for_template(with_system_prompt(messages, self.settings.system_prompt), self.tokenizer)

        messages = prepared(chat.messages)
        added = len(messages) - len(chat.messages)
        return replace(
            chat,
            messages=messages,
            first=None if chat.first is None else chat.first + added,
            begun=None if chat.begun is None else prepared(chat.begun),
        )

    def _check_ids(self, ids: Sequence[int]) -> None:
        embeddings: Any = None if self.model is None else self.model.get_input_embeddings()
        size = len(self.tokenizer) if embeddings is None else embeddings.num_embeddings
        for place, token in enumerate(ids):
            if not 0 <= token < size:
                raise InputError(f"column 'input_ids': value {place} is {token}; expected a token id below {size}")
