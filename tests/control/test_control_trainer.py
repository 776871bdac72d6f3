"""What surrounds every algorithm: its rate by the schedule, when it evaluates and on what, and the best so far."""

import json
import os
import signal
from datetime import date, datetime

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from processes import Child
from pydantic import ValidationError
from small_environments import Counting, Endless, Identity, same_records

import taurl.control
from taurl.control import ALGORITHMS, PPO, PPOConfig, evaluate_policy, load
from taurl.control.algorithms.a2c import A2C
from taurl.control.algorithms.dqn import DQN
from taurl.control.algorithms.grpo import GRPO
from taurl.control.algorithms.q_learning import QLearning
from taurl.control.algorithms.reinforce import REINFORCE
from taurl.control.algorithms.trpo import TRPO
from taurl.control.evaluation import evaluation_seed
from taurl.control.tables import Table
from taurl.control.updates import FlatAdam
from taurl.runtime.errors import InputError, RunError

SMALL = {
    "environments": 4,
    "rollout_steps": 16,
    "minibatch_size": 64,
    "record_every": 64,
    "eval_episodes": 4,
    "video": False,
}

# Each takes 64 steps in an iteration, and then one update.
ONE_UPDATE = {
    QLearning: {"environments": 64},
    DQN: {"train_every": 64, "gradient_steps": 1, "learning_starts": 0},
    REINFORCE: {"baseline": "none"},
    A2C: {"rollout_steps": 16},
    TRPO: {"rollout_steps": 16, "minibatch_size": 64, "critic_epochs": 1},
    PPO: {"rollout_steps": 16, "minibatch_size": 64, "epochs": 1},
    GRPO: {"group_size": 4, "epochs": 1, "minibatches": 1},
}


@pytest.mark.parametrize("trainer_class", ONE_UPDATE, ids=ALGORITHMS)
def test_each_update_has_the_rate_of_its_step(trainer_class, tmp_path, monkeypatch):
    descend, learn, rates = FlatAdam._descend, Table.learn, []
    monkeypatch.setattr(FlatAdam, "_descend", lambda self, rate: rates.append(rate) or descend(self, rate))
    monkeypatch.setattr(
        Table, "learn", lambda *cells, rate, **others: rates.append(rate) or learn(*cells, rate=rate, **others)
    )
    settings = {"steps": 256, "record_every": 128, "eval_episodes": 0, "environments": 4}
    scheduled = {"learning_rate": 0.5, "schedule": "linear", "warmup_steps": 100}
    env = Identity if trainer_class is QLearning else lambda: Endless(limit=16)
    config = trainer_class.config_class(out=tmp_path / "run", **{**settings, **ONE_UPDATE[trainer_class]}, **scheduled)
    trainer = trainer_class(env, config).train()
    # Up over 100 steps, down to nothing over the 156 that follow. An update of what was learned off the policy has the
    # rate of the step before it, others that of the first step of their rollout.
    whose = (128, 192, 256) if trainer_class in (DQN, QLearning) else (101, 129, 193)
    expected = [0.5 * 64 / 100, *(0.5 * (257 - step) / 156 for step in whose)]
    assert rates == pytest.approx(expected)
    assert [record["learning_rate"] for record in trainer.run.records()] == pytest.approx(expected[1::2])


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [256]), (128, [128, 256]), (100, [128, 256]), (64, [64, 128, 192, 256])]
)
def test_evaluations_are_as_often_as_asked_and_at_the_end(every, expected, tmp_path):
    trainer = PPO(Endless, PPOConfig(out=tmp_path / "run", steps=256, eval_every=every, **SMALL)).train()
    records = trainer.run.records()
    assert [record["step"] for record in records] == [64, 128, 192, 256]
    assert [record["step"] for record in records if "eval/mean_reward" in record] == expected


