"""DQN: gradients by hand against automatic ones, targets, time limits, an environment that it solves, and resuming."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from pydantic import ValidationError

from taurl.control.action_values import DuelingNetwork, QNetwork, TargetNetwork, ValuePolicy
from taurl.control.algorithms.dqn import DQN
from taurl.control.algorithms.dqn_config import DQNConfig
from taurl.control.dense import Dense
from taurl.control.replay import Batch
from taurl.control.saved import load
from taurl.runtime.errors import InputError

SMALL = {
    "video": False,
    "hidden": (32,),
    "environments": 4,
    "train_every": 4,
    "gradient_steps": 2,
    "learning_starts": 64,
    "buffer_size": 2000,
    "target_every": 100,
    "record_every": 1,
    "eval_episodes": 0,
}


class Echo(gymnasium.Env):
    """The reward is 1 where the action is the digit that was shown; a time limit cuts after 10 of them."""

    observation_space = spaces.Discrete(3)
    action_space = spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def _show(self):
        self.shown = int(self.np_random.integers(3))
        return self.shown

    def step(self, action):
        reward = float(action - 5 == self.shown)
        self.steps += 1
        return self._show(), reward, False, self.steps == 10, {}


class Endless(gymnasium.Env):
    """The reward is always 1 and nothing ever changes, but an episode ends after five steps, one way or the other."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, *, terminates=False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        ends = self.steps == 5
        return np.ones(1, dtype=np.float32), 1.0, ends and self.terminates, ends and not self.terminates, {}


class Counting(gymnasium.Env):
    """Shows how many steps its episode has had: 0, 1, 2, 3 and again."""

    observation_space = spaces.Box(0, 3, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps], dtype=np.float32), float(self.steps), False, self.steps == 3, {}


def trained(tmp_path, env, **settings):
    return DQN(env, DQNConfig(out=tmp_path / "run", **{**SMALL, **settings}))


