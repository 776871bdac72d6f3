"""GRPO: group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

Read `steps` first: it is the algorithm. The mathematics is called from `taurl.functional`.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.functional.advantages import group_relative, has_variance
from taurl.functional.aggregation import token_weights, weighted_sum
from taurl.functional.importance import sequence_ratios, token_ratios, truncated_weights
from taurl.functional.kl import k3
from taurl.functional.surrogates import clip_indicators, clipped_surrogate
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.llm.datasets import PromptOrder, columns_of
from taurl.llm.evaluation import TrainerState, describe, evaluate, reward_metrics, score
from taurl.llm.generation import Sampling
from taurl.llm.likelihood import completion_logprobs
from taurl.llm.policies import Policy
from taurl.llm.rewards import RewardSet, Scores
from taurl.llm.rollouts import Part, Rollout
from taurl.llm.tasks import PromptReader, Prompts, train_and_held_out
from taurl.runtime.config import read_config
from taurl.runtime.errors import InputError
from taurl.runtime.machine import (
    choose_device,
    choose_precision,
    out_of_memory_names,
    peak_memory_gb,
    set_threads,
)
from taurl.runtime.optimization import Optimizer, learning_rate
from taurl.runtime.run import Callback, Record, Run, Step
from taurl.runtime.seeding import seed_everything

RewardFunction = str | Callable[..., Any]

HEADLINE = {
    "reward": "reward",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "tokens/s": "tokens_per_second",
}


class GRPO:
    """Trains a causal language model on prompts and reward functions.

        GRPO("smollm2-135m-instruct", rows, [reward], GRPOConfig(steps=60)).train()

    Args:
        model: a name (see `GRPOConfig.model`) or a model object, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts with a `prompt`.
        rewards: names or functions.
        config: settings; what is given here as an object stands in place of its setting there.
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        callbacks: called with each step's record.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        rewards: Sequence[RewardFunction] = (),
        config: GRPOConfig | None = None,
        *,
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        given = {"model": model, "dataset": dataset, "rewards": tuple(rewards) or None, "eval_dataset": eval_dataset}
        config, objects = with_given(config or GRPOConfig(), given)
        run = Run.start(config, algorithm="grpo", headline=HEADLINE)
        run.environment["given_from_python"] = sorted(objects)
        self._set_up(run, objects, tokenizer, callbacks)

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        config: GRPOConfig | None = None,
        *,
        model: PreTrainedModel | None = None,
        dataset: object = None,
        rewards: Sequence[RewardFunction] = (),
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Self:
        """Go on with a run. What it was given from Python as objects must be given again, the model untrained.

        Args:
            config: changed settings, by default those of the run.
        """
        directory = Path(directory)
        config = config or read_config(directory, GRPOConfig)
        run = Run.resume(directory, config, headline=HEADLINE)
        given = {"model": model, "dataset": dataset, "rewards": tuple(rewards) or None, "eval_dataset": eval_dataset}
        objects = {name: value for name, value in given.items() if value is not None}
        for name in run.environment.get("given_from_python", []):
            if name not in objects:
                raise InputError(f"{directory}: its {name} came from Python as an object; resume from Python with it")
        trainer = cls.__new__(cls)
        trainer._set_up(run, objects, tokenizer, callbacks)
        return trainer

    def _set_up(
        self,
        run: Run,
        objects: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        callbacks: Sequence[Callback],
    ) -> None:
        config = run.config
        assert isinstance(config, GRPOConfig)
        self.run, self.config, run.callbacks = run, config, callbacks
        model = objects.get("model", config.model)
        if model is None:
            raise InputError("no model given: name one with model (for example smollm2-135m-instruct)")
        self.rewards = RewardSet(
            objects.get("rewards", config.rewards),
            config.reward_weights,
            timeout=config.reward_timeout,
            worker_process=config.reward_process,
        )
        self.device = choose_device(config.device)
        self._choose(model)
        seed_everything(config.seed)
        self.policy = Policy(
            model,
            tokenizer,
            dtype=getattr(torch, run.chosen["precision"]) if run.chosen["precision"] else None,
            device=self.device,
            lora=(config.lora_rank, config.lora_alpha, config.lora_targets),
            keep_reference=config.kl_coefficient > 0,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.train_prompts, self.held_out, dropped = train_and_held_out(
            self._reader(),
            objects.get("dataset", config.dataset),
            objects.get("eval_dataset", config.eval_dataset),
            config.eval_rows,
            config.seed,
        )
        if dropped:
            run.view.note(f"{dropped} training rows left out: their prompts are among the held-out ones")
        self.rewards.check_columns(columns_of(self.train_prompts.rows))
        self.order = PromptOrder(len(self.train_prompts), config.seed)
        self.generator = self.policy.generator(config.generator, config.slots)
        self.optimizer = Optimizer(self.policy.model.named_parameters(), config)

    def _choose(self, model: str | PreTrainedModel) -> None:
        """Threads and precision: what the run chose where it began, so that resuming repeats it."""
        chosen = self.run.chosen
        chosen["threads"] = set_threads(self.config.threads or chosen.get("threads"))
        if "precision" not in chosen:
            keep = self.config.precision == "auto" and not isinstance(model, str)  # an object's dtype is its owner's
            dtype = None if keep else choose_precision(self.config.precision, self.device)
            chosen["precision"] = str(dtype).removeprefix("torch.") if dtype else ""
        chosen["device"] = str(self.device)

    def _reader(self) -> PromptReader:
        config = self.config
        return PromptReader(
            tokenizer=self.policy.tokenizer,
            context=self.policy.model.config.get_text_config().max_position_embeddings,
            max_tokens=config.max_tokens,
            arguments=config.dataset_args,
            columns=config.columns,
            answer_after=config.answer_after,
            system_prompt=config.system_prompt,
            prompt_format=config.prompt_format,
            chat_template_kwargs=config.chat_template_kwargs,
        )

    def train(self) -> Self:
        """Run all steps that are left, and export the result to `final/`."""
        for _ in self.steps():
            pass
        return self

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        config, run = self.config, self.run
        run.begin(optimizer=self.optimizer)
        steps = run.steps()
        with out_of_memory_names("tokens_per_part or slots (or max_tokens, group_size, prompts_per_step)"):
            if run.step == 0 and len(self.held_out):
                run.log({"step": 0, **self.evaluate()})
            for step in steps:
                state = TrainerState(step.number - 1, config.steps)
                batch = self.train_prompts.take(self._next_rows(step.number))
                with step.phase("sample", f"sampling {len(batch)} prompts × {config.group_size}"):
                    rollout = self._sample(batch, step.number)
                with step.phase("reward", "scoring"):
                    rows = [row for row in batch.rows for _ in range(config.group_size)]
                    scores = score(rows, rollout.completions, self.policy.tokenizer, self.rewards, state)
                rewards = torch.from_numpy(scores.total).reshape(len(batch), config.group_size)
                rollout.advantages = group_relative(rewards, scale=config.scale_rewards).flatten().float()
                rollout.advantages = rollout.advantages.to(self.device)
                self._mask_out(rollout, scores)
                with step.phase("update", "updating"):
                    figures = self._update(rollout, rewards, step.number)
                self._log_samples(step, rows, rollout, scores)
                figures |= reward_metrics(self.rewards.names, scores) | self._describe(rollout, rewards, step)
                if len(self.held_out) and self._evaluation_due(step.number):
                    figures |= self.evaluate(step.number)
                if step.number == config.steps:
                    self._export_final()
                yield step.finish(**figures)

    def _next_rows(self, step: int) -> list[int]:
        count = self.config.prompts_per_step
        return self.order.take((step - 1) * count, count)

    def _sample(self, batch: Prompts, step: int) -> Rollout:
        config = self.config
        sampling = Sampling(config.max_tokens, temperature=config.temperature, stop=config.stop)
        key = (config.seed, step)
        groups = self.generator.generate(batch.ids, config.group_size, sampling, key=key)
        return Rollout.of(batch.ids, groups, self.device)

    def _mask_out(self, rollout: Rollout, scores: Scores) -> None:
        """Leave completions out that no reward applies to, and by option those that hit the limit."""
        out = np.isnan(scores.total)
        if self.config.mask_truncated:
            out |= np.array([completion.finish == "length" for completion in rollout.completions])
        rollout.mask[torch.from_numpy(out).to(self.device)] = False

    def _update(self, rollout: Rollout, rewards: Tensor, step: int) -> Record:
        """One optimiser update a minibatch and epoch. Every denominator is taken before a part runs (promise 1)."""
        config = self.config
        everything = list(range(len(rollout.completions)))
        if config.epochs * config.minibatches > 1:
            rollout.old_logprobs = self._logprobs(rollout, everything)
        if config.kl_coefficient > 0:
            with self.policy.reference() as reference:
                rollout.reference_logprobs = self._logprobs(rollout, everything, reference)
        signal = has_variance(rewards).repeat_interleave(config.group_size).tolist()
        if config.kl_coefficient > 0 or config.entropy_coefficient > 0:
            signal = [True] * len(signal)
        tally = Tally()
        rate = learning_rate(step, config)
        for epoch in range(config.epochs):
            for rows in rollout.minibatches(config.minibatches, key=(config.seed, step, epoch)):
                weights = torch.zeros(rollout.mask.shape, device=self.device)
                length = config.max_tokens if config.aggregation == "constant" else None
                weights[rows] = token_weights(rollout.mask[rows], config.aggregation, length=length)
                with self.optimizer.update(rate) as backward:
                    for part in rollout.parts([row for row in rows if signal[row]], config.tokens_per_part):
                        backward(self._loss(rollout, part, weights, tally))
                tally.add_update(backward.loss, backward.grad_norm, backward.taken)
        return {**tally.metrics(), "learning_rate": rate}

    def _loss(self, rollout: Rollout, part: Part, weights: Tensor, tally: "Tally") -> Tensor:
        """The part's share of the loss: clipped surrogate, corrected for the sampler, with KL and entropy terms."""
        config, mask = self.config, part.of(rollout.mask)
        logprobs, entropies = completion_logprobs(
            self.policy.model,
            part.prompts,
            part.prompt_of,
            part.of(rollout.tokens),
            mask,
            temperature=config.temperature,
        )
        # On a single update the old log-probabilities are the current ones, and the ratio is exactly 1.
        old = logprobs.detach() if rollout.old_logprobs is None else part.of(rollout.old_logprobs)
        sampler = part.of(rollout.sampler_logprobs)
        ratios = token_ratios(logprobs, old) if config.ratio == "token" else sequence_ratios(logprobs, old, mask)
        advantages = part.of(rollout.advantages)[:, None]
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        losses = clipped_surrogate(ratios, advantages, **clip)
        if config.importance_cap is not None:
            losses = losses * truncated_weights(old, sampler, config.importance_cap)
        if rollout.reference_logprobs is not None:
            divergence = k3(logprobs, part.of(rollout.reference_logprobs))
            losses = losses + config.kl_coefficient * divergence
            tally.add("kl", divergence, mask)
        if config.entropy_coefficient > 0:
            losses = losses - config.entropy_coefficient * entropies
        low, high = clip_indicators(ratios, advantages, **clip)
        tally.add("entropy", entropies, mask)
        tally.add("clip_ratio/low_mean", low, mask)
        tally.add("clip_ratio/high_mean", high, mask)
        tally.add("sampling/logp_difference_mean", (old - sampler).abs(), mask)
        return weighted_sum(losses, part.of(weights))

    @torch.no_grad()
    def _logprobs(self, rollout: Rollout, rows: Sequence[int], model: Any = None) -> Tensor:
        """Log-probabilities [N, L] of all rows, without gradient, under the policy or another model."""
        found = torch.zeros(rollout.mask.shape, device=self.device)
        for part in rollout.parts(rows, self.config.tokens_per_part):
            logprobs, _ = completion_logprobs(
                model or self.policy.model,
                part.prompts,
                part.prompt_of,
                part.of(rollout.tokens),
                part.of(rollout.mask),
                temperature=self.config.temperature,
            )
            found[part.rows, : part.length] = logprobs.float()
        return found

    def _describe(self, rollout: Rollout, rewards: Tensor, step: Step) -> Record:
        lengths = [len(completion.tokens) for completion in rollout.completions]
        spread = torch.where(rewards.isnan(), torch.nan, rewards)
        return {
            "reward_std": float(np.nanstd(spread.numpy(), axis=1, ddof=1).mean()),
            "frac_reward_zero_std": 1 - float(has_variance(rewards).float().mean()),
            "completions/mean_length": float(np.mean(lengths)),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": float(np.mean([c.finish == "length" for c in rollout.completions])),
            "sampling/tokens_per_second": sum(lengths) / step.times["time/sample"],
            "tokens_per_second": sum(lengths) / sum(step.times.values()),
            "memory/peak_gb": peak_memory_gb(self.device),
        }

    def _log_samples(self, step: Step, rows: Sequence[Record], rollout: Rollout, scores: Scores) -> None:
        """Keep some completions, from the start of the batch in whole groups."""
        described = describe(rows, rollout.completions, self.policy.tokenizer, self.rewards.names, scores)
        indices = self._next_rows(step.number)
        samples = [
            {
                "step": step.number,
                "kind": "train",
                "row": indices[row // self.config.group_size],
                **sample,
                "advantage": float(rollout.advantages[row]),
            }
            for row, sample in enumerate(described[: self.config.samples_per_step])
        ]
        self.run.log_samples(samples)
        if described:
            shown = described[step.number % len(described)]
            self.run.view.sample(
                f"step {step.number}, reward {shown['reward']:.3g}", f"{shown['prompt']}\n→ {shown['completion']}"
            )

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.config.steps or bool(every and step % every == 0)

    def evaluate(self, step: int = 0) -> Record:
        """Greedy scores on the held-out rows, by `eval/…` names; the answers go to samples.jsonl."""
        view = self.run.view

        def progress(done: int, count: int) -> None:
            view.status(f"evaluating on held-out rows: {done} of {count}")

        sampling = Sampling(self.config.max_tokens, temperature=0, stop=self.config.stop)
        state = TrainerState(step, self.config.steps)
        found = evaluate(
            self.generator,
            self.policy.tokenizer,
            self.held_out.rows,
            self.held_out.ids,
            self.rewards,
            sampling,
            state=state,
            progress=progress,
        )
        self.run.log_samples(found.samples)
        return dict(found.metrics)

    def export(self, directory: str | Path) -> None:
        """Write model and tokenizer to a folder that `transformers` loads."""
        self.policy.export(Path(directory))

    def _export_final(self) -> None:
        final = self.run.directory / "final"
        partial = final.with_name(".final.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.export(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


class Tally:
    """Means over tokens of what the parts of a step report, and what its updates did."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.updates: list[tuple[float, float, bool]] = []

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach()[mask].double().sum())
        self.counts[name] = self.counts.get(name, 0) + int(mask.sum())

    def add_update(self, loss: float, grad_norm: float, taken: bool) -> None:
        self.updates.append((loss, grad_norm, taken))

    def metrics(self) -> Record:
        losses, norms, taken = zip(*self.updates, strict=True)
        means = {name: total / max(1, self.counts[name]) for name, total in self.sums.items()}
        return {
            "loss": float(np.mean(losses)),
            "grad_norm": float(np.mean(norms)),
            "updates_skipped": len(taken) - sum(taken),
            **means,
        }


def with_given(config: GRPOConfig, given: dict[str, Any]) -> tuple[GRPOConfig, dict[str, Any]]:
    """Put names given as arguments into the config, and return what was given as objects apart."""
    names: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        is_name = all(isinstance(item, str) for item in value) if name == "rewards" else isinstance(value, str)
        (names if is_name else objects)[name] = value
    return config.model_copy(update=names), objects