@pytest.mark.parametrize("trainer_class", ONE_UPDATE, ids=ALGORITHMS)
def test_the_last_record_ends_with_the_first_iteration_past_the_steps(trainer_class, tmp_path):
    settings = {"steps": 330, "record_every": 256, "eval_episodes": 0, "environments": 4}
    env = Identity if trainer_class is QLearning else lambda: Endless(limit=16)
    config = trainer_class.config_class(out=tmp_path / "run", **{**settings, **ONE_UPDATE[trainer_class]})
    trainer = trainer_class(env, config).train()
    assert [record["step"] for record in trainer.run.records()] == [256, 384]  # 64 steps in an iteration


class Breaking(Endless):
    """Fails at its step 50."""

    taken = 0

    def step(self, action):
        Breaking.taken += 1
        if Breaking.taken == 4 * 49 + 1:
            json.loads("{")  # what fails is in the standard library
        return super().step(action)


def test_a_run_that_fails_leaves_its_policy_and_says_where_the_environment_failed(tmp_path, capsys):
    trainer = PPO(Breaking, PPOConfig(out=tmp_path / "run", steps=1000, **SMALL))
    line = Breaking.step.__code__.co_firstlineno + 3
    with pytest.raises(RunError, match=rf"step 50 of 4 copies failed with JSONDecodeError.*{__file__}, line {line}"):
        trainer.train()
    assert trainer.run.step == 192
    assert f"what 192 steps have made is in {tmp_path / 'run' / 'final'}" in capsys.readouterr().err.replace("\n", "")
    ours, left = trainer.policy.actor.state_dict(), load(tmp_path / "run").actor.state_dict()
    assert all(ours[name].equal(left[name]) for name in ours)
    assert load(tmp_path / "run").facts["steps"] == 192


def test_an_evaluation_says_how_many_episodes_it_has_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("taurl.control.evaluation.LONGEST_OF_OTHERS", 12)

    def make():
        return Endless(limit=10**9)

    trainer = PPO(make, PPOConfig(out=tmp_path / "run", steps=64, **SMALL)).train()
    assert "4 of 4 episodes were cut after 12 steps" in capsys.readouterr().err.replace("\n", " ")
    found = evaluate_policy(load(tmp_path / "run"), make, 3)
    assert (found.lengths, found.cut) == ([12, 12, 12], 3)
    assert evaluate_policy(load(tmp_path / "run"), lambda: Endless(limit=5), 3).cut == 0
    assert evaluate_policy(trainer, make, 3) == found


def test_an_evaluation_ends_where_a_vector_class_sets_no_limit(tmp_path, monkeypatch):
    gymnasium.register(
        "taurl/Unlimited-v0", entry_point=lambda: Endless(limit=10**9), vector_entry_point=lambda **_: None
    )
    monkeypatch.setattr("taurl.control.evaluation.LONGEST", 7)
    policy = PPO(lambda: Endless(limit=9), PPOConfig(out=tmp_path / "run", steps=64, **SMALL)).policy
    found = evaluate_policy(policy, "taurl/Unlimited-v0", 2)
    assert (found.lengths, found.cut) == ([7, 7], 2)


def test_one_environment_object_is_stepped_here(tmp_path):
    with pytest.raises(InputError, match="vectorization is async, but one environment object was given"):
        PPO(Endless(limit=9), PPOConfig(out=tmp_path / "run", vectorization="async"))


def test_what_python_users_get_wrong_is_named(tmp_path):
    with pytest.raises(ValidationError, match="unknown setting stpes; did you mean steps"):
        PPOConfig(stpes=3)
    with pytest.raises(InputError, match=r"callbacks is .*print.*, expected a list of functions"):
        PPO("CartPole-v1", PPOConfig(out=tmp_path / "run"), callbacks=print)
    assert not (tmp_path / "run").exists()
    assert {"PPO", "PPOConfig", "load", "evaluate_policy"} <= set(dir(taurl.control))
    with pytest.raises(AttributeError, match="it has load, evaluate_policy, QLearning"):
        taurl.control.SAC  # noqa: B018


