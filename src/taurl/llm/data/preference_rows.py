"""Judged completions as token ids: pairs, rankings, completions with a label or a score, and steps with labels.

A prompt is encoded once, as `chat.encode_prompt` does it; a completion is what follows it in the whole conversation,
through the end of the assistant's turn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.data.chat import Prompt, prompt_problem, says_nothing
from taurl.llm.data.completion_ids import Conversations
from taurl.llm.data.data_files import Row
from taurl.llm.data.datasets import Reading, Rows, check_prompts, columns_of, key
from taurl.llm.data.row_forms import said
from taurl.llm.data.tasks import Prompts, fingerprint, named, train_and_held_out
from taurl.llm.models.heads import context_length
from taurl.runtime.errors import InputError, located, shorten

Form: TypeAlias = Literal["pairs", "ranking", "label", "score", "process"]
"""What is known of the completions of a prompt: which of two is better, an order, or a number for each by itself (a
label, a score, or a label for each of its steps)."""

COLUMNS: dict[Form, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "ranking": ("completions",),
    "label": ("completion", "label"),
    "score": ("completion", "score"),
    "process": ("completions", "labels"),
}
WORDS = {"true": 1.0, "false": 0.0}
STEP_SEPARATOR = "\n"


@dataclass(frozen=True)
class JudgedRow:
    """A prompt with the completions that were judged together.

    Attributes:
        prompt: token ids.
        completions: token ids of each; of a pair chosen and rejected, of a ranking the best first, otherwise one (two
            where pairs are read as labels or scores).
        margin: by how much a pair's chosen one is better; 0 where nobody said.
        values: the label or score of each completion; none of pairs and rankings.
        step_ends, step_labels: of a process, the place of each step's last token in the completion, and its label.
    """

    prompt: list[int]
    completions: list[list[int]]
    margin: float = 0.0
    values: list[float] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    step_labels: list[float] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


@dataclass(frozen=True)
class Preferences(Prompts):
    """Rows with an explicit `prompt`, each with its token ids (`ids` are those of the prompts).

    Attributes:
        too_long: how many rows were left out for their length.
    """

    judged: list[JudgedRow]
    too_long: int = 0

    def take(self, indices: Sequence[int]) -> "Preferences":
        """The rows at these places."""
        judged = [self.judged[index] for index in indices]
        return Preferences(
            [self.rows[index] for index in indices], [row.prompt for row in judged], judged, self.too_long
        )

    def fingerprint(self) -> str:
        """A hash of the rows and their token ids."""
        return fingerprint([self.rows, [vars(row) for row in self.judged]])


@dataclass(frozen=True)
class PreferenceReader:
    """How data rows of one form are read and become token ids."""

    form: Form
    conversations: Conversations
    longest: int | None
    reading: Reading = field(default_factory=Reading)
    two_labels: bool = False

    @classmethod
    def of(
        cls,
        settings: Any,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        form: Form,
        *,
        two_labels: bool = False,
    ) -> Self:
        """A reader with the settings of a config that has PromptSettings and a `max_length`.

        Args:
            two_labels: refuse labels that are neither 0 nor 1.
        Raises: InputError for a max_length beyond the model's context.
        """
        context = context_length(model)
        if settings.max_length and context and settings.max_length > context:
            raise InputError(f"max_length is {settings.max_length}, more than the model's context of {context}")
        return cls(
            form=form,
            conversations=Conversations.of(settings, tokenizer, model),
            longest=settings.max_length or context,
            reading=Reading.of(settings),
            two_labels=two_labels,
        )

    def read(self, source: object, limit: int | None = None, *, distinct: bool = False) -> Preferences:
        """The first `limit` rows of a data set given by name or as an object.

        Rows longer than `longest` tokens are passed over and counted. With `distinct`, `limit` counts prompts, and all
        rows of a prompt are there: its other answers say as much about a judge as the first.

        Raises: InputError, which names source, row and column, for what cannot be read, or where no row is left.
        """
        if source is None:
            raise InputError("no data set given: name one with dataset, for example preferences.jsonl")
        with named(source):
            return self._encoded(self._explicit(self.reading.rows(source)), limit, distinct)

    def for_other(self, source: object) -> "PreferenceReader":
        """The reader of a further data set."""
        return replace(self, reading=self.reading.of_other(source))

    def _explicit(self, rows: Rows) -> Rows:
        """Rows that have the form's columns, and a prompt of their own."""
        available = columns_of(rows)
        unpaired = self.form in ("label", "score") and "completion" in available
        needed = COLUMNS[self.form] if unpaired or self.form not in ("label", "score") else COLUMNS["pairs"]
        for column in needed:
            if column not in available:
                advice = f"rename one with columns, as in its_name={column}"
                if {"completion", "label"} <= set(available):
                    advice = "completions with labels are learned by loss_type kto of dpo, and by loss bce of reward"
                raise InputError(
                    f"no column '{column}'; the data has {', '.join(available)}; expected prompt, "
                    f"{', '.join(COLUMNS[self.form])}: {advice}"
                )
        if needed == COLUMNS["pairs"]:
            for number, row in enumerate(rows, start=1):
                check_implicit_prompt(row, number, self.conversations)
            rows = [with_prompt(row, number) for number, row in enumerate(rows, start=1)]
        check_prompts(rows)
        return rows

    def _encoded(self, rows: Rows, limit: int | None, distinct: bool) -> Preferences:
        number_of = {id(row): number for number, row in enumerate(rows, start=1)}
        kept: Rows = []
        judged: list[JudgedRow] = []
        too_long = 0
        prompts: set[str] = set()
        for row in rows:
            full = limit is not None and (len(prompts) if distinct else len(kept)) >= limit
            if full and (not distinct or key(row) not in prompts):
                continue
            found = self._judged(row, f"row {number_of[id(row)]} of the data")
            if self.longest is not None and found.longest > self.longest:
                too_long += 1
                continue
            prompts.add(key(row))
            kept.append(row)
            judged.append(found)
        if not kept and limit != 0:
            raise InputError(f"all {too_long} rows are longer than {self.longest} tokens; raise max_length")
        return Preferences(kept, [row.prompt for row in judged], judged, too_long)

    def _judged(self, row: Row, where: str) -> JudgedRow:
        with located(where):
            conversations = self.conversations.of_row(row)
        prompt = conversations.prompt(row["prompt"], where)
        if self.form == "process":
            return self._process(row, conversations, prompt, where)
        if self.form == "ranking":
            given = _listed(row, "completions", where, at_least=2)
            names = [f"completions[{place}]" for place in range(len(given))]
        elif self.form == "pairs" or "completion" not in row:
            names = ["chosen", "rejected"]
            given = [row[name] for name in names]
        else:
            names, given = ["completion"], [row["completion"]]
        for name, completion in zip(names, given, strict=True):
            silent = names == ["completion"] and says_nothing(completion)
            if not silent and (problem := prompt_problem(completion, f"its {name}")):
                raise InputError(f"{where}: {problem}")
        with located(where):
            given = [answer_to(row["prompt"], one, name) for name, one in zip(names, given, strict=True)]
        completions = [conversations.completion(row["prompt"], completion, prompt, where) for completion in given]
        if self.form in ("pairs", "ranking"):
            margin = 0.0 if row.get("margin") in (None, "") else _number(row["margin"], "margin", where)
            return JudgedRow(prompt, completions, margin)
        values = [1.0, 0.0] if len(names) == 2 else [_number(row[self.form], self.form, where)]
        if self.two_labels and values[0] not in (0, 1):
            raise InputError(f"{where}: its label is {values[0]:g}; expected true or false")
        return JudgedRow(prompt, completions, values=values)

    def _process(self, row: Row, conversations: Conversations, prompt: list[int], where: str) -> JudgedRow:
        steps, labels = (_listed(row, name, where, at_least=1) for name in COLUMNS["process"])
        for place, step in enumerate(steps):
            if not isinstance(step, str) or not step.strip():
                raise InputError(
                    f"{where}: its completions[{place}] is {shorten(repr(step), 60)}; expected a step's text"
                )
        if len(labels) != len(steps):
            raise InputError(f"{where}: {len(labels)} labels for {len(steps)} completions; expected one each")
        values = [_number(label, f"labels[{place}]", where) for place, label in enumerate(labels)]
        completion, ends = conversations.steps(row["prompt"], steps, STEP_SEPARATOR, prompt, where)
        return JudgedRow(prompt, [completion], step_ends=ends, step_labels=values)


