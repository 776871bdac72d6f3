"""PPO: environments that it solves, values at time limits, the first ratio, and runs that repeat and go on."""

import dataclasses
import math

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

from taurl.control.algorithms.ppo import PPO, Clips, flat
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.networks import both_with_pullback
from taurl.control.rollouts import Collector
from taurl.runtime.errors import InputError

SMALL = {"environments": 4, "rollout_steps": 16, "minibatch_size": 32, "epochs": 2, "record_every": 64, "video": False}
QUIET = {**SMALL, "eval_episodes": 0}


def trainer_of(folder, env="CartPole-v1", **settings):
    return PPO(env, PPOConfig(out=folder / "run", **{**QUIET, **settings}))


@pytest.mark.parametrize(
    ("space", "enough"),
    [(spaces.Discrete(3), 7.9), (spaces.Box(-1, 1, (1,)), -1.2)],  # of 8, and of −5.3 for always 0
    ids=["discrete", "box"],
)
def test_the_identity_is_solved_in_a_thousand_steps(space, enough, tmp_path):
    settings = {"learning_rate": 3e-3, "discount": 0.0, "epochs": 10, "entropy_coefficient": 0.2, "eval_episodes": 20}
    settings |= {"rollout_steps": 32, "record_every": 128, "steps": 1024}
    trainer = trainer_of(tmp_path, lambda: Identity(space), **settings).train()
    assert trainer.run.records()[-1]["eval/mean_reward"] >= enough


def value_of_an_endless_reward(folder):
    """V after some learning, for γ = 0.8; a time limit cuts every 5 steps."""
    settings = {"discount": 0.8, "learning_rate": 1e-2, "epochs": 4, "max_grad_norm": 10.0, "steps": 4000}
    trainer = trainer_of(folder, Endless, **settings).train()
    with torch.no_grad():
        return float(trainer.critic(torch.ones(1, 1)))


def test_an_endless_reward_is_worth_one_over_one_minus_the_discount(tmp_path):
    assert value_of_an_endless_reward(tmp_path) == pytest.approx(5, abs=0.1)


def test_it_would_not_be_if_truncation_were_termination(tmp_path, monkeypatch):
    collect = Collector.collect

    def mistaken(*arguments):
        rollout = collect(*arguments)
        nothing = torch.zeros_like(rollout.truncated)
        return dataclasses.replace(rollout, terminated=rollout.terminated | rollout.truncated, truncated=nothing)

    monkeypatch.setattr(Collector, "collect", mistaken)
    # All steps look alike: (1 − γ^k) / (1 − γ) is 2.3 in the mean of k = 1 … 5, and V = 1 + γ · 4/5 · V gives 2.8.
    assert 2.2 < value_of_an_endless_reward(tmp_path) < 2.9


def test_the_first_ratio_is_one(tmp_path):
    trainer = trainer_of(tmp_path)
    first = []
    descend = trainer._descend

    def watched(*arguments, measured):
        found = descend(*arguments, measured=True)
        first.append(found[1])
        return found

    trainer._descend = watched
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 16)
    trainer._iterate(rollout, 64)
    assert len(first) == 4
    # 0 but for the last bit of a float32: a minibatch is another matrix product than the whole rollout.
    assert float(first[0]["train/approx_kl"]) < 1e-10
    assert float(first[0]["train/clip_fraction"]) == 0
    assert float(first[1]["train/approx_kl"]) > 1e-10