def test_evaluations_have_other_seeds_than_training(tmp_path):
    class Seeded(Endless):
        def reset(self, *, seed=None, options=None):
            seeds.extend([] if seed is None else [seed])
            return super().reset(seed=seed)

    seeds = []
    trainer = PPO(Seeded, PPOConfig(out=tmp_path / "run", steps=64, seed=3, **{**SMALL, "eval_episodes": 0})).train()
    assert seeds == [3, 4, 5, 6]
    trainer.evaluate(2)
    assert seeds[4:] == [evaluation_seed(3), evaluation_seed(3) + 1]
    assert not set(seeds[4:]) & set(range(1000))


class Growing(Endless):
    """Each episode, of whichever copy, is worth more than the one before."""

    begun = 0

    def reset(self, *, seed=None, options=None):
        Growing.begun += 1
        return super().reset(seed=seed)

    def step(self, action):
        shown, _, *rest = super().step(action)
        return shown, float(Growing.begun), *rest


def test_the_best_evaluation_is_known_again_on_resume_and_none_of_what_is_done_again(tmp_path):
    trainer = PPO(Growing, PPOConfig(out=tmp_path / "run", steps=256, eval_every=64, save_every=128, **SMALL))
    means = {}
    for record in trainer.steps():
        means[record["step"]] = record["eval/mean_reward"]
        if record["step"] == 192:  # killed; the last checkpoint is of step 128
            break
    assert means[64] < means[128] < means[192]
    resumed = PPO.resume(tmp_path / "run", env=Growing)
    assert resumed.run.step == 128
    assert resumed.best == means[128]


def test_settings_may_change_by_name_on_resume(tmp_path):
    config = PPOConfig(
        env="CartPole-v1", out=tmp_path / "run", steps=128, environments=2, rollout_steps=32, video=False
    )
    PPO(config=config.model_copy(update={"eval_episodes": 0})).train()
    assert PPO.resume(tmp_path / "run", steps=256).train().run.step >= 256
    with pytest.raises(InputError, match=r"discount was .* and cannot become"):
        PPO.resume(tmp_path / "run", discount=0.5)
    with pytest.raises(TypeError, match="'stepz', expected env or settings"):
        PPO.resume(tmp_path / "run", stepz=1)


def test_an_environment_that_came_from_python_leaves_no_name_by_which_another_would_be_scored(tmp_path):
    trainer = PPO(Endless, PPOConfig(out=tmp_path / "run", env="CartPole-v1", steps=64, **SMALL)).train()
    assert trainer.config.env is None
    assert load(tmp_path / "run").facts["env"] is None


def test_arguments_beside_a_function_or_an_object_are_refused(tmp_path):
    for env in (Endless, Endless()):
        with pytest.raises(InputError, match=r"env_args is \{'limit': 3\}, which is for an environment named by"):
            PPO(env, PPOConfig(out=tmp_path / "run", env_args={"limit": 3}, **SMALL))


class Failing(Counting):
    failing = False

    def step(self, action):
        if self.failing and self.step_number:
            raise OSError("lost")
        return super().step(action)


def test_after_an_evaluation_that_fails_in_the_one_object_its_episodes_begin_anew(tmp_path):
    env = Failing()
    trainer = PPO(env, PPOConfig(out=tmp_path / "run", **{**SMALL, "environments": 1}))
    trainer.environments.reset()
    env.failing = True
    with pytest.raises(RunError, match="lost"):
        trainer.evaluate(1)
    assert env.step_number == 1
    assert trainer.environments.observations[0, 1] == env.step_number == 0


class Wide(Endless):
    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(3, np.float32), {}


@pytest.mark.parametrize("trainer_class", [PPO, TRPO])
def test_an_environment_of_another_width_is_refused_on_resume(trainer_class, tmp_path):
    settings = {"environments": 1, "rollout_steps": 16, "record_every": 16, "eval_episodes": 0, "steps": 16}
    trainer_class(Endless, trainer_class.config_class(out=tmp_path / "run", **settings)).train()
    with pytest.raises(InputError, match=r"does not fit this environment: \S+ has shape .* in the checkpoint and"):
        trainer_class.resume(tmp_path / "run", env=Wide)


