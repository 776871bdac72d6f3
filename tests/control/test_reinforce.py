"""REINFORCE: its expected gradient by enumeration, on-policy and off-policy, with every baseline; and whole runs."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pydantic import ValidationError
from small_environments import Endless, Hidden, Identity, same_records, same_weights, unbroken_and_resumed

from taurl.control.algorithms.reinforce import REINFORCE
from taurl.control.algorithms.reinforce_config import REINFORCEConfig
from taurl.control.rollouts import Rollout

SMALL = {"environments": 4, "record_every": 64, "eval_episodes": 0, "video": False}
STEPS, DISCOUNT = 3, 0.9


class Forked(gymnasium.Env):
    """Two states, two actions, three steps, and a coin in every transition."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)
    MOVES = torch.tensor([[0.9, 0.3], [0.2, 0.6]], dtype=torch.float64)  # P(next state is 1 | state, action)
    REWARDS = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = 0, 0
        return 0, {}

    def step(self, action):
        reward = float(self.REWARDS[self.state, action])
        self.state = int(self.np_random.random() < self.MOVES[self.state, action])
        self.steps += 1
        return self.state, reward, self.steps == STEPS, False, {}


def trajectories():
    """All that can happen, a column each: states, actions [3, 64], and what the environment's coins give it, [64]."""
    found = list(itertools.product([0, 1], repeat=2 * STEPS))
    actions, followed = torch.tensor(found).T[:STEPS], torch.tensor(found).T[STEPS:]
    states = torch.cat([torch.zeros(1, len(found), dtype=torch.long), followed[:-1]])
    moves = Forked.MOVES[states, actions]
    return states, actions, torch.where(followed == 1, moves, 1 - moves).prod(0)


def trainer_of(folder, env=Forked, **settings):
    return REINFORCE(env, REINFORCEConfig(out=folder / "run", **{**SMALL, "discount": DISCOUNT, **settings}))


def exact_trainer(folder, **settings):
    """In float64, with a policy that prefers something."""
    torch.manual_seed(0)
    trainer = trainer_of(folder, hidden=(4,), **settings)
    trainer.policy.actor.double()
    if trainer.critic is not None:
        trainer.critic.double()
    randomize(trainer)
    return trainer


def randomize(trainer):
    with torch.no_grad():
        for parameter in trainer.policy.actor.parameters():
            parameter.copy_(torch.randn_like(parameter))


def rollout_of(trainer) -> Rollout:
    """All trajectories as if each had been played once by the present policy."""
    states, actions, _ = trajectories()
    observations = torch.nn.functional.one_hot(states, 2).double()
    with torch.no_grad():
        parameters = trainer.policy.actor(observations)
        values = torch.zeros(states.shape).double() if trainer.critic is None else trainer.critic(observations)
    nothing = torch.zeros(states.shape, dtype=torch.bool)
    terminated = nothing.clone()
    terminated[-1] = True
    return Rollout(
        observations=observations,
        actions=actions,
        logprobs=trainer.policy.distribution.logprobs(parameters, actions),
        parameters=parameters,
        rewards=Forked.REWARDS[states, actions],
        terminated=terminated,
        truncated=nothing,
        valid=~nothing,
        values=values,
        next_values=torch.full(states.shape, torch.nan, dtype=torch.float64),
    )


def of_copy(rollout, column):
    """What one copy of the environment did."""
    columns = {name: value for name, value in vars(rollout).items() if value is not None}
    return Rollout(**{name: value[:, column : column + 1] for name, value in columns.items()})