@pytest.mark.parametrize("kind", [QNetwork, DuelingNetwork])
@pytest.mark.parametrize("hidden", [(7,), (7, 5), (7, 6, 5)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_gradient_by_hand_is_the_automatic_one(kind, hidden, activation):
    torch.manual_seed(0)
    network = kind(4, 3, hidden, activation).double()
    observations, weights = torch.randn(11, 4).double(), torch.randn(11, 3).double()
    expected = torch.autograd.grad((network(observations) * weights).sum(), tuple(network.parameters()))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)  # set, not added to
    values, pullback = network.with_pullback()(observations.numpy())
    pullback(weights.numpy())
    assert torch.allclose(torch.from_numpy(values), network(observations), rtol=1e-12)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_dense_network_is_that_of_layers_one_after_the_other(activation):
    torch.manual_seed(0)
    dense = Dense([3, 5, 4, 2], activation, last_gain=0.5, activate_last=True)
    expected = observations = torch.randn(9, 3)
    for linear, gain in zip(dense.linears, (2**0.5, 2**0.5, 0.5), strict=True):
        torch.nn.init.uniform_(linear.bias)
        smaller = min(linear.weight.shape)
        products = linear.weight @ linear.weight.T if smaller == len(linear.weight) else linear.weight.T @ linear.weight
        torch.testing.assert_close(products, gain**2 * torch.eye(smaller))  # orthogonal
        expected = getattr(torch, activation)(linear(expected))
    for found in (dense(observations), dense(observations.view(3, 3, 3)).view(9, 2)):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        for found in (dense(observations), dense(observations.view(3, 3, 3)).view(9, 2)):
            torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    torch.testing.assert_close(torch.from_numpy(dense.of_arrays()(observations.numpy())), expected)


def test_a_dueling_network_tells_values_from_advantages():
    network = DuelingNetwork(4, 3, (8,), "relu")
    observations = torch.randn(6, 4)
    assert torch.allclose(network(observations).mean(-1), network.value(observations).squeeze(-1), atol=1e-6)


def test_an_update_is_a_step_of_adam_down_the_weighted_loss(tmp_path):
    trainer = trained(tmp_path, "CartPole-v1", learning_rate=0.01, max_grad_norm=0.1)
    other = copy.deepcopy(trainer.network)
    torch.manual_seed(1)
    batch = Batch(
        observations=torch.randn(8, 4),
        actions=torch.randint(2, (8,)),
        rewards=torch.zeros(8),
        next_observations=torch.zeros(8, 4),
        terminated=torch.zeros(8, dtype=torch.bool),
        discounts=torch.zeros(8),
        weights=torch.rand(8),
        places=torch.arange(8),
    )
    targets = torch.randn(8) * 3
    adam = torch.optim.Adam(other.parameters(), lr=0.01)
    for _ in range(3):
        with torch.no_grad():
            trainer._update(trainer.network.with_pullback(), batch, targets, 0.01)
        adam.zero_grad()
        values = other(batch.observations)[torch.arange(8), batch.actions]
        (torch.nn.functional.smooth_l1_loss(values, targets, reduction="none") * batch.weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        adam.step()
    for mine, theirs in zip(trainer.network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_an_update_leaves_its_errors_as_priorities(tmp_path):
    trainer = trained(tmp_path, "CartPole-v1", prioritized=True, priority_exponent=0.5, train_every=40)
    trainer._act(0)
    with torch.no_grad():
        batch = trainer.replay.batch(np.array([3, 1, 8]), discount=0.9, steps=1)
        errors = torch.tensor([1.0, -2.0, 0.0])
        values = trainer.network(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)
        trainer._update(trainer.network.with_pullback(), batch, values + errors, 0.01)
    expected = (errors.abs() + 1e-6).sqrt().tolist()
    assert trainer.replay.tree.priorities[[3, 1, 8]].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "each"), [({}, [160]), ({"double": True}, [32] * 5), ({"prioritized": True}, [32] * 5)]
)
def test_what_an_update_changes_is_seen_by_the_next(tmp_path, options, each, monkeypatch):
    """Several are drawn and have their targets at once only where neither depends on the updates between."""
    trainer = trained(tmp_path, "CartPole-v1", gradient_steps=5, train_every=40, **options)
    trainer._act(0)
    drawn, draw = [], trainer._draw
    monkeypatch.setattr(trainer, "_draw", lambda count, taken: drawn.append(count) or draw(count, taken))
    trainer._learn(40)
    assert drawn == each
    assert trainer.optimizer.changes == 5


def test_exploration_is_full_until_learning_starts_and_then_falls(tmp_path):
    settings = {"epsilon_start": 0.8, "epsilon_end": 0.2, "epsilon_fraction": 0.5, "learning_starts": 100}
    trainer = trained(tmp_path, "CartPole-v1", steps=1000, **settings)
    expected = {0: 1.0, 99: 1.0, 100: 0.68, 250: 0.5, 500: 0.2, 900: 0.2}
    assert [trainer._epsilon(taken) for taken in expected] == pytest.approx([*expected.values()])


def test_actions_are_at_random_as_often_as_epsilon_says(tmp_path):
    settings = {"epsilon_start": 1.0, "epsilon_end": 0.0, "epsilon_fraction": 1.0, "learning_starts": 0}
    trainer = trained(tmp_path, Echo, steps=8000, train_every=4000, buffer_size=4000, **settings)
    last = trainer.network.layers.linears[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, 1.0, 0.0])  # the greedy action is 1
    trainer._act(4000)  # ε goes from 1/2 to 0
    counts = np.stack([np.bincount(part, minlength=3) for part in np.split(trainer.replay.actions[:4000], 4)]) / 1000
    at_random = np.array([[0.4375], [0.3125], [0.1875], [0.0625]]) / 3
    assert counts == pytest.approx(at_random + [[0, 1, 0]] * (1 - 3 * at_random), abs=0.03)


