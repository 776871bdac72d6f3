"""Reward models: scores learned from judged completions (Stiennon et al. 2020, arXiv:2009.01325).

`steps`, `_update` and `unit_losses` are the algorithm; its mathematics is called from `taurl.functional.preference`.
A unit is what has a loss of its own: a pair, a ranked list, a completion with a score or label, a step of a process.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.algorithms.reward_config import RewardConfig
from taurl.llm.algorithms.reward_losses import FORMS, checked_classes, unit_count, unit_losses
from taurl.llm.algorithms.setup import repeat_data
from taurl.llm.algorithms.trainer import Trainer
from taurl.llm.data.chat import prompt_text
from taurl.llm.data.datasets import PromptOrder
from taurl.llm.data.preference_rows import JudgedRow, PreferenceReader, Preferences, train_and_held_out_preferences
from taurl.llm.evaluation import Evaluation, decode
from taurl.llm.models.reward_folder import RewardNote
from taurl.llm.models.reward_model import ProcessRewardModel, RewardModel
from taurl.llm.pictures.reward_figures import figures
from taurl.llm.pictures.reward_pictures import pictures
from taurl.llm.scoring.reward_scores import pad_token_id, part_scores, row_scores, scoring_parts
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Callback, Record

HEADLINE = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "tokens/s": "tokens_per_second"}
ROWS_SHOWN = 16  # held-out rows whose completions are kept with their scores
STEP_FIGURES = ("accuracy", "margin", "correlation")  # what is said of the rows of a step


class Reward(Trainer):
    """Trains a model that scores completions.

        Reward("smollm2-135m-instruct", pairs, RewardConfig(steps=300)).train()

    Args:
        model: a name (see `RewardConfig.model`), or a model object for sequence (of a process: token) classification
            with one label, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts with the columns that `RewardConfig.loss` names.
        config: settings; what is given here as an object stands in place of its setting there.
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        callbacks: called with every record: each step's, and that of an evaluation before the first.
    """

    algorithm = "reward"
    config_class = RewardConfig
    headline = HEADLINE
    memory_settings = "tokens_per_part (or max_length, rows_per_step)"
    takes = ("model", "dataset", "eval_dataset", "tokenizer")
    config: RewardConfig
    policy: RewardModel

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        config: RewardConfig | None = None,
        *,
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.start(config, callbacks, model=model, dataset=dataset, eval_dataset=eval_dataset, tokenizer=tokenizer)

    def set_up(self, dtype: torch.dtype | None) -> None:
        config, run = self.config, self.run
        self.form = FORMS[config.loss]
        self.train_rows, self.held_out = train_and_held_out_preferences(
            PreferenceReader.of(config, self.tokenizer, self.outline(), self.form),
            self.given("dataset"),
            self.given("eval_dataset"),
            config.eval_rows,
            config.seed,
            run.view.note,
        )
        self.note_nothing_held_out()
        judged = self.train_rows.judged + self.held_out.judged
        self.classes = checked_classes(judged, config)
        self.binary = self.classes == 2  # scores are logits of a label, or of a share
        repeat_data(run, self.train_rows.fingerprint() + self.held_out.fingerprint())
        self.order = PromptOrder(len(self.train_rows), config.seed)
        self.count_steps(len(self.train_rows), config.rows_per_step)
        self.make_policy(dtype, ProcessRewardModel if self.form == "process" else RewardModel)
        self.make_optimizer()
        self.state = {"optimizer": self.optimizer}

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        config = self.config
        with self.begin() as run:
            for step in run.steps():
                indices = self.order.take((step.number - 1) * config.rows_per_step, config.rows_per_step)
                rows = [self.train_rows.judged[index] for index in indices]
                with step.phase("update", "updating"):
                    found = self._update(rows, step.number)
                self.note_updates(step, found)
                tokens = sum(len(row.prompt) + sum(map(len, row.completions)) for row in rows)
                found["tokens_per_second"] = tokens / step.times["time/update"]
                found["epoch"] = step.number * config.rows_per_step / len(self.train_rows)
                yield self.finish(step, found)

    def _update(self, rows: Sequence[JudgedRow], step: int) -> Record:
        """One optimiser update. Losses are divided by the units of all rows, before a part runs (promise 1)."""
        units = unit_count(rows, self.form)
        scores: list[list[float]] = [[] for _ in rows]
        rate = learning_rate(step, self.config)
        model = self.policy.model
        parts = scoring_parts(
            rows,
            self.config.tokens_per_part,
            pad=pad_token_id(model),
            device=self.device,
            share_prompts=self.shares_prompts(),
        )
        with self.optimizer.update(rate) as backward:
            for part in parts:
                found = part_scores(model, part)
                members = [rows[place] for place in part.rows]
                backward(unit_losses(self.config, members, found, self.classes).sum() / units)
                for place, values in part.by_row(found):
                    scores[place] = values
        flat = np.array([value for values in scores for value in values])
        said = figures(self.form, rows, scores, binary=self.binary)
        return {
            "loss": backward.loss,
            **{name: said[name] for name in STEP_FIGURES if name in said},
            "mean_reward": float(flat.mean()),
            "min_reward": float(flat.min()),
            "max_reward": float(flat.max()),
            "grad_norm": backward.grad_norm,
            "updates_skipped": int(not backward.taken),
            "learning_rate": rate,
        }

    def evaluation(self, step: int) -> Evaluation:
        """Figures, scores and pictures of the held-out rows."""
        scores = self._scores(self.held_out)
        known = all(math.isfinite(value) for values in scores for value in values)  # else the weights have diverged
        drawn = pictures(self.form, self.held_out.judged, scores, binary=self.binary) if known else {}
        return Evaluation(self._figures(scores), self._samples(scores, step), drawn)

    def _figures(self, scores: Sequence[Sequence[float]]) -> dict[str, float]:
        rows = self.held_out.judged
        flat = torch.tensor([value for values in scores for value in values], dtype=torch.float64)
        loss = float(unit_losses(self.config, rows, flat, self.classes).sum()) / unit_count(rows, self.form)
        found = figures(self.form, rows, scores, binary=self.binary)
        return {f"eval/{name}": value for name, value in {**found, "loss": loss}.items()}

    def _scores(self, rows: Preferences) -> list[list[float]]:
        self.run.view.status(f"scoring {len(rows)} rows")
        return row_scores(self.policy.model, rows.judged, self.config.tokens_per_part)

    def _samples(self, scores: Sequence[Sequence[float]], step: int) -> list[Record]:
        """The first held-out rows, one sample a completion, with its score (of a process: its lowest) as the reward."""
        samples = []
        for index, (row, judged) in enumerate(zip(self.held_out.rows[:ROWS_SHOWN], self.held_out.judged, strict=False)):
            values = scores[index] if self.form != "process" else [min(scores[index])]
            for place, (completion, value) in enumerate(zip(judged.completions, values, strict=True)):
                name = f"{index} {('chosen', 'rejected')[place]}" if len(values) == 2 else f"{index}.{place}"
                samples.append(
                    {
                        "step": step,
                        "kind": "evaluation",
                        "row": name if len(values) > 1 else index,
                        "prompt": prompt_text(row["prompt"]),
                        "completion": decode(self.policy.tokenizer, completion),
                        "tokens": len(completion),
                        "reward": value,
                    }
                )
        return samples

    def export(self, directory: str | Path) -> None:
        """Write a folder that `transformers` (with an adapter: `peft`) loads, with the scale of its scores."""
        self._export(directory, self.config.scale_rows)

    def export_early(self, directory: Path) -> None:
        """The same without the scale, which may take minutes to find."""
        self._export(directory, 0)

    def _export(self, directory: str | Path, scale_rows: int) -> None:
        config = self.config
        written: dict[str, Any] = {
            name: getattr(config, name) for name in RewardNote.model_fields if hasattr(config, name)
        }
        if count := min(scale_rows, len(self.train_rows)):
            picked = np.random.default_rng(config.seed).choice(len(self.train_rows), count, replace=False)
            scores = self._scores(self.train_rows.take(sorted(picked.tolist())))
            if self.form == "process":
                scores = [[min(values)] for values in scores]  # which is the reward of a completion
            flat = np.array([value for values in scores for value in values])
            if np.isfinite(flat).all():  # else the weights have diverged
                written |= {"mean": float(flat.mean()), "deviation": float(flat.std())}
        self.policy.note = RewardNote(**written)
        super().export(directory)
