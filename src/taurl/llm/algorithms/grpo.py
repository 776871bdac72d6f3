"""GRPO: group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

`steps`, `_update` and `_loss` are the algorithm, in this order; its mathematics is called from `taurl.functional`.
P prompts with G completions each make N = P · G rows of at most L tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.functional.advantages import group_relative, has_variance
from taurl.functional.aggregation import weighted_sum
from taurl.functional.kl import k3, kl_loss, kl_penalty, kl_ratios
from taurl.functional.loss_types import clipped_tokens, loss_weights, policy_loss
from taurl.llm.algorithms.figures import Tally
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.llm.algorithms.online import RatioTrainer, RewardFunction, Samples
from taurl.llm.scoring.rollouts import Part, Rollout
from taurl.runtime.errors import InputError, shorten
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Callback, Record


class GRPO(RatioTrainer):
    """Trains a causal language model on prompts and reward functions.

        GRPO("smollm2-135m-instruct", rows, [reward], GRPOConfig(steps=60)).train()

    Args:
        model: a name (see `GRPOConfig.model`) or a model object, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts with a `prompt`.
        rewards: names or functions.
        config: settings; what is given here as an object stands in place of its setting there.
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        callbacks: called with every record: each step's, and that of an evaluation before the first.
    """

    algorithm = "grpo"
    config_class = GRPOConfig
    takes = ("model", "dataset", "rewards", "eval_dataset", "tokenizer")
    config: GRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        rewards: RewardFunction | Sequence[RewardFunction] = (),
        config: GRPOConfig | None = None,
        *,
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
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
        )

    def set_up(self, dtype: torch.dtype | None) -> None:
        self.load_prompts()
        self.load_policy(dtype, keep_reference=self.config.kl_coefficient > 0)
        self.settle_judges()
        self.state = {"optimizer": self.optimizer}

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        config = self.config
        with self.begin() as run:
            for step in run.steps():
                samples = self.collect(step)
                rollout, rewards = samples.rollout, samples.totals
                if config.scale_rewards == "mean":
                    require_no_negative(samples, step.number)
                advantages = group_relative(rewards, scale=config.scale_rewards)
                rollout.advantages = advantages.flatten().to(self.device, self.dtype)
                rollout.mask[rewards.flatten().isnan().to(self.device)] = False  # no reward applies
                if config.mask_truncated:
                    rollout.mask[rollout.truncated] = False
                with step.phase("update", "updating"):
                    figures = self._update(rollout, has_variance(rewards), step.number)
                self.note_updates(step, figures)
                self.log_completions(step, samples, rollout.advantages)
                yield self.finish(step, samples.figures(rewards, step.times) | figures)

    def _update(self, rollout: Rollout, has_signal: Tensor, step: int) -> Record:
        """One optimiser update for each minibatch of each epoch.

        A group whose rewards do not differ (`has_signal`, bool [P]) has no policy gradient and is not forwarded, but
        keeps its share of the denominators, which are taken before a part runs (promise 1).
        """
        config = self.config
        if config.kl_coefficient > 0 or config.entropy_coefficient > 0:
            has_signal = torch.ones_like(has_signal)
        forwarded = has_signal.repeat_interleave(config.group_size).nonzero().flatten().tolist()
        minibatches = [rows for epoch in range(config.epochs) for rows in self.minibatches(rollout, step, epoch)]
        later = set(forwarded) - set(minibatches[0])
        if config.loss_type == "vespo" and not (config.kl_coefficient and config.kl_place == "weighted_loss"):
            later = set()  # it weighs against the sampler's
        rollout.old_logprobs = self.compared_with(rollout, later)
        if config.kl_coefficient > 0:
            with self.policy.reference() as reference:
                rollout.reference_logprobs = self.logprobs(rollout, forwarded, reference)
        rate = learning_rate(step, config)
        tally = Tally()
        for rows in minibatches:
            weights = torch.zeros_like(rollout.mask, dtype=self.dtype)
            weights[rows] = loss_weights(
                config.loss_type, rollout.mask[rows], max_tokens=config.max_tokens, dtype=self.dtype
            )
            with self.optimizer.update(rate) as backward:
                for part in self.parts(rollout, sorted(set(rows) & set(forwarded))):
                    backward(self._loss(rollout, part, part.of(weights), tally))
            tally.updates.append(backward)
        return {**tally.figures(), "learning_rate": rate}

    def _loss(self, rollout: Rollout, part: Part, weights: Tensor, tally: Tally) -> Tensor:
        """The part's share of the loss: surrogate, corrected for the sampler, with KL and entropy terms."""
        config, mask = self.config, part.of(rollout.mask)
        logprobs, entropies = self.forward(rollout, part, self.policy.model)
        old = self.first_seen(rollout, part, logprobs, tally)
        penalties, divergences = self._divergence(logprobs, old, rollout, part, tally)
        advantages = part.of(rollout.advantages)[:, None] - penalties
        # vespo weighs whole trajectories against the sampler itself, so that nothing is left to correct.
        vespo = config.loss_type == "vespo"
        before = part.of(rollout.sampler_logprobs) if vespo else old
        given = (config.loss_type, logprobs, before, advantages, mask)
        level, clip_low, clip_high = config.ratio_level, config.clip_low, config.clip_high
        losses = policy_loss(*given, ratio_level=level, clip_low=clip_low, clip_high=clip_high)
        losses = (losses if vespo else self.corrected(losses, old, rollout, part)) + divergences
        if config.entropy_coefficient > 0:
            losses = losses - config.entropy_coefficient * entropies
        low, high = clipped_tokens(*given, ratio_level=level, clip_low=clip_low, clip_high=clip_high)
        tally.add(mask, {"entropy": entropies, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high})
        return weighted_sum(losses, weights)

    def _divergence(
        self, logprobs: Tensor, old: Tensor, rollout: Rollout, part: Part, tally: Tally
    ) -> tuple[Tensor, Tensor]:
        """β times the divergence from the reference, [n, l] each: subtracted from advantages, and added to losses."""
        nothing = torch.zeros_like(logprobs)
        if rollout.reference_logprobs is None:
            return nothing, nothing
        config, mask, reference = self.config, part.of(rollout.mask), part.of(rollout.reference_logprobs)
        beta, estimator, level = config.kl_coefficient, config.kl_estimator, config.kl_level
        tally.add(mask, {"kl": k3(logprobs, reference)})
        if config.kl_place == "reward":
            return beta * kl_penalty(logprobs, reference, mask, estimator=estimator, level=level), nothing
        ratios = kl_ratios(logprobs, old, mask, level=level) if config.kl_place == "weighted_loss" else None
        return nothing, beta * kl_loss(logprobs, reference, mask, estimator=estimator, level=level, ratios=ratios)


def require_no_negative(samples: Samples, step: int) -> None:
    """Raises: InputError, with the first prompt that has one, for negative rewards: a mean must not change sign."""
    for row, total in zip(samples.rows, samples.totals.flatten().tolist(), strict=True):
        if total < 0:
            raise InputError(
                f"scale_rewards is mean, but in step {step} a completion of {shorten(str(row['prompt']), 80)!r} has "
                f"the reward {total:g}, expected 0 or more, best 0 or 1; set scale_rewards to group, batch or none"
            )