def expected_gradient(trainer, rollout, *, on_policy):
    """E over what the policy that acted and the coins give, of the gradient of each trajectory alone."""
    coins = trajectories()[2]
    chances = coins * rollout.logprobs.sum(0).exp()
    assert float(chances.sum()) == pytest.approx(1)
    parameters = list(trainer.policy.actor.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for column, chance in enumerate(chances):
        one = of_copy(rollout, column)
        loss, _ = trainer._loss(trainer._scored(one), on_policy)
        total += chance * torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    return total


def true_gradient(trainer):
    """Of −J, J = Σ over states and times of E[r_t] as a product of matrices, by autograd; γ = 1."""
    logits = trainer.policy.actor(torch.eye(2).double())
    policy = logits.softmax(-1)
    at, total = torch.tensor([1.0, 0.0]).double(), 0.0
    for _ in range(STEPS):
        chosen = at[:, None] * policy
        total = total + (chosen * Forked.REWARDS).sum()
        to_one = (chosen * Forked.MOVES).sum()
        at = torch.stack([1 - to_one, to_one])
    gradient = torch.autograd.grad(-total, list(trainer.policy.actor.parameters()))
    return torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("baseline", ["none", "constant", "learned"])
def test_the_expected_gradient_is_the_gradient_whatever_the_baseline(baseline, tmp_path):
    trainer = exact_trainer(tmp_path, baseline=baseline, discount=1.0)
    if baseline == "constant":
        trainer.moving_mean.update(torch.tensor(1.7))
    found = expected_gradient(trainer, rollout_of(trainer), on_policy=True)
    torch.testing.assert_close(found, true_gradient(trainer))


@pytest.mark.parametrize("importance", ["per_decision", "trajectory"])
@pytest.mark.parametrize("baseline", ["none", "constant", "learned"])
def test_episodes_of_an_older_policy_give_the_same_gradient_in_expectation(importance, baseline, tmp_path):
    trainer = exact_trainer(tmp_path, importance=importance, baseline=baseline, updates=2)
    if baseline == "constant":
        trainer.moving_mean.update(torch.tensor(1.7))
    older = rollout_of(trainer)
    randomize(trainer)
    on_policy = expected_gradient(trainer, rollout_of(trainer), on_policy=True)
    off_policy = expected_gradient(trainer, older, on_policy=False)
    torch.testing.assert_close(off_policy, on_policy)
    unweighted = expected_gradient(trainer, older, on_policy=True)
    assert (unweighted - on_policy).norm() > 0.1 * on_policy.norm(), "the two policies are too close to tell"


def variance_of(trainer, rollout, **settings):
    """Of the gradient of single trajectories, summed over the parameters."""
    coins = trajectories()[2]
    chances, parameters = coins * rollout.logprobs.sum(0).exp(), list(trainer.policy.actor.parameters())
    mean, square = 0.0, 0.0
    for column, chance in enumerate(chances):
        one = of_copy(rollout, column)
        loss, _ = trainer._loss(trainer._scored(one), settings["on_policy"])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        mean, square = mean + chance * gradient, square + chance * gradient.square()
    return float((square - mean**2).sum())


def test_weights_by_decision_have_less_variance(tmp_path):
    found = {}
    for importance in ("per_decision", "trajectory"):
        trainer = exact_trainer(tmp_path / importance, importance=importance, baseline="none", updates=2)
        older = rollout_of(trainer)
        randomize(trainer)
        found[importance] = variance_of(trainer, older, on_policy=False)
    assert found["per_decision"] < 0.9 * found["trajectory"]


def test_weights_of_the_policy_that_acted_are_one(tmp_path):
    trainer = exact_trainer(tmp_path)
    episodes = trainer._scored(rollout_of(trainer))
    (first, figures), (second, _) = (trainer._loss(episodes, on_policy) for on_policy in (False, True))
    torch.testing.assert_close(first, second)
    assert float(figures["train/effective_samples"]) == pytest.approx(1)


def test_the_entropy_bonus_is_the_sum_over_an_episode_times_its_weight(tmp_path):
    trainer = exact_trainer(tmp_path, entropy_coefficient=0.3)
    rollout = rollout_of(trainer)
    logits = trainer.policy.actor(rollout.observations)
    bonus = 0.3 * torch.distributions.Categorical(logits=logits).entropy().sum(0).mean()
    with_it, plain = trainer.config, trainer.config.model_copy(update={"entropy_coefficient": 0.0})
    for on_policy in (True, False):
        losses = []
        for trainer.config in (with_it, plain):
            losses.append(trainer._loss(trainer._scored(rollout), on_policy)[0])
        torch.testing.assert_close(losses[0], losses[1] - bonus)


def test_the_constant_baseline_is_the_mean_of_earlier_iterations(tmp_path):
    trainer = trainer_of(tmp_path, baseline="constant")
    rollout = trainer.collector.collect_episodes(trainer.policy.actor, None)
    first = trainer._scored(rollout)
    assert not first.baselines.any()
    trainer._iterate(rollout, 12)
    mean = float(first.returns.mean())
    assert float(trainer._scored(rollout).baselines[0, 0]) == pytest.approx(mean)
    trainer.moving_mean.update(torch.tensor(mean + 1))
    assert float(trainer.moving_mean.value) == pytest.approx(mean + 0.1)


def endless_returns(folder, **settings):
    trainer = trainer_of(folder, Endless, **{"discount": 0.5, **settings})
    rollout = trainer.collector.collect_episodes(trainer.policy.actor, trainer.critic)
    return trainer._scored(rollout), rollout


def test_a_critic_bootstraps_at_time_limits(tmp_path):
    episodes, rollout = endless_returns(tmp_path)
    assert rollout.truncated[-1].all()
    torch.testing.assert_close(episodes.returns[-1], 1 + 0.5 * rollout.next_values[-1])


def test_an_episode_that_never_ends_is_cut_as_by_a_time_limit(tmp_path):
    settings = REINFORCEConfig(out=tmp_path / "run", steps=64, max_episode_steps=7, **SMALL)
    trainer = REINFORCE(lambda: Endless(limit=10**9), settings)
    rollout = trainer.collector.collect_episodes(trainer.policy.actor, trainer.critic, longest=7)
    assert rollout.rewards.shape == (7, 4)
    assert rollout.truncated[-1].all()
    assert not rollout.truncated[:-1].any()
    assert {episode.length for episode in trainer.environments.take_episodes()} == {7}
    assert trainer.train().run.step >= 64


def test_without_a_critic_truncated_episodes_count_or_do_not(tmp_path):
    counted, _ = endless_returns(tmp_path / "a", baseline="none")
    assert counted.returns[:, 0].tolist() == [1.9375, 1.875, 1.75, 1.5, 1.0]
    assert counted.counted.all()
    left_out, rollout = endless_returns(tmp_path / "b", baseline="none", count_truncated=False)
    assert rollout.valid.all()
    assert not left_out.counted.any()


def test_episodes_that_are_left_out_count_nowhere(tmp_path):
    trainer = trainer_of(tmp_path, Endless, baseline="none", discount=0.5)
    scored = trainer._scored(trainer.collector.collect_episodes(trainer.policy.actor, trainer.critic))

    def loss(*episodes):
        counted = torch.zeros_like(scored.counted)
        counted[:, list(episodes)] = True
        return trainer._loss(scored._replace(counted=counted), True)[0]

    torch.testing.assert_close(loss(0, 1), (loss(0) + loss(1)) / 2)
    assert loss().item() == 0


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="count_truncated is for baseline none or constant"):
        REINFORCEConfig(count_truncated=False)
    with pytest.raises(ValidationError, match="importance is 'trajectory', but updates is 1"):
        REINFORCEConfig(importance="trajectory")
    with pytest.raises(ValidationError, match="critic_updates is 3, but baseline is none, without a critic"):
        REINFORCEConfig(baseline="none", critic_updates=3)