def test_a_table_of_another_size_is_refused_on_resume(tmp_path):
    def lake(name):
        return lambda: gymnasium.make("FrozenLake-v1", map_name=name)

    QLearning(lake("4x4"), QLearning.config_class(out=tmp_path / "run", steps=16, eval_episodes=0)).train()
    with pytest.raises(InputError, match=r"values has shape \(1, 16, 4\) in the checkpoint and \(1, 64, 4\) here"):
        QLearning.resume(tmp_path / "run", env=lake("8x8"))


def test_arguments_are_what_the_files_give_back():
    given = {"start": date(2020, 1, 1), "at": [datetime(2020, 1, 1, 12, 30)], "size": (3, {"a": None})}
    expected = {"start": "2020-01-01", "at": ["2020-01-01T12:30:00"], "size": [3, {"a": None}]}
    config = PPOConfig(env_args=given)
    assert config.env_args == expected == yaml.safe_load(config.to_yaml())["env_args"]


@pytest.mark.parametrize(("value", "kind"), [(np.float32(1), "float32"), ([len], "builtin_function"), ({1: 2}, "dict")])
def test_arguments_that_no_file_holds_are_refused(value, kind):
    with pytest.raises(ValidationError, match=f"size is of type {kind}.*, expected a number"):
        PPOConfig(env_args={"size": value})


def alike(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_seed_gives_one_run_whatever_is_made_or_drawn_before_it_trains(tmp_path):
    def made(name, seed):
        return PPO("CartPole-v1", PPOConfig(out=tmp_path / name, seed=seed, steps=128, **SMALL))

    first, _second = made("first", 3), made("second", 4)
    torch.rand(5)
    later = first.train()
    at_once = made("third", 3).train()
    assert alike(later.policy.actor.state_dict(), at_once.policy.actor.state_dict())


def test_an_evaluation_that_draws_takes_nothing_from_training(tmp_path):
    weights = []
    for name, evaluates in (("with", True), ("without", False)):
        trainer = PPO("CartPole-v1", PPOConfig(out=tmp_path / name, steps=192, **SMALL))
        for _ in trainer.steps():
            if evaluates:
                trainer.evaluate(2, deterministic=False)
        weights.append(trainer.policy.actor.state_dict())
    assert alike(*weights)


def killed_at(step, trainer_class, env, config):
    def kill(record):
        if record["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer_class(env, config, callbacks=[kill]).train()


@pytest.mark.parametrize(
    ("trainer_class", "env", "settings"),
    [
        (PPO, "Pendulum-v1", {"memory": 8, "minibatch_size": 32, "normalize_observations": True, "rollout_steps": 16}),
        (DQN, "CartPole-v1", {"prioritized": True, "n_step": 3, "learning_starts": 64, "train_every": 4}),
    ],
)
def test_a_killed_run_goes_on_in_another_process_as_one_that_was_not(trainer_class, env, settings, tmp_path):
    shared = {
        "steps": 512,
        "environments": 4,
        "record_every": 64,
        "save_every": 128,
        "eval_episodes": 0,
        "video": False,
    }

    def config(name):
        return trainer_class.config_class(out=tmp_path / name, **shared, **settings)

    code, _ = Child(killed_at, 320, trainer_class, env, config("killed")).wait()
    assert code == -signal.SIGKILL
    resumed = trainer_class.resume(tmp_path / "killed")
    assert resumed.run.step == 256
    resumed.train()
    whole = trainer_class(env, config("whole")).train()
    assert same_records(whole, resumed)
    name = "actor" if trainer_class is PPO else "network"
    assert alike(*(getattr(trainer.policy, name).state_dict() for trainer in (whole, resumed)))