def train_and_held_out_preferences(
    reader: PreferenceReader,
    dataset: object,
    eval_dataset: object,
    eval_rows: int | None,
    seed: int,
    note: Callable[[str], None],
) -> tuple[Preferences, Preferences]:
    """`tasks.train_and_held_out` of judged rows: no prompt is in both, and all rows of a held-out prompt are held out.

    Args:
        eval_rows: how many prompts are held out.
        note: told how many rows were left out, or teach nothing, and why.
    """
    train, held_out, dropped = train_and_held_out(reader, dataset, eval_dataset, eval_rows, seed, whole_prompts=True)
    if dropped:
        note(f"{dropped} training rows left out: their prompts are among the held-out ones")
    # Taken out of one data set, both know of all its rows.
    if too_long := train.too_long + (0 if eval_dataset is None else held_out.too_long):
        note(f"{too_long} rows left out: longer than max_length or than the model's context")
    if alike := sum(len(row.completions) > 1 == len(set(map(tuple, row.completions))) for row in train.judged):
        note(f"{alike} of {len(train.judged)} training rows compare a completion with itself")
    return train, held_out


def check_implicit_prompt(row: Row, number: int, conversations: Conversations) -> None:
    """Refuse a pair of strings without a prompt where a string prompt becomes a turn of its own.

    What two strings begin with alike may end in the middle of their answers, and nothing says where the question ends.
    Raises: InputError, which names the row.
    """
    if row.get("prompt") is None and isinstance(row["chosen"], str) and conversations.makes_turns:
        raise InputError(
            f"row {number} of the data has no prompt, and its chosen and rejected are strings, which do not say where "
            "the answer begins that a chat template would make the assistant's turn; add a column prompt, give "
            "messages, or take them as raw text: prompt_format text"
        )