def test_the_weights_of_what_is_drawn_by_priority_come_to_undo_the_preference(tmp_path):
    trainer = trained(tmp_path, "CartPole-v1", steps=1000, prioritized=True, train_every=40, weight_exponent=0.4)
    trainer._act(0)
    trainer.replay.set_errors(np.arange(40), torch.linspace(0.1, 4, 40))
    shares = trainer.replay.tree.priorities[:40] / trainer.replay.tree.priorities[:40].sum()
    for taken, exponent in {0: 0.4, 500: 0.7, 1000: 1.0, 1500: 1.0}.items():
        batch = trainer._draw(16, taken)
        expected = (1 / (40 * shares[batch.places])) ** exponent
        assert batch.weights.numpy() == pytest.approx(expected / expected.max(), rel=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_targets_by_hand(tmp_path, double):
    trainer = trained(tmp_path, "CartPole-v1", double=double)
    tables = {"online": [[1.0, 2.0], [4.0, 3.0], [9.0, 9.5]], "target": [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]}
    trainer.network = lambda _: torch.tensor(tables["online"])
    trainer.target.network = lambda _: torch.tensor(tables["target"])
    batch = Batch(
        observations=torch.zeros(3, 4),
        actions=torch.zeros(3, dtype=torch.int64),
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        next_observations=torch.zeros(3, 4),
        terminated=torch.tensor([False, False, True]),
        discounts=torch.tensor([0.5, 0.25, 0.5]),
        weights=torch.ones(3),
        places=torch.arange(3),
    )
    # Online, action 1 is best in the first row, action 0 in the second; of the target, action 1 in both.
    assert trainer._targets(batch).tolist() == [11.0, 2 + (7.5 if double else 10.0), 3.0]


def test_the_target_network_moves_when_due_and_only_then(tmp_path):
    trainer = trained(tmp_path, "CartPole-v1", steps=240, target_every=60)
    moved, before = [], copy.deepcopy(trainer.target.network.state_dict())
    for record in trainer.steps():
        now = trainer.target.network.state_dict()
        if any(not torch.equal(now[name], before[name]) for name in now):
            moved.append(record["step"])
            before = copy.deepcopy(now)
    assert moved == [120, 180, 240]  # at 60 nothing has been learnt


def test_the_target_network_moves_a_share_of_the_way():
    network = QNetwork(1, 1, (1,), "relu")
    target = TargetNetwork(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
        for parameter in target.network.parameters():
            parameter.zero_()
    target.move(network, 0.25)
    assert all(torch.equal(one, torch.full_like(one, 0.25)) for one in target.network.parameters())
    target.move(network, 1.0)
    assert all(torch.equal(one, torch.ones_like(one)) for one in target.network.parameters())


def test_what_is_kept_after_an_interruption_follows_nothing(tmp_path):
    class Interrupted(Counting):
        taken = 0

        def step(self, action):
            Interrupted.taken += 1
            if Interrupted.taken == 14:
                raise KeyboardInterrupt
            return super().step(action)

    trainer = trained(tmp_path, Interrupted, environments=1, train_every=8, steps=64, n_step=3)
    with pytest.raises(KeyboardInterrupt):
        list(trainer.steps())
    assert trainer.replay.size == 8
    list(trainer.steps())
    replay = trainer.replay
    links = np.flatnonzero(replay.following != -1)
    assert len(links) > 20
    seen = replay.observations[replay.following[links]]
    np.testing.assert_array_equal(replay.next_observations[links], seen)


class Reusing(gymnasium.vector.VectorEnv):
    """Copies whose episodes end after three steps, which are shown in the same memory again and again."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space = spaces.Box(0, np.inf, (1,))
    single_action_space = spaces.Discrete(2)

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs
        self.observation_space = spaces.Box(0, np.inf, (num_envs, 1))
        self.action_space = spaces.MultiDiscrete([2] * num_envs)
        self.shown, self.last = np.zeros((2, num_envs, 1), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        self.shown[:] = 0
        return self.shown, {}

    def step(self, actions):
        self.shown += 1
        done = self.shown[:, 0] % 10 == 3
        self.last[done] = self.shown[done]
        self.shown[done] += 7  # 10, 20, …
        return self.shown, np.ones(self.num_envs), done, np.zeros(self.num_envs, bool), {"final_obs": self.last}


def test_what_an_episode_ended_with_is_kept_though_the_environment_writes_over_it(tmp_path):
    gymnasium.register("taurl/Reusing-v0", vector_entry_point=Reusing)
    trainer = trained(tmp_path, "taurl/Reusing-v0", steps=64, train_every=64)
    list(trainer.steps())
    replay = trainer.replay
    assert replay.terminated[: replay.size].sum() > 12
    moved = (replay.next_observations - replay.observations)[: replay.size, 0]
    np.testing.assert_array_equal(moved, 1)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_replay_holds_each_step_with_what_followed_it_before_any_reset(tmp_path, mode, monkeypatch):
    monkeypatch.setattr("taurl.control.making.synchronous", lambda makers: SyncVectorEnv(makers, autoreset_mode=mode))
    trainer = trained(tmp_path, Counting, train_every=80)
    trainer._act(0)
    replay = trainer.replay
    rounds = 20 if mode == AutoresetMode.SAME_STEP else 15  # of four steps of a copy, one only resets
    assert replay.size == 4 * rounds
    observations, following = (x[: replay.size, 0] for x in (replay.observations, replay.next_observations))
    assert np.array_equal(following, observations + 1)
    assert np.array_equal(replay.rewards[: replay.size], following)
    assert set(observations) == {0, 1, 2}
    assert not replay.terminated.any()
    batch = replay.batch(np.flatnonzero(observations == 1)[:5], discount=1.0, steps=3)
    assert batch.rewards.tolist() == [5.0] * 5  # 2 + 3, then the time limit
    assert batch.next_observations[:, 0].tolist() == [3.0] * 5


def test_no_return_reaches_from_an_episode_into_one_begun_anew(tmp_path):
    """As after a checkpoint that could not hold where the environments stand."""
    trainer = trained(tmp_path, Counting, environments=1, train_every=2)
    trainer._act(0)
    trainer.environments.begin_anew()
    trainer._act(2)
    batch = trainer.replay.batch(np.array([1, 2]), discount=1.0, steps=2)
    assert batch.rewards.tolist() == [2, 1 + 2]
    assert batch.next_observations[:, 0].tolist() == [2, 2]


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("terminates", [False, True])
def test_an_endless_reward_is_worth_its_sum_however_time_limits_cut_it(tmp_path, n_step, terminates):
    trainer = trained(
        tmp_path,
        lambda: Endless(terminates=terminates),
        steps=2000,
        discount=0.8,
        n_step=n_step,
        learning_rate=3e-3,
        target_every=20,
        gradient_steps=4,
        record_every=1000,
    )
    for _ in trainer.steps():
        pass
    value = trainer.network(torch.ones(1, 1)).max().item()
    if terminates:  # were a time limit an end, it would be worth this little
        assert 2.2 < value < 4.3
    else:
        assert value == pytest.approx(5.0, rel=0.02)


OPTIONS = [{}, {"double": True, "dueling": True, "prioritized": True, "n_step": 2}]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_learns_to_echo(tmp_path, options):
    trainer = trained(
        tmp_path, Echo, steps=1000, discount=0.5, learning_rate=5e-3, epsilon_fraction=0.5, record_every=500, **options
    )
    trainer.train()
    assert trainer.evaluate(20).returns == [10.0] * 20
    policy = load(tmp_path / "run")
    assert isinstance(policy, ValuePolicy)
    assert [policy.predict(digit) for digit in range(3)] == [5, 6, 7]
    policy.epsilon = 1.0
    assert {int(policy.predict(0, deterministic=False)) for _ in range(100)} == {5, 6, 7}


@pytest.mark.parametrize("options", [{"env": "CartPole-v1"}, {"env": "Acrobot-v1", **OPTIONS[1]}])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, options):
    def config(name, steps):
        return DQNConfig(
            out=tmp_path / name, steps=steps, schedule="linear", **{**SMALL, "record_every": 40}, **options
        )

    whole = DQN(config=config("whole", 400).model_copy(update={"save_every": 160})).train()
    checkpoints = tmp_path / "whole" / "checkpoints"
    halved = DQN(config=config("halved", 400).model_copy(update={"save_every": 160}))
    for record in halved.steps():
        if record["step"] == 240:  # killed between checkpoints: 160 is the last
            break
    again = DQN.resume(tmp_path / "halved")
    assert again.policy.epsilon == again._epsilon(160)
    again.train()
    assert (checkpoints / "step-000400").exists()
    for mine, theirs in zip(whole.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    def figures(trainer):
        left_out = ("time/", "memory/", "seconds")
        return [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in trainer.run.records()]

    assert figures(whole) == figures(again)
    for name, tensor in whole.replay.tensors().items():
        assert torch.equal(tensor, again.replay.tensors()[name]), name


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second, other = (
        DQN("CartPole-v1", DQNConfig(out=tmp_path / str(n), steps=200, seed=seed, **SMALL)).train()
        for n, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first.optimizer.parameters, second.optimizer.parameters)
    assert not torch.equal(first.optimizer.parameters, other.optimizer.parameters)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="multiple of the 8 environments"):
        DQNConfig(train_every=4)
    with pytest.raises(ValidationError, match="at least 32"):
        DQNConfig(buffer_size=10)
    with pytest.raises(ValidationError, match=r"priority_exponent is 0\.9, but steps are drawn uniformly"):
        DQNConfig(priority_exponent=0.9)
    with pytest.raises(InputError, match="not Discrete"):
        trained(tmp_path, "Pendulum-v1")
