"""A2C: its gradient by hand, an environment that it solves, values at time limits, and runs that repeat and go on."""

import dataclasses

import pytest
import torch
from gymnasium import spaces
from small_environments import (
    Endless,
    Hidden,
    Identity,
    advantages_by_hand,
    same_records,
    same_weights,
    unbroken_and_resumed,
)

from taurl.control.algorithms.a2c import A2C
from taurl.control.algorithms.a2c_config import A2CConfig

SMALL = {"environments": 4, "rollout_steps": 16, "record_every": 128, "eval_episodes": 0, "video": False}


def trainer_of(folder, env="CartPole-v1", **settings):
    return A2C(env, A2CConfig(out=folder / "run", **{**SMALL, **settings}))


def rollout_of(trainer, steps):
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, steps)
    assert not rollout.valid.all()
    return rollout


def gradient_of(trainer, loss):
    return torch.autograd.grad(loss, [*trainer.policy.actor.parameters(), *trainer.critic.parameters()])


def test_the_gradient_is_that_of_n_step_returns(tmp_path):
    settings = {"discount": 0.9, "value_coefficient": 0.5, "entropy_coefficient": 0.1}
    trainer = trainer_of(tmp_path, **settings)
    rollout = rollout_of(trainer, 40)
    found = gradient_of(trainer, trainer._loss(rollout)[0])

    logits, values = trainer.policy.actor(rollout.observations), trainer.critic(rollout.observations)
    policy = torch.distributions.Categorical(logits=logits)
    logprobs, entropies, terms = policy.log_prob(rollout.actions), policy.entropy(), []
    for copy in range(4):
        for t in range(40):
            if not rollout.valid[t, copy]:
                continue
            target, factor = 0.0, 1.0
            for k in range(t, 40):
                target += factor * float(rollout.rewards[k, copy])
                factor *= 0.9
                if rollout.terminated[k, copy]:
                    break
                if rollout.truncated[k, copy] or k == 39:
                    target += factor * float(rollout.next_values[k, copy])
                    break
            advantage = target - values[t, copy].item()
            error = 0.5 * (values[t, copy] - target) ** 2
            terms.append(-logprobs[t, copy] * advantage + 0.5 * error - 0.1 * entropies[t, copy])
    for mine, theirs in zip(found, gradient_of(trainer, sum(terms) / len(terms)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_those_of_gae_whitened_if_asked(whiten, tmp_path):
    trainer = trainer_of(tmp_path, discount=0.9, trace_decay=0.7, whiten_advantages=whiten)
    rollout = rollout_of(trainer, 40)
    figures = trainer._loss(rollout)[1]
    expected = advantages_by_hand(rollout, discount=0.9, trace_decay=0.7)[rollout.valid]
    # V has not moved, so the error of its return is the advantage.
    torch.testing.assert_close(figures["train/value_loss"], (expected**2).mean() / 2)
    if whiten:
        expected = (expected - expected.mean()) / (expected.std() + 1e-4)
    torch.testing.assert_close(figures["train/policy_loss"], -(rollout.logprobs[rollout.valid] * expected).mean())


@pytest.mark.parametrize("whiten", [False, True])
def test_steps_that_only_reset_change_nothing(whiten, tmp_path):
    trainer = trainer_of(tmp_path, whiten_advantages=whiten)
    rollout = rollout_of(trainer, 128)
    nothing = ~rollout.valid
    other = dataclasses.replace(
        rollout,
        observations=rollout.observations.masked_fill(nothing[..., None], 3.0),
        actions=torch.where(nothing, 1 - rollout.actions, rollout.actions),
        rewards=rollout.rewards.masked_fill(nothing, 100.0),
    )
    pair = [gradient_of(trainer, trainer._loss(one)[0]) for one in (rollout, other)]
    for mine, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("space", "enough"), [(spaces.Discrete(3), 7.9), (spaces.Box(-1, 1, (1,)), -2.0)], ids=["discrete", "box"]
)
def test_the_identity_is_solved(space, enough, tmp_path):
    settings = {"learning_rate": 1e-2, "discount": 0.0, "eval_episodes": 20, "steps": 8192}
    if isinstance(space, spaces.Discrete):
        settings |= {"learning_rate": 2e-2, "rollout_steps": 8, "steps": 1024}
    trainer = trainer_of(tmp_path, lambda: Identity(space), **settings).train()
    assert trainer.run.records()[-1]["eval/mean_reward"] >= enough


def test_an_endless_reward_is_worth_one_over_one_minus_the_discount(tmp_path):
    settings = {"discount": 0.8, "learning_rate": 1e-2, "max_grad_norm": 10.0, "steps": 16384}
    trainer = trainer_of(tmp_path, Endless, **settings).train()
    with torch.no_grad():
        assert float(trainer.critic(torch.ones(1, 1))) == pytest.approx(5, abs=0.1)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    runs = [trainer_of(tmp_path / name, steps=512, seed=seed).train() for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


@pytest.mark.parametrize("environment", ["CartPole-v1", Hidden], ids=["native", "no state"])
def test_a_resumed_run_is_an_unbroken_one(environment, tmp_path):
    settings = {"steps": 1024, "save_every": 256, "normalize_observations": True, "schedule": "linear", **SMALL}
    whole, resumed = unbroken_and_resumed(A2C, A2CConfig, tmp_path, env=environment, stop_after=700, **settings)
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)
