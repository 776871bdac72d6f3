"""PPO with a price on the divergence: the rule for the price, the gradient, and a run that keeps to the target."""

import math

import pytest
import torch
from gymnasium import spaces
from small_environments import same_records, same_weights, unbroken_and_resumed

from taurl.control.algorithms.ppo import PPO, Clips, flat
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.distributions import distribution_for
from taurl.control.networks import both_with_pullback
from taurl.control.penalties import KLPenalty
from taurl.functional.aggregation import row_weights

SMALL = {"environments": 4, "rollout_steps": 64, "minibatch_size": 64, "epochs": 4, "record_every": 256, "video": False}
PRICED = {**SMALL, "kl_penalty_target": 0.01, "learning_rate": 1e-3}


def test_the_price_follows_the_divergence():
    penalty = KLPenalty(1.0, 0.03)
    seen = []
    for divergence in (0.019, 0.0201, 0.044, 0.046, 0.046, 0.1, 0.0):
        penalty.adapt(divergence)
        seen.append(penalty.coefficient)
    assert seen == [0.5, 0.5, 0.5, 1.0, 2.0, 4.0, 2.0]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_gradient_is_that_of_the_priced_objective(env, tmp_path):
    trainer = PPO(env, PPOConfig(out=tmp_path / "run", **PRICED, kl_coefficient=3.0, entropy_coefficient=0.1))
    actor, distribution = trainer.policy.actor, trainer.policy.distribution
    rollout = trainer.collector.collect(actor, trainer.critic, 64)
    with torch.no_grad():
        for weight in actor.parameters():  # away from where the divergence and its gradient are 0
            weight.add_(0.1 * torch.randn_like(weight))
    batch = trainer._prepared([flat(rollout, torch.randn(64, 4), rollout.values, priced=True)])[0]
    parameters = actor(batch.observations)
    counts = batch.valid
    old = [distribution_of(env, part) for part in (batch.old_parameters[counts], parameters[counts])]
    divergences = torch.distributions.kl_divergence(*old)
    ratios = (distribution.logprobs(parameters, batch.actions)[counts] - batch.logprobs[counts]).exp()
    entropies = distribution.entropy(parameters)[counts]
    expected = (-ratios * batch.advantages[counts] + 3.0 * divergences - 0.1 * entropies).mean()
    wanted = torch.autograd.grad(expected, list(actor.parameters()))
    trainer.optimizer.step = lambda rate: 0.0
    networks = both_with_pullback(trainer.policy.actor, trainer.critic)
    figures = trainer._descend(networks, batch, 0.0, Clips(math.inf, None), measured=True)[1]
    assert float(divergences.mean()) > 1e-3
    for weight, theirs in zip(actor.parameters(), wanted, strict=True):
        torch.testing.assert_close(weight.grad, theirs, rtol=1e-4, atol=1e-6)
    policy_loss = (-ratios * batch.advantages[counts] + 3.0 * divergences).mean()
    torch.testing.assert_close(figures["train/policy_loss"], policy_loss.detach(), rtol=1e-4, atol=1e-6)


def distribution_of(env, parameters):
    if env == "CartPole-v1":
        return torch.distributions.Categorical(logits=parameters)
    mean, log_std = parameters.chunk(2, -1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


def test_the_price_of_standing_still_is_flat():
    distribution = distribution_for(spaces.Discrete(3))
    parameters = torch.randn(5, 3)
    gradient = KLPenalty(2.0, 0.01).gradient(
        distribution, parameters, parameters.clone().numpy(), row_weights(torch.ones(5) > 0)
    )
    torch.testing.assert_close(torch.from_numpy(gradient), torch.zeros(5, 3))


@pytest.mark.slow
def test_a_run_keeps_near_its_target(tmp_path):
    config = PPOConfig(out=tmp_path / "run", steps=12_800, eval_episodes=20, kl_coefficient=64.0, **PRICED)
    trainer = PPO("CartPole-v1", config).train()
    records = trainer.run.records()
    early, late = ([record["train/kl"] for record in part] for part in (records[:3], records[-25:]))
    assert max(early) < 0.005  # far too dear at first
    assert 0.01 / 3 < sum(late) / len(late) < 0.01 * 3
    assert records[0]["train/kl_coefficient"] == 64.0
    assert records[-1]["train/kl_coefficient"] < 32.0
    assert "train/clip_fraction" not in records[-1]  # nothing is clipped
    assert records[-1]["eval/mean_reward"] > 100  # of 9 to 22 at first


def test_the_divergence_is_that_from_the_policy_that_acted(tmp_path):
    trainer = PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", **{**PRICED, "learning_rate": 0.02}))
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 64)
    figures = trainer._iterate(rollout, 256)
    with torch.no_grad():
        new = trainer.policy.actor(rollout.observations)
    pair = [torch.distributions.Categorical(logits=logits[rollout.valid]) for logits in (rollout.parameters, new)]
    found, turned = (float(torch.distributions.kl_divergence(*each).mean()) for each in (pair, pair[::-1]))
    assert figures["train/kl"] == pytest.approx(found, rel=1e-3)
    assert abs(turned - found) > 0.005 * found


def test_a_resumed_run_with_a_price_is_an_unbroken_one(tmp_path):
    whole, resumed = unbroken_and_resumed(
        PPO, PPOConfig, tmp_path, env="CartPole-v1", stop_after=2000, steps=3072, save_every=1024, **PRICED
    )
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)
    assert whole.penalty.coefficient == resumed.penalty.coefficient != 1.0
