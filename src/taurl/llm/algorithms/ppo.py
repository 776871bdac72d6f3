"""RLHF with PPO (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022).

`steps`, `_estimate`, `_update` and the two losses are the algorithm, in this order; its mathematics is called from
`taurl.functional`. A token is an action, its prompt and what came before it the state: N completions, of at most L
tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.functional.aggregation import token_weights, weighted_sum
from taurl.functional.kl import k3, kl_loss
from taurl.functional.loss_types import clipped_tokens, policy_loss
from taurl.functional.token_returns import token_generalized_advantage
from taurl.functional.value_losses import clipped_value_loss, explained_variance, squared_value_loss
from taurl.llm.algorithms.collecting import Collected, collect_completions, collect_episodes, make_stage, play_held_out
from taurl.llm.algorithms.figures import Tally
from taurl.llm.algorithms.online import HEADLINE, RatioTrainer, RewardFunction
from taurl.llm.algorithms.ppo_config import ENVIRONMENT_ALONE, PPOConfig, refuse_unread_by_ppo
from taurl.llm.algorithms.ppo_estimates import Estimates, kl_figures, kl_prices, settled_rewards, whitened
from taurl.llm.algorithms.ppo_state import Controls
from taurl.llm.algorithms.setup import loading_model
from taurl.llm.data.tasks import held_out_count
from taurl.llm.episodes import MakeEnvironment
from taurl.llm.evaluation import Evaluation
from taurl.llm.models.critics import make_critic
from taurl.llm.models.loading import resolve_model
from taurl.llm.models.others import check_critic, check_reference
from taurl.llm.pictures.token_pictures import ratio_picture, token_picture
from taurl.llm.rewards.specs import load_callable
from taurl.llm.scoring.likelihood import completion_hidden, hidden_logprobs
from taurl.llm.scoring.rollouts import Part, Rollout
from taurl.runtime.errors import InputError
from taurl.runtime.optimization import Optimizer, Update, learning_rate
from taurl.runtime.run import Callback, Record
from taurl.runtime.step import Step

NAMED_CRITICS = ("copy", "head", "none")  # critics that are no model to start from


@dataclass
class Minibatch:
    """Rows of one update.

    Attributes:
        weights: float [N, L], what each token's loss counts; 0 for the rows of other minibatches.
        tally: figures of all updates of the step.
        ratios: importance ratios of this epoch's tokens, part by part.
        moved: mean divergence of a token from the policy that sampled, as far as it is summed up.
    """

    rollout: Rollout
    estimates: Estimates
    weights: Tensor
    tally: Tally
    ratios: list[Tensor]
    moved: float | Tensor = 0.0


class PPO(RatioTrainer):
    """Trains a causal language model on rewards with a critic, near a reference.

        PPO("smollm2-135m-instruct", rows, [reward], PPOConfig(steps=60)).train()

    Args:
        model: a name (see `PPOConfig.model`) or a model object, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts with a `prompt`.
        rewards: names or functions.
        config: settings; what is given here as an object stands in place of its setting there.
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        critic, reference: see `PPOConfig`; a name, or a model object.
        environment: in place of dataset and rewards: a name, or what makes an `episodes.Environment` from a seed.
        callbacks: called with every record: each step's, and that of an evaluation before the first.
    """

    algorithm = "ppo"
    merges = False  # updates take hidden states, which a critic may share
    config_class = PPOConfig
    headline: ClassVar[Mapping[str, str]] = {
        **HEADLINE,
        "kl/completion": "kl_per_completion",
        "explained": "value/explained_variance",
    }
    takes = ("model", "dataset", "rewards", "eval_dataset", "tokenizer", "critic", "reference", "environment")
    config: PPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        rewards: RewardFunction | Sequence[RewardFunction] = (),
        config: PPOConfig | None = None,
        *,
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        critic: str | PreTrainedModel | None = None,
        reference: str | PreTrainedModel | None = None,
        environment: str | MakeEnvironment | None = None,
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
            critic=critic,
            reference=reference,
            environment=environment,
        )

    def set_up(self, dtype: torch.dtype | None) -> None:
        critic, reference, environment = self.given("critic"), self.given("reference"), self.given("environment")
        # An episode's end is a time limit; a completion that was cut off failed to end.
        cut = "bootstrap" if environment is not None and critic != "none" else "penalty"
        cut = self.config.truncated or self.run.chosen.setdefault("truncated", cut)
        self.config = config = self.config.model_copy(update={"truncated": cut})
        refuse_unread_by_ppo(config, environment=environment is not None, critic=critic)
        for name in (critic, reference):
            if isinstance(name, str) and name not in NAMED_CRITICS:
                resolve_model(name)  # before anything is loaded
        if environment is None:
            self.load_prompts()
        elif self.given("rewards") or self.given("dataset") is not None or self.given("eval_dataset") is not None:
            raise InputError(ENVIRONMENT_ALONE)
        else:
            self.held_out = range(held_out_count(config.eval_rows))  # episodes
        make = load_callable(environment, "environment") if isinstance(environment, str) else environment
        if reference is not None and config.kl_coefficient == 0:
            raise InputError("a reference is given, but kl_coefficient is 0: raise it, or leave the reference out")
        if config.value_warmup_steps >= config.steps:
            self.run.view.note(
                f"the policy will not learn: value_warmup_steps ({config.value_warmup_steps}) are all of its steps"
            )
        self.has_reference, self.said = config.kl_coefficient > 0, False
        self.load_policy(dtype, keep_reference=self.has_reference and reference is None)
        with loading_model():
            if self.has_reference and reference is not None:
                check_reference(reference, self.policy)
                self.policy.use_reference(reference)
            if critic not in NAMED_CRITICS:
                check_critic(critic, reference, self.policy)
            checkpointing = config.gradient_checkpointing
            self.critic = make_critic(
                critic,
                self.policy,
                self.dtype,
                normalized=config.normalize_rewards,
                gradient_checkpointing=checkpointing,
            )
            self.state = {"optimizer": self.optimizer}
            if self.critic is not None:
                if self.critic.note and not self.run.step:
                    self.run.view.note(self.critic.note)
                self.critic_optimizer = Optimizer(self.critic.named_parameters(), config)
                self.state["critic"] = self.critic_optimizer
        self.controls = Controls(config.kl_coefficient, config.kl_target, config.kl_gain)
        self.state["controls"] = self.controls
        self.stage = make_stage(make, config, self.policy) if make is not None else None
        if self.stage is None:
            self.settle_judges()

    def trained_models(self) -> list[Any]:
        """The policy, and the critic if it is a model of its own."""
        models = super().trained_models()
        if self.critic is not None and self.critic.model is not self.policy.model:
            models.append(self.critic.model)
        return models

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        with self.begin() as run:
            for step in run.steps():
                collected = self._collect(step)
                with step.phase("estimate", "estimating advantages"):
                    estimates, figures = self._estimate(collected, step.number)
                with step.phase("update", "updating"):
                    figures |= self._update(collected.rollout, estimates, step)
                self.controls.keep()
                if self.has_reference:
                    figures |= kl_figures(collected.rollout, self.controls.coefficient)
                if self._may_stray(step.number) and collected.rollout.mask.any():  # else nothing was measured
                    self.controls.adapt(figures["kl_per_completion"])
                self._log_step(step, collected, estimates)
                yield self.finish(step, collected.figures(collected.totals, step.times) | figures)

    def _may_stray(self, step: int) -> bool:
        """Whether the policy that sampled this step can have strayed from a reference; else β would fall for nothing.

        Before its first update it is the starting weights, where these are the reference.
        """
        updates = step - 1 - self.config.value_warmup_steps
        return self.has_reference and updates >= (1 if self.given("reference") is None else 0)

    def _collect(self, step: Step) -> Collected:
        """Completions (or episodes) and what they earned."""
        if self.stage is not None:
            with step.phase("sample", f"playing {self.config.prompts_per_step * self.config.group_size} episodes"):
                collected = collect_episodes(self, self.stage, step.number)
            self.say_what_teaches_nothing(collected.scores, step.number)
            return collected
        return collect_completions(self, step)

    def _estimate(self, collected: Collected, step: int) -> tuple[Estimates, Record]:
        """Rewards, values and advantages of all tokens, from the weights before the updates."""
        config, rollout = self.config, collected.rollout
        truncated = rollout.truncated
        settled = settled_rewards(collected, config, self.controls)
        rewards = settled.to(self.device, self.dtype)
        if not rewards.isfinite().all():
            raise InputError(f"a reward of size {settled.abs().max():g} is beyond {rewards.dtype}: set reward_clip")
        if config.truncated == "mask":
            rollout.mask[truncated] = False
        unscored = config.truncated == "mask" or (config.truncated == "bootstrap" and self.stage is None)
        if unscored and bool(truncated.all()):
            self._say_that_no_score_counts()
        rows, mask = range(len(rollout.completions)), rollout.mask
        rollout.old_logprobs = self._old_logprobs(rollout, step)
        figures: Record = {}
        if self.has_reference:
            with self.policy.reference() as reference:
                rollout.reference_logprobs = self.logprobs(rollout, rows, reference)
            if config.kl_place == "reward":
                prices = kl_prices(rollout, config, self.controls.coefficient)
                rewards = rewards - prices
                figures["reward/kl_penalty"] = float(prices.sum() / max(1, int(mask.any(1).sum())))
        values, ends = self._values(rollout, rows)
        cut = {"truncated": truncated, "final_values": ends} if config.truncated == "bootstrap" else {}
        factors = {"discount": config.discount, "trace_decay": config.trace_decay}
        advantages = token_generalized_advantage(rewards, values, mask, **factors, **cut)  # type: ignore[arg-type]
        returns = torch.where(mask, advantages + values, 0.0)
        if self.critic is not None:
            figures["value/explained_variance"] = float(explained_variance(values, returns, mask))
            figures["value/mean"] = float(values[mask].mean()) if mask.any() else 0.0
        rollout.advantages = whitened(advantages, mask, config)
        return Estimates(torch.where(mask, rewards, 0.0), values, rollout.advantages, returns), figures

    def _old_logprobs(self, rollout: Rollout, step: int) -> Tensor:
        """What current log-probabilities are compared with, and what the divergence is taken of [N, L].

        The trainer's own take a pass of all rows where a divergence is part of the rewards; else only of those that
        are not in the first minibatch, which is forwarded before its update anyway and then fills its own in. In the
        value warm-up there is no such update, and nothing but the divergence to take them for.
        """
        rows, moves = set(range(len(rollout.completions))), step > self.config.value_warmup_steps
        if self.has_reference and (self.config.kl_place == "reward" or not moves):
            return self.compared_with(rollout, rows)
        return self.compared_with(rollout, rows - set(self.minibatches(rollout, step, 0)[0]) if moves else set())

    def _say_that_no_score_counts(self) -> None:
        if not self.said:
            self.said = True
            found = f"every completion was cut off at max_tokens {self.config.max_tokens}"
            if self.stage is not None:
                found = f"every episode was cut off, by max_turns {self.config.max_turns} or by the model's context"
            self.run.view.note(f"{found}, so no score counts: raise it, or set truncated to penalty")

    @torch.no_grad()
    def _values(self, rollout: Rollout, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """V [N, L] before each token and V [N] behind all of a row's, under the critic; 0 without one.

        Behind a truncated episode's stand the environment's answer and the opening of the next turn, as they do
        before the first token of every other turn.
        """
        values = torch.zeros_like(rollout.mask, dtype=self.dtype)
        ends = torch.zeros(len(values), dtype=self.dtype, device=values.device)
        if self.critic is None:
            return values, ends
        with self.critic.trunk() as model:
            for part in self.parts(rollout, rows, whole=True):
                tokens = torch.nn.functional.pad(part.inputs(rollout.tokens), (0, 1))  # what follows the last token
                found = part.spread(self.critic.head(completion_hidden(model, part.prompts, part.prompt_of, tokens)))
                values[part.rows, : part.length] = found[:, :-1]
                ends[part.rows] = found.gather(1, part.of(rollout.lengths)[:, None])[:, 0]
        return torch.where(rollout.mask, values, 0.0), ends

    def _update(self, rollout: Rollout, estimates: Estimates, step: Step) -> Record:
        """Updates of policy and critic, a minibatch of an epoch at a time. In the value warm-up the policy stays."""
        config, number = self.config, step.number
        rate = learning_rate(number, config)
        critic_rate = rate * config.critic_learning_rate / config.learning_rate
        moves = number > config.value_warmup_steps
        tally, critics, ratios, epochs = Tally(), list[Update](), list[Tensor](), 0
        for epoch in range(config.epochs):
            ratios.clear()
            epochs += 1
            for rows in self.minibatches(rollout, number, epoch):
                weights = torch.zeros_like(rollout.mask, dtype=self.dtype)
                weights[rows] = token_weights(rollout.mask[rows], "token", dtype=self.dtype)
                batch = Minibatch(rollout, estimates, weights, tally, ratios)
                with ExitStack() as updates:
                    critic = updates.enter_context(self.critic_optimizer.update(critic_rate)) if self.critic else None
                    # Left first: where the policy's gradient is not finite once too often, the critic takes no step.
                    policy = updates.enter_context(self.optimizer.update(rate)) if moves else None
                    for part in self.parts(rollout, rows):
                        self._descend(batch, part, policy, critic)
                tally.updates += [policy] if policy else []
                critics += [critic] if critic else []
                if far := config.target_kl is not None and bool(batch.moved > 1.5 * config.target_kl):
                    break
            if far:
                break
        figures = tally.figures() if moves else tally.means()
        if moves:
            self.note_updates(step, figures)
            picture = ratio_picture(torch.cat(ratios) if ratios else torch.ones(0), number)
            self.run.write_artifact("importance-ratios.svg", picture.encode())
        if critics:
            figures |= {"value/grad_norm": fmean(update.grad_norm for update in critics)}
            figures |= {"value/learning_rate": critic_rate, "value/updates_skipped": sum(not u.taken for u in critics)}
        if skipped := figures.get("value/updates_skipped"):
            norm = figures["value/grad_norm"]
            self.run.view.note(f"step {number}: {skipped} of the critic's updates not taken: gradient norm {norm:g}")
        return {**figures, "learning_rate": rate if moves else 0.0, "epochs": epochs}

    def _descend(self, batch: Minibatch, part: Part, policy: Update | None, critic: Update | None) -> None:
        """Gradients of one part: the policy's, where it moves, and the critic's, where there is one."""
        if self.critic and critic and self.critic.shares_trunk:
            with torch.set_grad_enabled(policy is not None):
                hidden = self._hidden(self.policy.model, batch, part)
            value_loss = self.config.value_coefficient * self._value_loss(self.critic.head(hidden), batch, part)
            if policy:
                policy(self._policy_loss(hidden, batch, part) + value_loss)
            else:
                critic(value_loss)
            return
        if policy:
            policy(self._policy_loss(self._hidden(self.policy.model, batch, part), batch, part))
        if self.critic and critic:
            with self.critic.trunk() as model:
                critic(self._value_loss(self.critic.head(self._hidden(model, batch, part)), batch, part))

    def _hidden(self, model: Any, batch: Minibatch, part: Part) -> Tensor:
        """Hidden states of the part's distinct rows."""
        return completion_hidden(model, part.prompts, part.prompt_of, part.inputs(batch.rollout.tokens))

    def _policy_loss(self, hidden: Tensor, batch: Minibatch, part: Part) -> Tensor:
        """The part's share of the policy's loss."""
        config, rollout = self.config, batch.rollout
        mask, weights, tokens = part.of(rollout.mask), part.of(batch.weights), part.inputs(rollout.tokens)
        found = hidden_logprobs(self.policy.model, hidden, tokens, part.inputs(rollout.mask), config.temperature)
        logprobs, entropies = map(part.spread, found)
        old = self.first_seen(rollout, part, logprobs, batch.tally)
        advantages, low, high = part.of(rollout.advantages), config.clip_low, config.clip_high
        losses = policy_loss("dapo", logprobs, old, advantages, mask, clip_low=low, clip_high=high)
        losses = self.corrected(losses, old, rollout, part)
        if config.kl_place == "loss" and rollout.reference_logprobs is not None:
            reference, estimator = part.of(rollout.reference_logprobs), config.kl_estimator
            divergences = kl_loss(logprobs, reference, mask, estimator=estimator, level="token")
            losses = losses + self.controls.coefficient * divergences
        if config.entropy_coefficient > 0:
            losses = losses - config.entropy_coefficient * entropies
        below, above = clipped_tokens("dapo", logprobs, old, advantages, mask, clip_low=low, clip_high=high)
        moved = k3(old, logprobs.detach())
        batch.tally.add(mask, {"entropy": entropies, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above})
        batch.tally.add(mask, {"approx_kl": moved})
        batch.ratios.append((logprobs.detach() - old)[mask].exp())
        batch.moved = batch.moved + weighted_sum(moved, weights)
        return weighted_sum(losses, weights)

    def _value_loss(self, values: Tensor, batch: Minibatch, part: Part) -> Tensor:
        """The part's share of the critic's loss."""
        clip, estimates = self.config.value_clip, batch.estimates
        mask, old, returns = (part.of(each) for each in (batch.rollout.mask, estimates.values, estimates.returns))
        values = torch.where(mask, part.spread(values), 0.0)
        if clip is None:
            losses = squared_value_loss(values, returns)
        else:
            losses = clipped_value_loss(values, old, returns, clip=clip)
            batch.tally.add(mask, {"value/clip_ratio": (values.detach() - old).abs() > clip})
        batch.tally.add(mask, {"value/loss": losses})
        return weighted_sum(losses, part.of(batch.weights))

    def _log_step(self, step: Step, collected: Collected, estimates: Estimates) -> None:
        """Samples, and a picture of one completion by token."""
        rollout = collected.rollout
        self.log_completions(step, collected, estimates.advantages.sum(1) / rollout.mask.sum(1).clamp(min=1))
        row = step.number % len(rollout.completions)
        completion = rollout.completions[row]
        figures = {
            name: getattr(estimates, name)[row, : len(completion.tokens)].tolist()
            for name in ("rewards", "values", "advantages")
        }
        texts = [str(self.policy.tokenizer.decode([token])) for token in completion.tokens]
        title = f"step {step.number}, score {collected.scores.total[row]:.3g}"
        self.run.write_artifact("completion-by-token.svg", token_picture(texts, figures, title=title).encode())

    def evaluation(self, step: int) -> Evaluation:
        """Greedy answers to the held-out rows, or greedy episodes of the environment."""
        return super().evaluation(step) if self.stage is None else play_held_out(self, self.stage, step)
