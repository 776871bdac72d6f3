"""Pairs of the policy's own answers: sampled, judged by reward functions, and the best set against the worst."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from taurl.llm.algorithms.dpo_config import DPOConfig
from taurl.llm.datasets import PromptOrder
from taurl.llm.evaluation import Evaluation, TrainerState, describe, evaluate, reward_columns, reward_metrics, score
from taurl.llm.generation import Sampling
from taurl.llm.policies import Policy
from taurl.llm.rewards import RewardSet
from taurl.llm.tasks import Prompts


@dataclass(frozen=True)
class SampledPairs:
    """What was sampled in one step.

    Attributes:
        prompts: of each pair, token ids.
        answers: of each pair, token ids of the best and of the worst answer.
        figures: rewards of all answers, by metric name.
        samples: all answers, as samples.jsonl has them.
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    figures: dict[str, float]
    samples: list[dict[str, Any]]


class PairSampler:
    """Samples pairs from a policy. Rewards come before the model, so that a wrong one is refused at once."""

    def __init__(self, config: DPOConfig, policy: Policy, rewards: RewardSet, prompts: Prompts, held_out: Prompts):
        self.config, self.policy, self.rewards = config, policy, rewards
        self.prompts, self.held_out = prompts, held_out
        for rows in (prompts.rows, held_out.rows):
            if rows:
                rewards.check_columns(reward_columns(rows))
        self.generator = policy.generator(config.generator, config.slots)
        self.order = PromptOrder(len(prompts), config.seed)

    def sample(self, step: int) -> SampledPairs:
        """The pairs of step 1, 2, …: prompts whose answers are all equally good, or are not judged, give none."""
        config = self.config
        indices = self.order.take((step - 1) * config.prompts_per_step, config.prompts_per_step)
        batch = self.prompts.take(indices)
        sampling = Sampling(config.max_tokens, temperature=config.temperature, stop=config.stop)
        groups = self.generator.generate(batch.ids, config.group_size, sampling, key=(config.seed, step))
        rows = [row for row in batch.rows for _ in range(config.group_size)]
        completions = [completion for group in groups for completion in group]
        state = TrainerState(step - 1, config.steps)
        scores = score(rows, completions, self.policy.tokenizer, self.rewards, state)
        places = best_and_worst(scores.total.reshape(len(batch), config.group_size))
        samples = describe(rows, completions, self.policy.tokenizer, self.rewards.names, scores)
        lengths = [len(completion.tokens) for completion in completions]
        figures = reward_metrics(self.rewards.names, scores) | {
            "pairs": float(len(places)),
            "completions/mean_length": float(np.mean(lengths)),
            "completions/clipped_ratio": float(np.mean([c.finish == "length" for c in completions])),
        }
        origin = [{"step": step, "kind": "train", "row": index} for index in indices for _ in range(config.group_size)]
        return SampledPairs(
            prompts=[batch.ids[prompt] for prompt in places],
            answers=[[groups[prompt][place].tokens for place in pair] for prompt, pair in places.items()],
            figures=figures,
            samples=[{**start, **sample} for start, sample in zip(origin, samples, strict=True)],
        )

    def evaluate(self, step: int, progress: Any) -> Evaluation:
        """Greedy answers to the held-out prompts, with their rewards."""
        sampling = Sampling(self.config.max_tokens, temperature=0, stop=self.config.stop)
        groups = self.generator.generate(self.held_out.ids, 1, sampling, progress=progress)
        state = TrainerState(step, self.config.steps)
        completions = [group[0] for group in groups]
        return evaluate(self.held_out.rows, completions, self.policy.tokenizer, self.rewards, state)


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