def with_prompt(row: Row, number: int) -> Row:
    """A pair with an explicit prompt: its own, or what chosen and rejected begin with alike (messages or characters).

    A prompt that is a string beside conversations that begin with it is the data set's copy of their first message.
    Raises: InputError where they begin with nothing alike, or one is nothing but the beginning of the other.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for name in COLUMNS["pairs"]:
        if problem := prompt_problem(row[name], f"its {name}"):
            raise InputError(f"row {number} of the data: {problem}")
    whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
    if prompt is not None and not (whole and isinstance(prompt, str)):
        return row
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(f"row {number} of the data: one of chosen and rejected is text, the other messages")
    shared = _shared_length(chosen, rejected)
    if not 0 < shared < min(len(chosen), len(rejected)):
        found = "begin with nothing alike" if not shared else "do not differ after what they begin with"
        raise InputError(
            f"row {number} of the data has no prompt, and its chosen and rejected {found}; add a prompt, or leave the "
            "row out"
        )
    return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def answer_to(prompt: Prompt, completion: Prompt, name: str) -> Prompt:
    """A completion without the messages of its prompt, where it is the whole conversation.

    Raises: InputError where it begins with another message than the assistant's or the prompt's.
    """
    if isinstance(completion, str) or completion[0]["role"] == "assistant":
        return completion
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    begins = [said(message) for message in completion[: len(asked)]] == [said(message) for message in asked]
    if begins and len(completion) > len(asked) and completion[len(asked)]["role"] == "assistant":
        return completion[len(asked) :]
    if asked[-1]["role"] == "assistant" and completion[0]["role"] != "system":  # they go on talking
        return completion
    raise InputError(
        f"its {name} begins with a message of role {completion[0]['role']!r}, and not with the messages of its prompt; "
        "expected the assistant's, or the whole conversation"
    )


def _shared_length(chosen: Prompt, rejected: Prompt) -> int:
    """How many messages or characters are alike; a blank at the end belongs to what follows."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    return shared - 1 if isinstance(chosen, str) and shared and chosen[shared - 1] == " " else shared


def _listed(row: Row, name: str, where: str, *, at_least: int) -> list[Any]:
    value = row[name]
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < at_least:
        raise InputError(f"{where}: its {name} is {shorten(repr(value), 60)}; expected a list of {at_least} or more")
    return list(value)


def _number(value: Any, name: str, where: str) -> float:
    """A finite number, a boolean, or either as CSV has it."""
    try:
        number = WORDS.get(value.strip().lower()) if isinstance(value, str) else None
        number = float(value) if number is None else number
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: its {name} is {shorten(repr(value), 60)}; expected a finite number or true, false")
    return number
