"""`taurl llm inspect`: rows of a data set as token rows, targets apart from what is only read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.text import Text

from taurl.commands.options import parse
from taurl.llm.inference_config import InspectConfig
from taurl.runtime.errors import InputError, located
from taurl.runtime.terminal import plain_console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from taurl.llm.data.data_files import Row
    from taurl.llm.data.row_reader import RowReader
    from taurl.llm.data.token_rows import TokenRow

CONTEXT, TARGET = "dim", "bold bright_green"
SPECIAL_CONTEXT, SPECIAL_TARGET = "cyan", "bold bright_yellow"
LEGEND = "⟦what is trained⟧, the rest is context"  # brackets where there is no colour


def main(words: Sequence[str]) -> int:
    config = parse(InspectConfig, words, prog="taurl llm inspect")
    if config.dataset is None:
        raise InputError("no data set given: name one with --dataset (a .jsonl file, for example)")

    from taurl.llm.data.datasets import iterate_rows
    from taurl.llm.data.row_reader import RowReader
    from taurl.llm.data.tasks import named
    from taurl.llm.models.loading import load_outline, load_tokenizer

    reader = RowReader.of(config, load_tokenizer(config.model), load_outline(config.model))
    console, counts = plain_console(), Counter[str]()
    for own, name in reader.sources(config.dataset):
        with named(name):
            raw = list(islice(iterate_rows(name, arguments=own.settings.dataset_args), config.rows))
            rows = own.prepare(raw)
            for number, row in enumerate(rows, start=1):
                for title, shown in versions(own, row, number, counts):
                    console.print(heading(f"{name}, row {number}{title}", shown), style="bold", soft_wrap=True)
                    console.print(painted(shown, own.tokenizer, console.color_system is not None), soft_wrap=True)
                    console.print()
    console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or LEGEND, style="dim")
    return 0


def versions(reader: RowReader, row: Row, number: int, counts: Counter[str]) -> Iterator[tuple[str, TokenRow]]:
    """What a row is trained as, with a title for each: one token row, several, or none if it is dropped."""
    from taurl.llm.data.completion_ids import Conversations
    from taurl.llm.data.preference_rows import answer_to, check_implicit_prompt, with_prompt
    from taurl.llm.data.token_rows import TokenRow

    def has(name: str) -> bool:
        return row.get(name) is not None

    where = f"row {number} of the data"
    conversations = Conversations.of(reader.settings, reader.tokenizer)
    if has("chosen") and has("rejected"):  # as preferences and reward models read them
        check_implicit_prompt(row, number, conversations)
        pair = with_prompt(row, number)
        with located(where):
            conversations = conversations.of_row(row)
            answers = {side: answer_to(pair["prompt"], pair[side], side) for side in ("chosen", "rejected")}
        ids = conversations.prompt(pair["prompt"], where)
        tokens = {side: conversations.completion(pair["prompt"], said, ids, where) for side, said in answers.items()}
        if reader.longest is not None and len(ids) + max(map(len, tokens.values())) > reader.longest:
            counts["dropped"] += 1
            return
        for side, own in tokens.items():
            yield f", {side}", TokenRow(ids + own, [False] * len(ids) + [True] * len(own))
    elif any(map(has, ("input_ids", "messages", "conversations", "completion", "text"))) or not has("prompt"):
        parts = reader.encode(row, number, counts)
        for place, shown in enumerate(parts, start=1):
            yield f", part {place} of {len(parts)}" if len(parts) > 1 else "", shown
    else:
        with located(where):
            conversations = conversations.of_row(row)
        ids = conversations.prompt(row["prompt"], where)
        yield ", prompt alone", TokenRow(ids, [False] * len(ids))


def heading(title: str, row: TokenRow) -> Text:
    """Which row, and its size."""
    return Text(f"{title}: {len(row)} tokens, {row.targets} trained")


def painted(row: TokenRow, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Text:
    """The row's text; line breaks are marked where a token row holds them, targets stand in brackets without colour."""
    from taurl.llm.data.chat import special_ids

    special = special_ids(tokenizer)
    text, ids, place = Text(), row.ids, 0
    for trained, targets in groupby(row.trained):
        if trained and not coloured:
            text.append("⟦")
        run = ids[place : place + len(list(targets))]
        for is_special, tokens in groupby(run, key=special.__contains__):
            piece = tokenizer.decode(list(tokens), skip_special_tokens=False)
            style = (SPECIAL_TARGET if trained else SPECIAL_CONTEXT) if is_special else TARGET if trained else CONTEXT
            text.append(visible(str(piece)), style=style)
        place += len(run)
        if trained and not coloured:
            text.append("⟧")
    return text


def visible(text: str) -> str:
    """Line breaks with a mark, and nothing that a terminal would obey."""
    shown = "".join(letter if letter.isprintable() or letter in "\n\t\u00a0\u3000" else "�" for letter in text)
    return shown.replace("\n", "↵\n")
