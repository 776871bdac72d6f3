"""What PPO learns from: completions of prompts or episodes of an environment, and what each of their tokens earned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from taurl.llm.algorithms.online import Samples
from taurl.llm.algorithms.ppo_config import PPOConfig
from taurl.llm.data.chat import encode_prompt
from taurl.llm.episodes import Episode, MakeEnvironment, Stage
from taurl.llm.evaluation import Evaluation, TrainerState, summarized
from taurl.llm.generation import Sampling
from taurl.llm.models.heads import context_length
from taurl.llm.models.policies import Policy
from taurl.llm.rewards import Scores
from taurl.llm.scoring.rollouts import Rollout
from taurl.runtime.run import Record
from taurl.runtime.step import Step

if TYPE_CHECKING:
    from taurl.llm.algorithms.ppo import PPO

ENVIRONMENT = "environment"  # the name of its rewards


@dataclass
class Collected(Samples):
    """A step's N completions, and what their tokens earned.

    Attributes:
        rewards: float64 [N, L], what each token earned: a score at a completion's end, an episode's turn by turn.
        earned: bool [N, L], where there is a reward, if only of 0.
        episodes: figures of the episodes; None of single completions.
    """

    rewards: Tensor
    earned: Tensor
    episodes: Record | None = None

    def figures(self, rewards: Tensor, times: Mapping[str, float]) -> Record:
        """Those of all samples, and of the episodes."""
        return super().figures(rewards, times) | (self.episodes or {})


def collect_completions(trainer: "PPO", step: Step) -> Collected:
    """Sample completions of the step's prompts, and score them."""
    samples = trainer.collect(step)
    rollout, totals = samples.rollout, samples.totals.flatten()
    absent = totals.isnan()
    rollout.mask[absent.to(rollout.mask.device)] = False  # no reward applies: nothing to learn from
    last = rollout.last.cpu()
    rewards = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    rewards[torch.arange(len(totals)), last] = totals.nan_to_num(0.0)
    earned = torch.nn.functional.one_hot(last, rewards.shape[1]).bool() & ~absent[:, None]
    return Collected(**vars(samples), rewards=rewards, earned=earned)


def make_stage(make: MakeEnvironment, config: PPOConfig, policy: Policy) -> Stage:
    """The stage on which episodes are played of what `make` makes from a seed."""
    template = config.chat_template_kwargs
    return Stage(
        make,
        lambda messages: encode_prompt(
            messages, policy.tokenizer, system_prompt=config.system_prompt, chat_template_kwargs=template
        ),
        policy.tokenizer,
        max_turns=config.max_turns,
        context=context_length(policy.model),
        chat_template_kwargs=template,
    )


def collect_episodes(trainer: "PPO", stage: Stage, step: int) -> Collected:
    """Play the step's episodes; those of a group begin alike."""
    config = trainer.config
    drawn = episode_seeds(config.seed, step, config.prompts_per_step)
    seeds = [seed for seed in drawn for _ in range(config.group_size)]
    sampling = Sampling(config.max_tokens, temperature=config.temperature, stop=config.stop)
    episodes = stage.play(seeds, trainer.generator, sampling, key=(config.seed, step))
    trainer.generator.release()
    # Each is a group of its own: an environment may begin two episodes of one seed with different words.
    rollout = Rollout.of([e.prompt for e in episodes], [[e.completion] for e in episodes], trainer.device)
    rewards = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    earned = torch.zeros_like(rewards, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        rewards[row, : len(episode.rewards)] = torch.tensor(episode.rewards, dtype=torch.float64)
        earned[row, : len(episode.rewards)] = torch.tensor(episode.turn_ends())
    rows, origins = [{"prompt": episode.messages} for episode in episodes], list(range(len(episodes)))
    samples = Samples(rollout, rows, origins, episode_scores(episodes), [ENVIRONMENT], config.group_size)
    return Collected(**vars(samples), rewards=rewards, earned=earned, episodes=episode_figures(episodes))


def play_held_out(trainer: "PPO", stage: Stage, step: int) -> Evaluation:
    """Greedy episodes, the same each time as far as the environment's seed tells."""
    config = trainer.config
    seeds = episode_seeds(config.seed, 0, len(trainer.held_out))
    sampling = Sampling(config.max_tokens, temperature=0, stop=config.stop)
    trainer.run.view.status(f"playing {len(seeds)} episodes greedily")
    episodes = stage.play(seeds, trainer.generator, sampling)
    trainer.generator.release()
    rows, completions = [{"prompt": e.messages} for e in episodes], [e.completion for e in episodes]
    state = TrainerState(step, config.steps)
    found = summarized(rows, completions, trainer.policy.tokenizer, [ENVIRONMENT], episode_scores(episodes), state)
    found.metrics.update({f"eval/{name}": value for name, value in episode_figures(episodes).items()})
    return found


def episode_seeds(seed: int, step: int, count: int) -> list[int]:
    """Seeds of a step's environments; step 0 is the evaluation."""
    seeds: list[int] = np.random.default_rng([seed, step]).integers(2**31, size=count).tolist()
    return seeds


def episode_figures(episodes: Sequence[Episode]) -> Record:
    """How many turns they had, and what share of these was cut off before its end."""
    turns = [episode.turns for episode in episodes]
    cut = sum(episode.cut_turns for episode in episodes)
    return {"episodes/mean_turns": float(np.mean(turns)), "episodes/cut_turns": cut / sum(turns)}


def episode_scores(episodes: Sequence[Episode]) -> Scores:
    """The sum of each episode's rewards, as if a reward function had given it."""
    totals = np.array([sum(episode.rewards) for episode in episodes])
    return Scores(totals[:, None], totals, {ENVIRONMENT: 0.0}, {}, {})
