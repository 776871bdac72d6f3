"""envpool: what followed each action, where episodes end, and that its state is not kept."""

import sys

import gymnasium
import numpy as np
import pytest
import torch
from small_environments import same_records, same_weights, unbroken_and_resumed

from taurl.control import PPO, PPOConfig
from taurl.control.distributions import distribution_for
from taurl.control.environments import Environments
from taurl.control.normalization import Normalizer
from taurl.control.rollouts import Collector
from taurl.runtime.errors import InputError

pytest.importorskip("envpool")


def made(name, count=2, seed=0, **arguments):
    return Environments(name, count, seed=seed, arguments=arguments, vectorization="envpool")


def test_steps_of_cartpole_obey_its_physics_but_for_those_that_only_reset():
    environments, single = made("CartPole-v1", 4), gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    rng = np.random.default_rng(0)
    observations, resets, ends = environments.reset(), 0, 0
    for _ in range(80):
        actions = rng.integers(2, size=4)
        given = environments.step(actions)
        for copy in range(4):
            single.state, single.steps_beyond_terminated = observations[copy].astype(np.float64), None
            expected, _, terminated, *_ = single.step(int(actions[copy]))
            obeys = np.allclose(expected, given.observations[copy], atol=1e-5)
            assert obeys != given.only_reset[copy]
            assert given.rewards[copy] == obeys
            if obeys:
                assert given.terminated[copy] == terminated
        resets, ends = resets + given.only_reset.sum(), ends + given.terminated.sum()
        observations = given.observations
    assert ends >= resets > 4
    assert not given.truncated.any()
    assert {episode.reward - episode.length for episode in environments.episodes} == {0.0}


def test_a_time_limit_truncates_and_the_last_observation_bootstraps():
    environments = made("Pendulum-v1", max_episode_steps=5)
    normalizer = Normalizer(3, 2, observations=False, rewards=False, discount=0.9)
    collector = Collector(environments, distribution_for(environments.action_space), normalizer)
    actor = PPO("Pendulum-v1", PPOConfig(environments=1, rollout_steps=256)).policy.actor
    rollout = collector.collect(actor, lambda seen: seen.sum(-1), 12)
    valid = [True] * 5 + [False] + [True] * 5 + [False]
    assert rollout.valid[:, 0].tolist() == valid
    assert rollout.truncated[:, 0].nonzero().flatten().tolist() == [4, 10]
    assert not rollout.terminated.any()
    # What followed the fifth step was acted on by the step that only resets.
    assert torch.equal(rollout.next_values[4], rollout.observations[5].sum(-1))
    velocity = rollout.observations[..., 2]
    assert (velocity[5] - velocity[4]).abs().max() < 2  # a step apart: of the same episode
    assert [episode.length for episode in environments.episodes] == [5, 5, 5, 5]


def test_observations_stay_as_they_were():
    environments = made("Pendulum-v1")
    seen = [environments.reset()]
    copies = [seen[0].copy()]
    for _ in range(50):
        seen.append(environments.step(np.zeros((2, 1), np.float32)).observations)
        copies.append(seen[-1].copy())
    np.testing.assert_array_equal(seen, copies)
    assert len(np.unique(copies)) > 200


def test_resets_repeat_with_the_seed_and_are_others_without():
    def beginnings(seed):
        environments = made("CartPole-v1", seed=seed)
        first = environments.reset()
        environments.step(np.zeros(2, dtype=int))
        return [first, environments.reset()]

    np.testing.assert_array_equal(beginnings(3), beginnings(3))
    first, second = beginnings(3)
    assert not np.isclose(first, second).any()
    assert not np.isclose(first, beginnings(2**32 - 7)[0]).any()


def test_copies_have_seeds_of_their_own():
    environments = made("CartPole-v1", 3)
    assert len(np.unique(environments.reset()[:, 0])) == 3
    same = environments.reset([5, 7, 5])
    np.testing.assert_array_equal(same[0], same[2])
    np.testing.assert_array_equal(environments.reset([7, 5, 5])[0], same[1])


def test_a_resumed_run_is_an_unbroken_one_and_says_what_is_not_kept(tmp_path):
    settings = {"environments": 4, "rollout_steps": 32, "minibatch_size": 64, "record_every": 256, "eval_episodes": 3}
    settings |= {"steps": 2048, "save_every": 512, "vectorization": "envpool"}
    whole, parts = unbroken_and_resumed(PPO, PPOConfig, tmp_path, stop_after=1000, env="CartPole-v1", **settings)
    assert same_records(whole, parts)
    assert same_weights(whole, parts)
    assert parts.environments.unsaved == "envpool keeps it to itself"


def test_games_of_ale_are_the_same_games():
    pytest.importorskip("ale_py")
    arguments = {"reward_clipping": True, "frameskip": 4}
    environments = Environments(
        "ALE/Breakout-v5", 2, seed=0, arguments=arguments, vectorization="envpool", for_learning=True
    )
    environments.reset()
    settings = environments.vector.pool.config
    expected = {"repeat_action_probability": 0.25, "frame_skip": 4, "max_episode_steps": 27_000, "noop_max": 30}
    expected |= {"stack_num": 4, "episodic_life": False, "reward_clip": False, "use_fire_reset": True}
    assert {name: settings[name] for name in expected} == expected
    rng = np.random.default_rng(0)
    given = [environments.step(rng.integers(4, size=2)) for _ in range(300)]
    ends = len(environments.episodes)
    assert ends >= 2
    assert 5 * ends <= sum(int(one.terminated.sum()) for one in given) < 5 * (ends + 2)
    assert environments.observation_space.shape == (4, 84, 84)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CartPole-v9", "env is 'CartPole-v9', which envpool does not have; near are CartPole-v1, CartPole-v0"),
        ("Qwxyz", r"which envpool does not have; envpool.list_all_envs\(\) names the \d+ there are"),
    ],
)
def test_ids_that_envpool_does_not_have_are_named_with_what_is_near(name, said):
    with pytest.raises(InputError, match=said):
        made(name)


def test_what_envpool_cannot_do_is_said():
    with pytest.raises(InputError, match=r"cannot be made: .*unexpected keyword argument 'colour'"):
        made("CartPole-v1", colour=True)
    with pytest.raises(InputError, match="makes environments by id; an object or function was given"):
        made(lambda: gymnasium.make("CartPole-v1"))


def test_without_envpool_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "taurl.control.pools", raising=False)
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(InputError, match=r"needs envpool; in taurl's folder, pip install -e '\.\[envpool\]'"):
        made("CartPole-v1")
