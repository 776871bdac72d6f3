"""What algorithms have in common that sample from the policy, score what it said, and learn from that."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from taurl.functional.importance import mismatch_weights
from taurl.llm.algorithms.figures import Tally, rollout_figures
from taurl.llm.algorithms.online_config import OnlineConfig, SampledConfig
from taurl.llm.algorithms.setup import repeat_data
from taurl.llm.algorithms.trainer import Trainer
from taurl.llm.answering import Answering
from taurl.llm.data.datasets import PromptOrder
from taurl.llm.data.tasks import PromptReader, train_and_held_out
from taurl.llm.evaluation import Evaluation, TrainerState, describe, reward_columns, reward_metrics, score
from taurl.llm.generation import Completion, Sampling
from taurl.llm.models.others import settle_judge
from taurl.llm.rewards import RewardSet, Scores
from taurl.llm.scoring.likelihood import completion_logprobs, refuse_recurrent
from taurl.llm.scoring.rollouts import Part, Rollout
from taurl.runtime.run import Record
from taurl.runtime.step import Step

RewardFunction = str | Callable[..., Any]

HEADLINE = {
    "reward": "reward",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "tokens/s": "tokens_per_second",
}
STEPS_ALIKE = 5  # without any difference, after which it is said


@dataclass
class Samples:
    """What a step sampled: N = P · G completions of P prompts, and their scores.

    Attributes:
        rows: the data row of each completion.
        origins: the index of each row in the data (of each episode in the step).
        scores: by the reward functions of these `names`.
        group_size: G.
    """

    rollout: Rollout
    rows: list[Record]
    origins: list[int]
    scores: Scores
    names: list[str]
    group_size: int

    @property
    def totals(self) -> Tensor:
        """The scores, float64 [P, G]; NaN where no reward function applies."""
        return torch.from_numpy(self.scores.total).reshape(-1, self.group_size)

    def figures(self, rewards: Tensor, times: Mapping[str, float]) -> Record:
        """Metrics of the scores, of the rewards [P, G] made of them, and of speed, by the seconds of the phases."""
        return reward_metrics(self.names, self.scores) | rollout_figures(self.rollout, rewards, times)


class OnlineTrainer(Trainer):
    """A trainer that samples completions of prompts, has them scored, and learns from both.

    Attributes:
        generator: samples from the policy's current weights.
        prompts: what is trained on.
        dtype: of figures per token: float32, or float64 for a model in float64.
        merges: whether its updates are `completion_logprobs` with what completions share forwarded once; the passes
            that they are compared with must round alike.
    """

    headline: ClassVar[Mapping[str, str]] = HEADLINE
    merges: ClassVar[bool] = True
    memory_settings = "tokens_per_part or slots (or kv_memory_gb, max_tokens, group_size, prompts_per_step)"
    config: SampledConfig
    rewards: RewardSet
    steps_alike, said_none = 0, False  # steps in a row whose completions have all earned the same
    earned: frozenset[float] = frozenset()  # what was earned in the last step

    def load_policy(self, dtype: torch.dtype | None, *, keep_reference: bool, samples: bool = True) -> None:
        """Make the policy, its optimiser and, where anything is sampled, its generator."""
        self.make_policy(dtype, keep_reference=keep_reference)
        refuse_recurrent(self.policy.model)  # before anything is sampled
        self.make_optimizer()
        if samples:
            self.generator = self.new_generator()
        self.dtype = torch.promote_types(self.policy.model.dtype, torch.float32)

    def kept_weights(self) -> Iterator[Tensor]:
        """Those of reward models, too."""
        yield from super().kept_weights()
        for judge in self.rewards.models if self.rewards else ():
            yield from judge.parameters()

    def settle_judges(self) -> None:
        """Freeze the reward models, and let them share what weights they have in common with the policy."""
        for judge in self.rewards.models:
            if note := settle_judge(judge, self.trained_models(), self.policy):
                self.run.view.note(note)

    def load_prompts(self) -> None:
        """Make the reward functions, read the data, check that they find their columns, and note it for the resume."""
        config = self.config
        self.rewards = RewardSet.of(config, self.given("rewards"))
        self.prompts, self.held_out, dropped = train_and_held_out(
            PromptReader.of(config, self.tokenizer, self.outline()),
            self.given("dataset"),
            self.given("eval_dataset"),
            config.eval_rows,
            config.seed,
        )
        if dropped:
            self.run.view.note(f"{dropped} training rows left out: their prompts are among the held-out ones")
        self.note_nothing_held_out()
        for rows in (self.prompts.rows, self.held_out.rows):
            if rows:
                self.rewards.check_columns(reward_columns(rows))
        repeat_data(self.run, self.prompts.fingerprint() + self.held_out.fingerprint())
        self.order = PromptOrder(len(self.prompts), config.seed)

    def prompts_of(self, step: int) -> list[int]:
        """Where the prompts of a step stand in the data."""
        count = self.config.prompts_per_step
        return self.order.take((step - 1) * count, count)

    def collect(self, step: Step) -> Samples:
        """Sample completions of the step's prompts, and score them."""
        indices, size = self.prompts_of(step.number), self.config.group_size
        prompts = self.prompts.take(indices)
        rows = [row for row in prompts.rows for _ in range(size)]
        with step.phase("sample", f"sampling {len(prompts)} prompts × {size}"):
            rollout = self.sample(prompts.ids, size, step.number)
        with step.phase("reward", "scoring"):
            scores = self.score(rows, rollout.completions, step.number)
        self.say_what_teaches_nothing(scores, step.number)
        origins = [index for index in indices for _ in range(size)]
        return Samples(rollout, rows, origins, scores, self.rewards.names, size)

    def say_what_teaches_nothing(self, scores: Scores, step: int) -> None:
        """Say it once where no reward applies to anything, and where all has earned the same for some steps."""
        earned = frozenset(scores.total[~np.isnan(scores.total)].tolist())
        if not earned and not self.said_none:
            self.said_none = True
            self.run.view.note(f"step {step}: no reward function applies to any completion (they all gave None)")
        self.steps_alike = self.steps_alike + 1 if len(earned) == 1 and earned == self.earned else 1
        self.earned = earned
        if self.steps_alike == STEPS_ALIKE and earned:
            self.run.view.note(
                f"step {step}: for {STEPS_ALIKE} steps every completion has earned {max(earned):g}, so that nothing is "
                "learned from the rewards; look at samples.jsonl"
            )

    def sample(self, prompts: list[list[int]], group_size: int, step: int) -> Rollout:
        """Completions of prompts given as token ids, `group_size` of each."""
        config = self.config
        sampling = Sampling(config.max_tokens, temperature=config.temperature, stop=config.stop)
        groups = self.generator.generate(prompts, group_size, sampling, key=(config.seed, step))
        self.generator.release()
        return Rollout.of(prompts, groups, self.device)

    def score(self, rows: Sequence[Record], completions: Sequence[Completion], step: int) -> Scores:
        """The rewards of one completion a row, as the reward functions see them in this step."""
        state = TrainerState(step - 1, self.config.steps)
        return score(rows, completions, self.policy.tokenizer, self.rewards, state)

    def parts(self, rollout: Rollout, rows: Sequence[int], *, whole: bool = False) -> Iterator[Part]:
        """Some rows of a rollout, cut by the token budget; whole completions as `Rollout.parts` says."""
        return rollout.parts(rows, self.config.tokens_per_part, share_prompts=self.shares_prompts(), whole=whole)

    def forward(self, rollout: Rollout, part: Part, model: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n, l] of a part's tokens under a model."""
        logprobs, entropies = completion_logprobs(
            model,
            part.prompts,
            part.prompt_of,
            part.inputs(rollout.tokens),
            part.inputs(rollout.mask),
            temperature=self.config.temperature,
            merge=self.merges,
        )
        return part.spread(logprobs), part.spread(entropies)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, rows: Sequence[int], model: Any) -> Tensor:
        """Log-probabilities [N, L] of these rows under a model, without gradient; 0 elsewhere."""
        found = torch.zeros_like(rollout.mask, dtype=self.dtype)
        for part in self.parts(rollout, rows):
            part.put(self.forward(rollout, part, model)[0], into=found)
        return found

    def log_completions(self, step: Step, samples: Samples, advantages: Tensor) -> None:
        """Keep the step's first completions with their advantages [N], and show one of them all."""
        completions = samples.rollout.completions
        found = describe(samples.rows, completions, self.policy.tokenizer, samples.names, samples.scores)
        kept = []
        for place, sample in enumerate(found[: self.config.samples_per_step]):
            origin = {"step": step.number, "kind": "train", "row": samples.origins[place]}
            kept.append(origin | sample | {"advantage": float(advantages[place])})
        self.run.log_samples(kept)
        shown = found[step.number % len(found)]
        title = f"step {step.number}, reward {shown['reward']:.3g}"
        self.run.view.sample(title, f"{shown['prompt']}\n→ {shown['completion']}")

    def evaluation(self, step: int) -> Evaluation:
        """Greedy answers to the held-out rows, scored."""
        rows, ids, tokenizer = self.held_out.rows, self.held_out.ids, self.policy.tokenizer
        sampling = Sampling(self.config.max_tokens, temperature=0, stop=self.config.stop)
        answering = Answering(rows, ids, sampling, self.rewards, self.generator, tokenizer)
        return answering(step, self.config.steps, self.run.view.status)


