"""Rollouts: what followed each step bootstraps, steps that only reset are flagged, actions are kept as drawn."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import Counting, Endless, Showing, resetting_on_the_next_step

from taurl.control.distributions import distribution_for
from taurl.control.environments import Environments, SingleEpisodes
from taurl.control.normalization import Normalizer
from taurl.control.rollouts import Collector
from taurl.control.spaces import width

MODES = ["same_step", "next_step"]


def actor(observations):
    """Both actions alike, for whatever is seen."""
    return torch.zeros(*observations.shape[:-1], 2)


def critic(observations):
    """V(episode, step) = 1000 · episode + step: what was looked at can be read off."""
    return 1000 * observations[..., 0] + observations[..., 1]


def collector_of(environments, *, normalized=False):
    size = width(environments.observation_space)
    normalizer = Normalizer(size, environments.count, observations=normalized, rewards=False, discount=0.9)
    return Collector(environments, distribution_for(environments.action_space), normalizer)


@pytest.fixture(params=MODES)
def environments(request, monkeypatch):
    if request.param == "next_step":
        resetting_on_the_next_step(monkeypatch)
    return Environments(Counting, 2, seed=0)


def test_the_last_observation_bootstraps_and_not_the_next_episodes_first(environments):
    rollout = collector_of(environments).collect(actor, critic, 30)
    seen = rollout.observations[rollout.valid]
    assert torch.equal(rollout.values, critic(rollout.observations))
    # The same episode, a step later: also where the episode was cut, and at the end of the rollout.
    assert torch.equal(rollout.next_values[rollout.valid], critic(seen + torch.tensor([0.0, 1.0])))
    assert rollout.truncated.any()
    assert rollout.terminated.any()


def test_only_what_was_an_action_is_valid(environments):
    rollout = collector_of(environments).collect(actor, critic, 30)
    resets = 0 if environments.resets_in_same_step else int((rollout.terminated | rollout.truncated)[:-1].sum())
    assert int((~rollout.valid).sum()) == resets
    seen = rollout.observations[rollout.valid]
    assert (seen[:, 1] < 2 + seen[:, 0] % 3).all()  # an episode's last observation is never acted on


def test_a_rollout_goes_on_where_the_last_one_ended(environments):
    collector = collector_of(environments)
    parts = [collector.collect(actor, critic, steps) for steps in (7, 5)]
    seen = torch.cat([part.observations[:, 0][part.valid[:, 0]] for part in parts])
    expected = [[episode, step] for episode in range(10) for step in range(2 + episode % 3)]
    assert seen.tolist() == expected[: len(seen)]


def test_logprobs_are_those_of_the_actions_drawn(environments):
    def uneven(observations):
        return torch.stack([observations[..., 1], -observations[..., 1]], -1)

    rollout = collector_of(environments).collect(uneven, None, 20)
    expected = torch.distributions.Categorical(logits=uneven(rollout.observations)).log_prob(rollout.actions)
    torch.testing.assert_close(rollout.logprobs, expected)
    assert torch.equal(rollout.parameters, uneven(rollout.observations))
    assert not rollout.values.any()
    steps, actions = rollout.observations[..., 1], rollout.actions
    assert torch.equal(rollout.rewards[rollout.valid], (10 * steps + actions)[rollout.valid])


def test_actions_of_a_box_are_stored_unclipped():
    class Box(Counting):
        action_space = spaces.Box(-0.1, 0.1, (2,), np.float32)

        def step(self, action):
            taken.append(action.copy())
            return super().step(0)

    taken = []
    collector = collector_of(Environments(Box, 1, seed=0))
    torch.manual_seed(0)
    rollout = collector.collect(lambda seen: torch.zeros(*seen.shape[:-1], 4), None, 20)
    drawn = rollout.actions[:, 0]
    assert (drawn.abs() > 0.1).any()
    np.testing.assert_allclose(np.stack(taken), drawn.clamp(-0.1, 0.1).numpy())
    torch.testing.assert_close(rollout.logprobs[:, 0], torch.distributions.Normal(0, 1).log_prob(drawn).sum(-1))


def test_observations_are_counted_once():
    environments = Environments(Counting, 2, seed=0)
    collector = collector_of(environments, normalized=True)
    for _ in range(3):
        collector.collect(actor, None, 4)
    assert float(collector.normalizer.seen.samples) == 2 * (1 + 3 * 4)
    before = collector.normalizer.seen
    collector._current()
    assert collector.normalizer.seen is before


def test_the_returns_that_scale_rewards_begin_anew_with_the_episodes():
    environments = Environments(lambda: Endless(limit=100), 2, seed=0)
    collector = collector_of(environments)
    collector.normalizer = Normalizer(1, 2, observations=False, rewards=True, discount=0.5)
    for steps, returned in ((3, 1.75), (1, 1.875)):
        collector.collect(actor, None, steps)
        assert collector.normalizer.running_returns.tolist() == [returned] * 2
    environments.begin_anew()  # as after a checkpoint that cannot hold where they stand
    collector.collect(actor, None, 1)
    assert collector.normalizer.running_returns.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,), np.float32)),
        spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])]),
    ],
    ids=["dict", "tuple"],
)
def test_parts_of_observations_bootstrap_too(space):
    """Of spaces whose last observations come one by one and not as a batch."""

    class Cut(Showing):
        def step(self, action):
            shown, reward, over, _, info = super().step(action)
            lasts.extend([shown] if over else [])
            return shown, reward, False, over, info

    lasts = []
    environments = Environments(lambda: Cut(space), 2, seed=0)
    rollout = collector_of(environments).collect(actor, lambda seen: seen.sum(-1), 5)
    expected = [float(sum(np.sum(flat_part(part, one)) for part, one in parts_of(space, last))) for last in lasts]
    torch.testing.assert_close(rollout.next_values[-1], torch.tensor(expected))


def parts_of(space, one):
    return [(space.spaces[name], one[name]) for name in (one if isinstance(one, dict) else range(len(one)))]


def flat_part(space, one):
    """One for each choice made, numbers as they are."""
    match space:
        case spaces.Discrete():
            return 1.0
        case spaces.MultiDiscrete():
            return np.ones(len(space.nvec))
    return one


def test_whole_episodes():
    collector = collector_of(SingleEpisodes(lambda: Counting(), 3, seed=0))
    for episode in range(2):
        rollout = collector.collect_episodes(actor, critic)
        lengths = rollout.valid.sum(0)
        assert rollout.observations[0, :, 1].tolist() == [0, 0, 0]
        assert ((rollout.terminated | rollout.truncated).sum(0) == 1).all()
        assert (lengths == 2 + rollout.observations[0, :, 0] % 3).all(), episode
        assert len(rollout.valid) == lengths.max()
        assert not rollout.rewards[~rollout.valid].any()
        ends = rollout.truncated | rollout.terminated
        assert torch.equal(ends.int().argmax(0) + 1, lengths)
