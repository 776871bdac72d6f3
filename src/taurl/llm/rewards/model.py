"""A reward model as a reward function: `--rewards model:runs/rm/final`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taurl.runtime.errors import InputError, located

PREFIX = "model:"
FACTORY = "reward_model"
TOKENS_PER_PART = 8192


def as_factory(spec: str) -> str:
    """`model:FOLDER` or `model:FOLDER(normalize=True)` as a call of `reward_model`, the way other rewards are written.

    Raises: InputError where no folder or name stands there.
    """
    match = re.fullmatch(
        r"(?P<name>.+?)(?:\((?P<settings>\s*|\s*\w+\s*=.*)\))?", spec.strip().removeprefix(PREFIX), re.DOTALL
    )
    if match is None or match["name"].count("(") > match["name"].count(")"):
        raise InputError(
            f"reward {spec!r} not understood: expected {PREFIX}runs/NAME/final, or a hub name after it, and settings "
            "in parentheses, as in (normalize=True)"
        )
    settings = f", {match['settings']}" if (match["settings"] or "").strip() else ""
    return f"{FACTORY}(model={json.dumps(match['name'].strip(), ensure_ascii=False)}{settings})"


def reward_model(
    model: Any,
    normalize: bool = False,
    tokens_per_part: int = TOKENS_PER_PART,
    device: str = "auto",
    precision: str = "auto",
    tokenizer: Any = None,
    prompt_format: str | None = None,
    system_prompt: str | None = None,
) -> "ModelReward":
    """Make a reward function of a reward model.

    Args:
        model: its folder, a hub name, or a model object, which stays where it is and as it is.
        normalize: subtract the mean of its scores on its own training rows, and divide by their deviation.
        tokens_per_part: tokens, padding included, that go through it together.
        precision: float32, bfloat16, or auto: float32 on a CPU, where measuring which is faster might choose
            differently when a run is resumed.
        tokenizer: of an object; by default the one of the name that it was loaded by.
        prompt_format, system_prompt: how prompts are written for it, as in the settings of training (`text` for a
            model that was trained on raw text elsewhere); by default as its folder says.
    Raises: InputError if it is no reward model, or does not know its mean.
    """
    written = {"prompt_format": prompt_format, "system_prompt": system_prompt}
    given = {name: value for name, value in written.items() if value is not None}
    return ModelReward(model, normalize, tokens_per_part, device, precision, tokenizer, given)


class ModelReward:
    """Scores completions with a reward model; equal prompts go through it once.

    A conversation is written as in the model's training (system prompt, chat template), with its own tokenizer. A
    process model gives the lowest score of the completion's steps (its lines).
    """

    __name__ = FACTORY

    def __init__(
        self,
        model: Any,
        normalize: bool,
        tokens_per_part: int,
        device: str,
        precision: str,
        tokenizer: Any,
        written: dict[str, Any],
    ):
        from taurl.llm.data.completion_ids import Conversations
        from taurl.llm.models.heads import causal_lm, context_length
        from taurl.llm.models.loading import origin
        from taurl.llm.models.policies import tokenizer_of
        from taurl.llm.models.reward_folder import RewardNote
        from taurl.llm.scoring.reward_scores import check_scores, head_kind

        self.name = model if isinstance(model, str) else origin(model)
        self.tokens_per_part = tokens_per_part
        folder, note = RewardNote.for_model(model)
        note = note.changed(written)
        if normalize and not note.deviation:
            raise InputError(
                f"reward model '{self.name}' does not know the mean and deviation of its scores; leave normalize"
            )
        self.mean, self.deviation = (note.mean or 0.0, note.deviation or 1.0) if normalize else (0.0, 1.0)
        self.model = loaded(model, folder, device, precision) if isinstance(model, str) else model
        if note.pad_token_id is not None:
            causal_lm(self.model).config.get_text_config().pad_token_id = note.pad_token_id
        self.conversations = Conversations.of(note, tokenizer or tokenizer_of(model), self.model)
        self.context = context_length(causal_lm(self.model))
        self.of_steps = head_kind(self.model) == "token"
        check_scores(self.model)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """One score a completion; see `scores`. The named columns are what rows give their chat template."""
        count = len(completions)
        places = [f"completion {line} of {count}" for line in range(1, count + 1)]
        given = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        options = [{name: values[line] for name, values in given.items() if values} for line in range(count)]
        return self.scores(prompts, completions, places, options)

    def scores(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        places: Sequence[str],
        data: Sequence[Mapping[str, Any]],
    ) -> list[float | None]:
        """One score a completion. None where a process model finds no step in it.

        Args:
            places: where each completion stands, for an error.
            data: the row of each, of which `tools` and `chat_template_kwargs` go to the chat template.
        Raises: InputError for a conversation that the template refuses, or that is longer than the model's context.
        """
        from taurl.runtime.machine import out_of_memory_names

        lines: dict[tuple[int, ...], list[int]] = {}
        rows: list[Any] = []
        for line, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            rows.append(self._row(prompt, completion, places[line], data[line]))
            lines.setdefault(tuple(rows[-1].prompt), []).append(line)
        with out_of_memory_names("tokens_per_part of the reward model: model:FOLDER(tokens_per_part=…)"):
            return self._judged(rows, list(lines.values()))

    def _judged(self, rows: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[float | None]:
        """Scores of encoded rows; those of a group have one prompt."""
        from taurl.llm.data.preference_rows import JudgedRow
        from taurl.llm.scoring.reward_scores import row_scores

        if self.of_steps:
            scores = row_scores(self.model, [row for row in rows if row.step_ends], self.tokens_per_part)
            least = iter(map(min, scores))
            return [self._scaled(next(least)) if row.step_ends else None for row in rows]
        whole = [JudgedRow(rows[lines[0]].prompt, [rows[line].completions[0] for line in lines]) for lines in groups]
        found: dict[int, float] = {}
        for lines, scores_of in zip(groups, row_scores(self.model, whole, self.tokens_per_part), strict=True):
            found |= {line: self._scaled(score) for line, score in zip(lines, scores_of, strict=True)}
        return [found[line] for line in range(len(rows))]

    def _row(self, prompt: Any, completion: Any, where: str, data: Mapping[str, Any]) -> Any:
        from taurl.llm.data.completion_ids import Rewritten
        from taurl.llm.data.preference_rows import STEP_SEPARATOR, JudgedRow
        from taurl.llm.rewards.text import text_of

        with located(where):
            conversations = self.conversations.of_row(data)
        ids = conversations.prompt(prompt, where)
        ends: list[int] = []
        if self.of_steps:
            steps = text_of(completion).split(STEP_SEPARATOR)
            try:
                tokens, ends = conversations.steps(prompt, steps, STEP_SEPARATOR, ids, where)
            except Rewritten:  # what a policy wrote; it has no step that could be found
                return JudgedRow(ids, [[]])
        else:
            tokens = conversations.completion(prompt, completion, ids, where)
        if self.context is not None and len(ids) + len(tokens) > self.context:
            raise InputError(
                f"{where}: {len(ids)} tokens of its prompt and {len(tokens)} of its own are more than the "
                f"{self.context} that reward model '{self.name}' sees; shorten them (max_tokens) or choose another one"
            )
        return JudgedRow(ids, [tokens], step_ends=ends)

    def _scaled(self, score: float) -> float:
        return (score - self.mean) / self.deviation


def loaded(name: str, folder: Path, device: str, precision: str) -> Any:
    """The reward model in a folder. Raises: InputError if it holds none."""
    from taurl.llm.models.loading import load_model, written_head
    from taurl.runtime.machine import choose_device, choose_precision, out_of_memory_names

    head, kind = written_head(folder)
    if head == "language":
        raise InputError(f"'{folder}' is no reward model (it is {kind}); train one with taurl llm reward")
    place = choose_device(device)
    if precision == "auto" and place.type == "cpu":
        precision = "float32"
    with out_of_memory_names("the reward model's size, or its precision to bfloat16"):
        return load_model(name, dtype=choose_precision(precision, place), device=place, head=head)