def test_its_first_gradient_is_the_policy_gradient(tmp_path):
    trainer = trainer_of(tmp_path, value_coefficient=0.0, whiten_advantages=False)
    actor = trainer.policy.actor
    rollout = trainer.collector.collect(actor, trainer.critic, 16)
    advantages = torch.randn(16, 4)
    batch = flat(rollout, advantages, rollout.values)
    loss, _ = trainer._loss(actor(batch.observations), trainer.critic(batch.observations), batch, Clips(0.2, None))
    found = torch.autograd.grad(loss, list(actor.parameters()))
    logits = actor(rollout.observations[rollout.valid])
    logprobs = torch.distributions.Categorical(logits=logits).log_prob(rollout.actions[rollout.valid])
    expected = torch.autograd.grad(-(logprobs * advantages[rollout.valid]).mean(), list(actor.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_steps_that_only_reset_change_nothing(tmp_path):
    trainer = trainer_of(tmp_path, rollout_steps=128)
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 128)
    assert not rollout.valid.all()
    advantages, returns = torch.randn(2, 128, 4)
    nothing = ~rollout.valid
    other = dataclasses.replace(
        rollout,
        observations=rollout.observations.masked_fill(nothing[..., None], 3.0),
        actions=torch.where(nothing, 1 - rollout.actions, rollout.actions),
    )
    gradients = []
    for one, shift in ((rollout, 0.0), (other, 100.0)):
        batch = trainer._prepared([flat(one, advantages + shift * nothing, returns + shift * nothing)])[0]
        parameters = [*trainer.policy.actor.parameters(), *trainer.critic.parameters()]
        outputs = trainer.policy.actor(batch.observations), trainer.critic(batch.observations)
        gradients.append(torch.autograd.grad(trainer._loss(*outputs, batch, Clips(0.2, None))[0], parameters))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_parameters_may_move_between_iterations(tmp_path):
    """As they do when they are sent to another process, or shared with one."""
    trainer = trainer_of(tmp_path, steps=256)
    before = [parameter.clone() for parameter in trainer.policy.actor.parameters()]
    for record in trainer.steps():
        trainer.policy.actor.share_memory()
        trainer.critic.share_memory()
        assert math.isfinite(record["loss"])
    moved = zip(trainer.policy.actor.parameters(), before, strict=True)
    assert all(not torch.equal(parameter, start) for parameter, start in moved)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    runs = [trainer_of(tmp_path / name, steps=512, seed=seed).train() for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert same_weights(runs[0], runs[1])
    assert same_records(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


RESUMED = {**SMALL, "steps": 1024, "save_every": 256, "eval_every": 256, "eval_episodes": 3, "schedule": "linear"}
SCALES = {"normalize_observations": True, "normalize_rewards": True}


@pytest.mark.parametrize(
    "environment",
    ["CartPole-v1", "Acrobot-v1", Identity, Hidden],
    ids=["native", "classic", "own", "no state"],
)
def test_a_resumed_run_is_an_unbroken_one(environment, tmp_path):
    whole, resumed = unbroken_and_resumed(
        PPO, PPOConfig, tmp_path, env=environment, stop_after=700, **RESUMED, **SCALES
    )
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)
    assert torch.equal(whole.optimizer.mean, resumed.optimizer.mean)


def test_a_clip_that_falls_with_the_steps_does_not_go_on_with_more_of_them(tmp_path):
    config = PPOConfig(env="CartPole-v1", out=tmp_path / "run", steps=256, anneal_clip=True, eval_episodes=0)
    PPO(config=config.model_copy(update={"environments": 2, "rollout_steps": 32})).train()
    longer = PPO.config_class(**{**config.model_dump(), "environments": 2, "rollout_steps": 32, "steps": 512})
    with pytest.raises(
        InputError, match=r"steps was 256 and cannot become 512: what spreads over all steps \(anneal_clip\)"
    ):
        PPO.resume(tmp_path / "run", longer)


def test_both_bounds_fall_to_nothing_together(tmp_path):
    trainer = trainer_of(tmp_path, steps=1000, anneal_clip=True, clip=0.2, value_clip=0.4)
    assert trainer._clips(1) == Clips(0.2, 0.4)
    assert trainer._clips(751) == pytest.approx((0.05, 0.1))
    steady = trainer_of(tmp_path / "steady", steps=1000, clip=0.2, value_clip=0.4)
    assert steady._clips(751) == Clips(0.2, 0.4)


def descents(trainer, rollout, step):
    """Of each update of an iteration that begins with that step: minibatch, rate, bounds, and the figures."""
    descend, seen = trainer._descend, []

    def watched(networks, batch, rate, clips, *, measured):
        found = descend(networks, batch, rate, clips, measured=measured)
        seen.append((batch, rate, clips, found[1]))
        return found

    trainer._descend = watched
    trainer._iterate(rollout, step)
    return seen


def rollout_of(trainer):
    return trainer.collector.collect(trainer.policy.actor, trainer.critic, trainer.config.rollout_steps)


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_and_returns_are_those_of_gae(whiten, tmp_path):
    settings = {"discount": 0.9, "trace_decay": 0.7, "whiten_advantages": whiten, "minibatch_size": 128, "epochs": 1}
    trainer = trainer_of(tmp_path, rollout_steps=32, **settings)
    rollout = rollout_of(trainer)
    valid = rollout.valid
    assert not valid.all()
    ((batch, *_),) = descents(trainer, rollout, 128)
    expected = advantages_by_hand(rollout, discount=0.9, trace_decay=0.7)
    torch.testing.assert_close(batch.returns.view(32, 4)[valid], (expected + rollout.values)[valid])
    if whiten:
        expected = (expected - expected[valid].mean()) / (expected[valid].std() + 1e-4)
    torch.testing.assert_close(batch.advantages.view(32, 4)[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_epochs_end_where_the_divergence_exceeds_one_and_a_half_times_its_target(tmp_path):
    def iterated(name, target):
        """Updates of two epochs of two, and the divergence at the end of the first."""
        trainer = trainer_of(tmp_path / name, target_kl=target)  # all begin alike
        seen = descents(trainer, rollout_of(trainer), 64)
        assert len(seen) == trainer.optimizer.changes
        return len(seen), float(seen[1][3]["train/approx_kl"])

    whole, divergence = iterated("whole", 1e9)
    assert whole == 4
    assert iterated("below", divergence / 1.4) == (4, divergence)
    assert iterated("above", divergence / 1.6) == (2, divergence)


def test_an_iteration_has_the_rate_and_the_bounds_of_its_step(tmp_path):
    settings = {"schedule": "linear", "learning_rate": 1e-2, "clip": 0.2, "value_clip": 0.4, "anneal_clip": True}
    trainer = trainer_of(tmp_path, steps=1000, **settings)
    seen = descents(trainer, rollout_of(trainer), 751)
    assert [(rate, *clips) for _, rate, clips, _ in seen] == [pytest.approx((2.5e-3, 0.05, 0.1))] * 4


@pytest.mark.parametrize(
    ("value_clip", "said"), [(None, "anneal_clip does nothing"), (0.4, "anneal_clip is for value_clip alone")]
)
def test_with_a_price_only_the_bound_of_the_value_falls(value_clip, said, tmp_path, capsys):
    settings = {"kl_penalty_target": 0.01, "value_clip": value_clip, "anneal_clip": True}
    trainer = trainer_of(tmp_path, steps=1000, **settings)
    assert f"kl_penalty_target takes the place of the clip, so {said}\n" in capsys.readouterr().err
    bounds = trainer._clips(751)
    trainer_of(tmp_path / "another", **settings, clip=0.1)  # as the preset of an environment has it
    assert "so clip 0.1 does nothing\n" in capsys.readouterr().err
    assert bounds.ratio == math.inf
    assert bounds.value == (value_clip and pytest.approx(0.1))
    assert trainer.config.spread_over_steps == (value_clip and "anneal_clip")


def test_saving_changes_nothing_where_the_state_can_be_had(tmp_path):
    often, never = (
        trainer_of(tmp_path / str(every), steps=512, save_every=every, **SCALES).train() for every in (64, 0)
    )
    assert same_weights(often, never)


def test_that_a_state_cannot_be_had_is_said_once(tmp_path):
    trainer, said = trainer_of(tmp_path, Hidden, steps=512, save_every=64), []
    trainer.run.view.note = said.append
    trainer.train()
    assert len(said) == 1
    assert "Hidden.world is of type object" in said[0]
    assert "\n" not in said[0]


def test_nothing_is_said_where_it_does_not_matter(tmp_path):
    trainer, said = trainer_of(tmp_path, Hidden, steps=128), []  # saved at the end only
    trainer.run.view.note = said.append
    trainer.train()
    assert said == []


SPACES = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1, 1, (2,)),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(2),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("value_clip", [None, 0.1])
def test_the_written_gradient_is_that_of_the_loss(space, activation, value_clip, tmp_path):
    coefficients = {"entropy_coefficient": 0.3, "value_coefficient": 0.6}
    settings = {"activation": activation, "value_clip": value_clip, **coefficients}
    trainer = trainer_of(tmp_path, lambda: Identity(space), **settings)
    actor, critic = trainer.policy.actor, trainer.critic
    rollout = trainer.collector.collect(actor, critic, 16)
    batch = trainer._prepared([flat(rollout, torch.randn(16, 4), rollout.values + torch.randn(16, 4))])[0]
    # As if the policy and the critic had moved: some ratios and values are clipped, some are not.
    moved = {"logprobs": batch.logprobs + 0.3 * torch.randn(64), "values": batch.values + 0.3 * torch.randn(64)}
    batch = batch._replace(**moved)
    with torch.no_grad():
        trainer._set_gradient(both_with_pullback(actor, critic), batch, Clips(0.2, value_clip))
    written = trainer.optimizer.gradient.clone()
    loss, figures = trainer._loss(actor(batch.observations), critic(batch.observations), batch, Clips(0.2, value_clip))
    assert 0 < figures["train/clip_fraction"] < 1
    log_ratios = trainer.policy.distribution.logprobs(actor(batch.observations), batch.actions) - batch.logprobs
    divergence = (log_ratios.exp() - 1 - log_ratios).mean().detach()  # k3, of steps that the policy before drew
    torch.testing.assert_close(figures["train/approx_kl"], divergence, rtol=1e-4, atol=1e-6)
    expected = torch.autograd.grad(loss, list(trainer.optimizer.named.values()))
    torch.testing.assert_close(written, torch.cat([one.flatten() for one in expected]), rtol=1e-4, atol=1e-6)


def test_what_acts_and_what_learns_are_one_network(tmp_path):
    for activation in ("tanh", "relu"):
        trainer = trainer_of(tmp_path / activation, lambda: Identity(spaces.Box(-1, 1, (2,))), activation=activation)
        observations = torch.randn(9, trainer.policy.width)
        act = trainer.policy.actor.of_arrays()
        for _ in range(2):  # before and after the weights move
            with torch.no_grad():
                found = torch.from_numpy(act(observations.numpy()))
                torch.testing.assert_close(found, trainer.policy.actor(observations), rtol=1e-5, atol=1e-6)
                trainer.optimizer.parameters += 0.1