class Waiting(Identity):
    """Episodes of 1 to 8 steps, so that most copies wait for another."""

    def step(self, action):
        shown, reward, *_ = super().step(action)
        return shown, reward, bool(self.np_random.random() < 0.3), self.steps == 8, {}


def test_what_is_stepped_beyond_an_episode_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, Waiting)
    rollout = trainer.collector.collect_episodes(trainer.policy.actor, trainer.critic)
    assert not rollout.valid.all()
    gradients = []
    for shift in (0.0, 10.0):
        beyond = ~rollout.valid
        moved = Rollout(**vars(rollout) | {"observations": rollout.observations + shift * beyond[..., None]})
        episodes = trainer._scored(moved)
        losses = [(trainer._loss(episodes, flag)[0], trainer.policy.actor) for flag in (True, False)]
        losses.append((trainer._critic_loss(episodes)[0], trainer.critic))
        gradients += [[*torch.autograd.grad(loss, list(module.parameters()))] for loss, module in losses]
    for one, other in zip(gradients[:3], gradients[3:], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-1, 1, (1,), np.float32)], ids=["discrete", "box"])
@pytest.mark.parametrize(("updates", "rate"), [(1, 2e-2), (2, 1e-2)])
def test_the_identity_is_learned(space, updates, rate, tmp_path):
    settings = {"discount": 0.0, "learning_rate": rate, "environments": 16, "eval_episodes": 20, "updates": updates}
    trainer = trainer_of(tmp_path, lambda: Identity(space), steps=10_000, **settings).train()
    enough = 7.9 if isinstance(space, spaces.Discrete) else -2.0
    records = trainer.run.records()
    assert records[-1]["eval/mean_reward"] >= enough
    assert (min(record["train/effective_samples"] for record in records) == 1) == (updates == 1)


@pytest.mark.parametrize(
    ("settings", "environment"), [({"baseline": "constant"}, "CartPole-v1"), ({"updates": 2}, Hidden)]
)
def test_a_resumed_run_is_an_unbroken_one(environment, settings, tmp_path):
    shared = {"steps": 2000, "save_every": 400, "normalize_observations": True, **SMALL, **settings}
    whole, resumed = unbroken_and_resumed(
        REINFORCE, REINFORCEConfig, tmp_path, env=environment, stop_after=1000, **shared
    )
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    runs = [trainer_of(tmp_path / name, steps=500, seed=seed).train() for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])
