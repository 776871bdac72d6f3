"""Scoring completions with reward functions, in training and on held-out rows."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from taurl.llm.data.chat import as_completion, prompt_text
from taurl.llm.generation import Completion
from taurl.llm.rewards import RewardSet, Scores
from taurl.llm.rewards.contract import NOT_HANDED_ON


@dataclass(frozen=True)
class TrainerState:
    """What a reward function may know of the run, by TRL's names."""

    global_step: int
    max_steps: int


@dataclass(frozen=True)
class Evaluation:
    """How a model did on held-out rows.

    Attributes:
        metrics: figures, by `eval/…` names.
        samples: records of samples.jsonl.
        pictures: SVG, by the name of its file.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)


def evaluate(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardSet,
    state: TrainerState = TrainerState(0, 0),
) -> Evaluation:
    """Score one completion a row, and say how the rows did together."""
    scores = score(rows, completions, tokenizer, rewards, state)
    return summarized(rows, completions, tokenizer, rewards.names, scores, state)


def summarized(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    scores: Scores,
    state: TrainerState,
) -> Evaluation:
    """Summarise rows that are already scored, by rewards of these names."""
    metrics = {f"eval/{name}": value for name, value in reward_metrics(names, scores).items()}
    lengths = [completion.length for completion in completions]
    metrics["eval/completions/mean_length"] = float(np.mean(lengths))
    metrics["eval/completions/clipped_ratio"] = float(np.mean([c.truncated for c in completions]))
    samples = [
        {"step": state.global_step, "kind": "evaluation", "row": index, **sample}
        for index, sample in enumerate(describe(rows, completions, tokenizer, names, scores))
    ]
    return Evaluation(metrics, samples)


def reward_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that reach the reward functions by their own names."""
    return sorted({name for row in rows for name in row} - NOT_HANDED_ON)


def score(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardSet,
    state: TrainerState,
) -> Scores:
    """Rewards of one completion a row.

    What the functions are given is theirs: a change in it reaches neither the data nor what is trained.
    """
    texts = [decode(tokenizer, completion.tokens) for completion in completions]
    columns = {name: owned([row.get(name) for row in rows]) for name in reward_columns(rows)}
    return rewards(
        prompts=[deepcopy(row["prompt"]) for row in rows],
        completions=[as_completion(row["prompt"], text) for row, text in zip(rows, texts, strict=True)],
        completion_ids=[list(completion.tokens) for completion in completions],
        columns=columns,
        trainer_state=state,
    )


def owned(values: list[Any]) -> list[Any]:
    """With copies of lists and dictionaries; what the completions of a row share, they share there too."""
    distinct = {id(value): value for value in values if isinstance(value, list | dict)}
    copies = {place: deepcopy(value) for place, value in distinct.items()}
    return [copies.get(id(value), value) for value in values]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of token ids, without special tokens and with its white space as it is."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def reward_metrics(names: Sequence[str], scores: Scores) -> dict[str, float]:
    """`reward` and, for each function, mean, standard deviation and time; rows it does not apply to left out."""
    metrics = {"reward": mean(scores.total)}
    for column, name in enumerate(names):
        values = scores.values[:, column]
        metrics[f"rewards/{name}/mean"] = mean(values)
        metrics[f"rewards/{name}/std"] = float(np.std(values[~np.isnan(values)])) if not np.isnan(values).all() else 0.0
        metrics[f"rewards/{name}/seconds"] = scores.seconds[name]
    return scores.metrics | metrics  # a name that the run has already stays the run's


def mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def described(row: dict[str, Any], completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A completion as samples.jsonl has it, not scored yet."""
    return {
        "prompt": prompt_text(row["prompt"]),
        "completion": decode(tokenizer, completion.tokens),
        "finish": completion.finish,
        "tokens": completion.length,
        **({"answer": row["answer"]} if "answer" in row else {}),
    }


def describe(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    scores: Scores,
) -> list[dict[str, Any]]:
    """One record a completion, as samples.jsonl has it."""
    return [
        {
            **described(row, completion, tokenizer),
            "reward": float(scores.total[index]),
            "rewards": dict(zip(names, map(float, scores.values[index]), strict=True)),
            **{name: values[index] for name, values in scores.extra.items()},
        }
        for index, (row, completion) in enumerate(zip(rows, completions, strict=True))
    ]
