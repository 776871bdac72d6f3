"""DPO and its family: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

`steps`, `_update` and `_objective` are the algorithm; `dpo_losses` calls its losses from `taurl.functional`. N prompts
have K answers each: pairs (K = 2, chosen and rejected), or single answers with a label (KTO).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.functional.kto import kl_baseline
from taurl.llm.algorithms.dpo_config import DPOConfig
from taurl.llm.algorithms.dpo_figures import FallWatch, answer_rewards, pair_figures, unpaired_figures
from taurl.llm.algorithms.dpo_losses import PairLoss, RewardShift, UnpairedLoss, check_losses, sorts_the_batch
from taurl.llm.algorithms.dpo_reference import NoReference, Reference
from taurl.llm.algorithms.figures import Tally
from taurl.llm.algorithms.online import OnlineTrainer, RewardFunction
from taurl.llm.algorithms.setup import repeat_data, repeat_kept
from taurl.llm.data.datasets import PromptOrder
from taurl.llm.data.given_answers import GivenAnswers
from taurl.llm.data.preference_rows import Form, PreferenceReader, Preferences, train_and_held_out_preferences
from taurl.llm.evaluation import Evaluation
from taurl.llm.scoring.answer_batches import AnswerBatch, AnswerPart, batch_logprobs, part_logprobs
from taurl.llm.scoring.likelihood import WIDEST_TREE, WORTH_A_TREE
from taurl.runtime.config import refuse_unread
from taurl.runtime.errors import InputError
from taurl.runtime.machine import out_of_memory_names
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Callback, Record
from taurl.runtime.step import Step

HEADLINE = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward": "reward",
    "held-out accuracy": "eval/rewards/accuracies",
    "tokens/s": "tokens_per_second",
}


# Settings that one way of running reads; another value than the default is refused in the other.
REWARDS_ONLY = ("reward_weights", "reward_timeout", "reward_process", "missing_eos_penalty")
ONLINE_ONLY = ("group_size", "temperature", "max_tokens", "stop", *REWARDS_ONLY)
OFFLINE_ONLY = ("max_length", "cache_reference")


@dataclass(frozen=True)
class Batch:
    """What one update learns from.

    Attributes:
        answers: N prompts with K answers.
        reference: float [N, K], their log-probabilities under the reference; zeros where no loss needs one.
        desirable: bool [N], of single answers; None for pairs. A second answer is then one that belongs to another
            prompt.
        sampler: float [N, 2, L], the log-probabilities that the sampler drew with, where it drew from what is trained.
    """

    answers: AnswerBatch
    reference: Tensor
    desirable: Tensor | None = None
    sampler: Tensor | None = None

    @property
    def trained(self) -> AnswerBatch:
        """The answers whose likelihood is changed."""
        return self.answers if self.desirable is None else self.answers.only(0)


class DPO(OnlineTrainer):
    """Trains a causal language model on pairs of answers, on single answers with labels, or on its own judged answers.

        DPO("smollm2-135m-instruct", "preferences.jsonl", config=DPOConfig(steps=60)).train()

    Args:
        model: a name (see `DPOConfig.model`) or a model object, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts with the columns of `DPOConfig.dataset`.
        rewards: names or functions; with them the pairs are sampled.
        config: settings; what is given here as an object stands in place of its setting there.
        reference: a name or a model object; by default the weights that training starts from.
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        callbacks: called with every record: each step's, and that of an evaluation before the first.
    """

    algorithm = "dpo"
    config_class = DPOConfig
    headline = HEADLINE
    takes = ("model", "dataset", "rewards", "reference", "eval_dataset", "tokenizer")
    config: DPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        rewards: RewardFunction | Sequence[RewardFunction] = (),
        config: DPOConfig | None = None,
        *,
        reference: str | PreTrainedModel | None = None,
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.start(
            config,
            callbacks,
            model=model,
            dataset=dataset,
            rewards=rewards,
            reference=reference,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
        )

    def set_up(self, dtype: torch.dtype | None) -> None:
        config = self.config
        check_losses(config)
        self.online = bool(self.given("rewards"))
        if not self.online:
            self.memory_settings = "tokens_per_part (or prompts_per_step)"
        self._refuse_unread()
        if self.online and config.unpaired:
            raise InputError(
                f"rewards make pairs, but {config.loss_type[0]} takes single answers: give only one of them"
            )
        if self.given("reference") is not None and not config.needs_reference:
            raise InputError(f"a reference is given, but {', '.join(config.loss_type)} needs none: leave it out")
        if self.online:
            self.load_prompts()
        else:
            self._read_answers()
        self.count_steps(len(self.prompts if self.online else self.train_answers), config.prompts_per_step)
        # What the reference says is known before the first update, or asked for at each step.
        live, other = self.online or not config.cache_reference, self.given("reference")
        keep = config.needs_reference and live and other is None
        self.load_policy(dtype, keep_reference=keep, samples=self.online)
        if self.online:
            self.settle_judges()
        self.reference: Reference | NoReference = NoReference(self.dtype)
        if config.needs_reference:
            self.reference = Reference(
                self.policy, other, forward=self._logprobs, live=live, circumstances=self._circumstances()
            )
        self.shift = RewardShift()
        self.state = {"optimizer": self.optimizer}
        if config.reward_shift == "running":
            self.state["reward_shift"] = self.shift

    def _refuse_unread(self) -> None:
        """Refuse settings of the other way of running, online or not."""
        sampled = "answers that are sampled and judged (rewards)"
        why = f"is not for {sampled}" if self.online else f"is for {sampled}, and none are given"
        refuse_unread(self.config, OFFLINE_ONLY if self.online else ONLINE_ONLY, f"it {why}")

    def kept_weights(self) -> Iterator[Tensor]:
        """Those of a reference that is asked at each step, too."""
        yield from super().kept_weights()
        yield from self.reference.weights()

    def restore(self) -> None:
        """Put back what the checkpoint holds. The starting weights are asked before, if they are the reference."""
        if self.run.step:
            self._know_reference()
        super().restore()

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        config = self.config
        self._know_reference()
        with self.begin() as run:
            self.fall_watch = FallWatch()
            for record in run.records():  # of the steps before a resume
                self.fall_watch.warning(record)
            for step in run.steps():
                batch, figures = self._sampled(step) if self.online else (self._given(step), {})
                with step.phase("update", "updating"):
                    figures |= self._update(batch, step.number)
                self.note_updates(step, figures)
                figures["epoch"] = step.number * config.prompts_per_step / self.order.count
                seconds = sum(step.times.values())
                if self.online:  # of what was sampled
                    sampled = figures["sampling/tokens_per_second"] * step.times["time/sample"]
                    figures["tokens_per_second"] = sampled / seconds
                elif batch:
                    figures["tokens_per_second"] = batch.trained.token_count / seconds
                if batch and (warning := self.fall_watch.warning(figures)):
                    run.view.note(f"step {step.number}: {warning}")
                yield self.finish(step, figures)

    def _given(self, step: Step) -> Batch:
        """The rows of a step, with what the reference says of them."""
        with step.phase("reference", "asking the reference"):
            return self._batch(self.train_answers, self.prompts_of(step.number))

    def _sampled(self, step: Step) -> tuple[Batch | None, Record]:
        """The policy's own answers, the best of a prompt against its worst; None where none of them differ."""
        config = self.config
        samples = self.collect(step)
        rollout, totals = samples.rollout, samples.totals
        rewards = totals - config.missing_eos_penalty * rollout.truncated.cpu().double().reshape(totals.shape)
        pairs = best_and_worst(rewards.numpy())
        signs = torch.zeros(rewards.shape)  # which answers are raised and which lowered, for samples.jsonl
        for prompt, (best, worst) in pairs.items():
            signs[prompt, best], signs[prompt, worst] = 1, -1
        self.log_completions(step, samples, signs.flatten())
        figures = {**samples.figures(rewards, step.times), "pairs": len(pairs)}
        if not pairs:
            return None, figures
        chosen = [[prompt * config.group_size + place for place in pair] for prompt, pair in pairs.items()]
        tokens = [[rollout.completions[row].tokens for row in pair] for pair in chosen]
        answers = AnswerBatch.of([rollout.prompts[prompt] for prompt in pairs], tokens, self.device)
        drawn = None
        if config.temperature == 1:
            rows = torch.tensor(chosen, device=self.device)
            drawn = rollout.sampler_logprobs[rows, : answers.tokens.shape[2]]
        with step.phase("reference", "asking the reference"):
            return Batch(answers, self.reference.sampled(answers), sampler=drawn), figures

    def _update(self, batch: Batch | None, step: int) -> Record:
        """One optimiser update on the mean loss of the batch; without a batch the gradient is 0."""
        rate = learning_rate(step, self.config)
        tally, figures = Tally(), {}
        with self.optimizer.update(rate) as backward:
            if batch:
                parts = list(self._parts(batch.trained))
                objective = self._objective(batch, self._first_pass(batch, len(parts)))
                logprobs = torch.zeros_like(batch.reference[:, : batch.trained.count])
                for part in parts:
                    weight = self.config.excess_weight
                    current, of_tokens, entropies = part_logprobs(self.policy.model, part, excess_weight=weight)
                    logprobs[part.rows] = current.detach()
                    tally.add(part.mask, {"entropy": entropies})
                    if batch.sampler is not None:
                        drawn = batch.sampler[part.rows, :, : of_tokens.shape[2]]
                        tally.add(part.mask, {"sampling/logp_difference_mean": (of_tokens - drawn).abs()})
                    backward(objective(part.rows, current))
                figures = self._figures(batch, objective, logprobs)
        tally.updates.append(backward)
        return {**tally.figures(), **figures, "learning_rate": rate}

    def _first_pass(self, batch: Batch, parts: int) -> Tensor | None:
        """The log-probabilities [N, 2] of the whole batch, where its loss must know them before a part runs."""
        running = self.config.reward_shift == "running"
        if not running and not (sorts_the_batch(self.config) and parts > 1):
            return None
        whole = self._logprobs(self.policy.model, batch.answers)
        if running:
            rewards = answer_rewards(self.config, whole, batch.reference, batch.answers.lengths)
            if rewards.isfinite().all():  # else the update is not taken either
                self.shift.update(rewards)
        return whole

    def _objective(self, batch: Batch, whole: Tensor | None = None) -> PairLoss | UnpairedLoss:
        """The mean loss of a batch, with what every part of it must know of the others."""
        if batch.desirable is None:
            lengths = batch.answers.lengths
            return PairLoss(self.config, batch.reference, lengths, whole=whole, reward_shift=self.shift.mean)
        baseline = 0.0
        if batch.answers.count > 1:  # KTO: answers to other prompts
            mismatched = self._logprobs(self.policy.model, batch.answers.only(1))
            baseline = kl_baseline(mismatched[:, 0], batch.reference[:, 1])
        return UnpairedLoss(self.config, batch.reference[:, :1], batch.desirable, baseline)

    def _figures(self, batch: Batch, objective: PairLoss | UnpairedLoss, logprobs: Tensor) -> Record:
        """Metrics of a batch whose trained answers have these log-probabilities."""
        reference = batch.reference[:, : logprobs.shape[1]]
        rewards = answer_rewards(self.config, logprobs, reference, batch.trained.lengths)
        if isinstance(objective, PairLoss):
            return pair_figures(rewards, logprobs)
        assert batch.desirable is not None
        return unpaired_figures(rewards, logprobs, batch.desirable) | {"kl": objective.kl_baseline}

    def _parts(self, answers: AnswerBatch) -> Iterator[AnswerPart]:
        return answers.parts(self.config.tokens_per_part, share_prompts=self.shares_prompts())

    def _logprobs(self, model: Any, answers: AnswerBatch) -> Tensor:
        """Log-probabilities [N, K] under a model, without gradient."""
        config = self.config
        found = batch_logprobs(
            model,
            answers,
            config.tokens_per_part,
            share_prompts=self.shares_prompts(),
            excess_weight=config.excess_weight,
        )
        return found.to(self.dtype)

    def _read_answers(self) -> None:
        """Training and held-out rows of a data set of preferences."""
        config, run = self.config, self.run
        form: Form = "label" if config.unpaired else "pairs"
        self.reader = PreferenceReader.of(config, self.tokenizer, self.outline(), form, two_labels=config.unpaired)
        train, held_out = train_and_held_out_preferences(
            self.reader,
            self.given("dataset"),
            self.given("eval_dataset"),
            config.eval_rows,
            config.seed,
            run.view.note,
        )
        repeat_data(run, train.fingerprint() + held_out.fingerprint())
        self.train_answers = self._answers_of(train)
        self.held_out = self.held_out_answers = self._answers_of(held_out, others=train)
        self.note_nothing_held_out()
        self.order = PromptOrder(len(self.train_answers), config.seed)

    def _answers_of(self, rows: Preferences, others: Preferences | None = None) -> GivenAnswers:
        """What the loss takes; of single answers `others` are compared with where `rows` have one prompt only."""
        if not self.config.unpaired:
            return GivenAnswers.pairs(rows)
        kto = "kto" in self.config.loss_type
        return GivenAnswers.single(rows, mismatched=kto, others=others, longest=self.reader.longest)

    def _batch(self, answers: GivenAnswers, rows: Sequence[int]) -> Batch:
        batch = answers.take(rows, self.device)
        reference = self.reference.given(answers, rows, batch)
        if not answers.desirable:
            return Batch(batch, reference)
        return Batch(batch, reference, torch.tensor([answers.desirable[row] for row in rows], device=self.device))

    def _know_reference(self) -> None:
        """Ask the reference about all rows that the run will take, while the policy still has its starting weights."""
        if self.online:
            return
        with out_of_memory_names(self.memory_settings):
            if self.can_evaluate():
                rows = range(len(self.held_out_answers))
                self.reference.know(self.held_out_answers, [rows], self.device, self.run.view.note)
            steps = (self.prompts_of(step) for step in range(1, self.config.steps + 1))
            self.reference.know(self.train_answers, steps, self.device, self.run.view.note)
        repeat_kept(self.run, "reference", self.reference.hash)

    def _circumstances(self) -> list[Any]:
        """How log-probabilities are weighed, and what their rounding depends on; the reference's are kept by it."""
        config = self.config
        batches = config.seed, config.prompts_per_step, config.tokens_per_part, config.gradient_checkpointing
        machine = torch.__version__, transformers.__version__, str(self.device), torch.get_num_threads()
        gpu = [torch.cuda.get_device_name(self.device)] if self.device.type == "cuda" else []
        attention = self.policy.model.config._attn_implementation
        together = WORTH_A_TREE, WIDEST_TREE
        return [config.excess_weight, *batches, config.compile_layers, attention, *together, *machine, *gpu]

    def evaluation(self, step: int) -> Evaluation:
        """The figures of training on the held-out rows; online, rewards of greedy answers."""
        if self.online:
            return super().evaluation(step)
        rows = range(len(self.held_out_answers))
        self.reference.know(self.held_out_answers, [rows], self.device, self.run.view.note)
        self.run.view.status("evaluating on held-out rows")
        batch = self._batch(self.held_out_answers, rows)
        logprobs = self._logprobs(self.policy.model, batch.trained)
        objective = self._objective(batch)
        loss = float(objective(torch.arange(len(rows), device=self.device), logprobs))
        figures = self._figures(batch, objective, logprobs) | {"loss": loss}
        return Evaluation({f"eval/{name}": value for name, value in figures.items()})


def best_and_worst(rewards: np.ndarray) -> dict[int, tuple[int, int]]:
    """By prompt, the places of its best and its worst answer; prompts with less than two different rewards have none.

    Args:
        rewards: float [P, G], NaN where an answer was not judged; the first of equal ones is taken.
    """
    found = {}
    for prompt, group in enumerate(rewards):
        judged = group[~np.isnan(group)]
        if len(judged) and judged.max() > judged.min():
            found[prompt] = int(np.nanargmax(group)), int(np.nanargmin(group))
    return found