class RatioTrainer(OnlineTrainer):
    """An online trainer that may learn more than once from a step's samples, by importance ratios."""

    config: OnlineConfig

    def minibatches(self, rollout: Rollout, step: int, epoch: int) -> list[list[int]]:
        """Rows of each update of an epoch."""
        return rollout.minibatches(self.config.minibatches, key=(self.config.seed, step, epoch))

    def compared_with(self, rollout: Rollout, rows: Iterable[int]) -> Tensor:
        """What current log-probabilities are compared with [N, L]: the sampler's, or the trainer's before any update.

        Args:
            rows: which of the trainer's take a pass of their own; the others are filled in by `first_seen`.
        """
        if self.config.old_logprobs == "sampler":
            return torch.where(rollout.mask, rollout.sampler_logprobs.to(self.dtype), 0.0)
        return self.logprobs(rollout, sorted(rows), self.policy.model)

    def first_seen(self, rollout: Rollout, part: Part, logprobs: Tensor, tally: Tally) -> Tensor:
        """What a part is compared with [n, l]: before the step's first update its own log-probabilities, which stay.

        Nothing has changed then since the completions were sampled: the ratio is exactly 1, and what differs from the
        sampler's is the mismatch of the two.
        """
        assert rollout.old_logprobs is not None
        old, sampler = part.of(rollout.old_logprobs), part.of(rollout.sampler_logprobs)
        if not tally.updates:
            tally.add(part.of(rollout.mask), {"sampling/logp_difference_mean": (logprobs - sampler).abs()})
            if self.config.old_logprobs == "trainer":
                old = logprobs.detach()
                part.put(old, into=rollout.old_logprobs)
        return old

    def corrected(self, losses: Tensor, old: Tensor, rollout: Rollout, part: Part) -> Tensor:
        """Losses [n, l], by option weighed for how far sampler and trainer disagree."""
        mode, cap = self.config.importance_mode, self.config.importance_cap
        if cap is None:
            return losses
        sampler, mask = part.of(rollout.sampler_logprobs), part.of(rollout.mask)
        return losses * mismatch_weights(old, sampler, mask, mode=mode, high=cap)
