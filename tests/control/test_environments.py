"""Environments: what followed each action in both autoreset modes, what is passed on, and what is refused."""

import functools
import gc
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from small_environments import Broken, Counting, Showing, resetting_on_the_next_step

from taurl.control import making
from taurl.control.distributions import distribution_for
from taurl.control.environments import Environments, SingleEpisodes
from taurl.runtime.errors import InputError, RunError


def transitions_of(environments, steps):
    """Of each copy: (observation, action, reward, terminated, truncated, what followed) of every action."""
    found = [[] for _ in range(environments.count)]
    observations = environments.reset()
    for _ in range(steps):
        actions = observations.sum(1).astype(int) % 2  # depends on what is seen only
        given = environments.step(actions)
        for copy in range(environments.count):
            if not given.only_reset[copy]:
                followed = given.last_observations.get(copy, given.observations[copy])
                ends = bool(given.terminated[copy]), bool(given.truncated[copy])
                seen = tuple(observations[copy].tolist()), tuple(np.asarray(followed).tolist())
                found[copy].append((seen[0], int(actions[copy]), float(given.rewards[copy]), *ends, seen[1]))
        observations = given.observations
    return found


def test_both_autoreset_modes_give_the_same_transitions(monkeypatch):
    same = transitions_of(Environments(Counting, 2, seed=0), 40)
    resetting_on_the_next_step(monkeypatch)
    environments = Environments(Counting, 2, seed=0)
    assert not environments.resets_in_same_step
    later = transitions_of(environments, 40)
    for one, other in zip(same, later, strict=True):
        assert len(one) == 40
        assert len(other) == 40 - 10  # 10 of its steps only reset
        assert one[: len(other)] == other
    # The first episode by hand: two steps, terminated; the next one is cut after three.
    assert same[0][:2] == [((0, 0), 0, 0.0, False, False, (0, 1)), ((0, 1), 1, 11.0, True, False, (0, 2))]
    assert same[0][4] == ((1, 2), 1, 21.0, False, True, (1, 3))


def test_both_modes_count_the_same_episodes(monkeypatch):
    counted = []
    for _ in range(2):
        environments = Environments(Counting, 1, seed=0)
        transitions_of(environments, 40)
        counted.append(environments.take_episodes())
        assert environments.take_episodes() == []
        resetting_on_the_next_step(monkeypatch)
    same, later = counted
    assert same[: len(later)] == later
    assert [episode.length for episode in later[:4]] == [2, 3, 4, 2]
    assert later[0].reward == 11.0


def test_steps_of_native_cartpole_obey_its_physics_but_for_those_that_only_reset():
    environments = Environments("CartPole-v1", 4, seed=0)
    assert not environments.resets_in_same_step
    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    rng = np.random.default_rng(0)
    observations, resets = environments.reset(), 0
    for _ in range(60):
        actions = rng.integers(2, size=4)
        given = environments.step(actions)
        for copy in range(4):
            single.state, single.steps_beyond_terminated = observations[copy].astype(np.float64), None
            expected = single.step(int(actions[copy]))[0]
            obeys = np.allclose(expected, given.observations[copy], atol=1e-5)
            assert obeys != given.only_reset[copy]
        resets += given.only_reset.sum()
        observations = given.observations
    assert resets > 4


def test_actions_of_a_box_are_clipped_for_the_environment_and_left_as_they_were():
    class Box(Counting):
        action_space = spaces.Box(-1, 2, (2,), np.float32)

        def step(self, action):
            taken.append(action.copy())
            return super().step(0)

    taken = []
    environments = Environments(Box, 1, seed=0)
    environments.reset()
    actions = np.array([[-3.0, 5.0]], dtype=np.float32)
    environments.step(actions)
    np.testing.assert_array_equal(taken, [[-1.0, 2.0]])
    np.testing.assert_array_equal(actions, [[-3.0, 5.0]])


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("at", [1, 2])  # the second step ends an episode: what it shows is not what is acted on next
def test_what_is_not_finite_is_named_with_copy_and_step(what, at):
    makers = iter([Counting, Counting, functools.partial(Broken, what, at)] * 2)
    environments = Environments(lambda: next(makers)(), 3, seed=0)
    environments.reset()
    for _ in range(at - 1):
        environments.step(np.zeros(3, dtype=int))
    with pytest.raises(RunError) as caught:
        environments.step(np.zeros(3, dtype=int))
    assert f"copy 2 gave the {what}" in str(caught.value)
    assert f"at step {at} of each copy," in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_observations_are_looked_at_too():
    class Parts(Showing):
        def step(self, action):
            shown, *rest = super().step(action)
            return {**shown, "b": (shown["b"][0], np.array([np.nan], np.float32))}, *rest

    box = spaces.Box(-1, 1, (1,), np.float32)
    environments = Environments(lambda: Parts(spaces.Dict(a=box, b=spaces.Tuple([box, box]))), 2, seed=0)
    environments.reset()
    with pytest.raises(RunError, match=r"copy 0 gave the observation 'b' \[1\] \[nan\] at step 1"):
        environments.step(np.zeros(2, dtype=int))


@pytest.mark.parametrize(("space", "shown"), [(spaces.Discrete(3), -1), (spaces.MultiDiscrete([2, 3]), [0, 3])])
def test_a_choice_that_is_none_is_named_with_copy_and_step(space, shown):
    class Wrong(Showing):
        def step(self, action):
            _, *rest = super().step(action)
            return np.array(shown), *rest

    environments = Environments(lambda: Wrong(space), 2, seed=0)
    environments.reset()
    with pytest.raises(RunError, match=r"copy 0 gave the observation .* at step 1 of each copy, expected from"):
        environments.step(np.zeros(2, dtype=int))


def test_a_sum_that_overflows_is_no_error():
    class Large(Counting):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, 1e308, *rest

    environments = Environments(Large, 3, seed=0)
    environments.reset()
    with np.errstate(over="ignore"):
        environments.step(np.zeros(3, dtype=int))


def test_later_resets_are_others_and_repeat_with_the_seed():
    def beginnings():
        environments = Environments("CartPole-v1", 2, seed=3)
        first = environments.reset()
        environments.step(np.zeros(2, dtype=int))
        return first, environments.reset()

    first, second = beginnings()
    assert not np.array_equal(first, second)
    for one, other in zip((first, second), beginnings(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_single_episodes_end_and_wait():
    environments = SingleEpisodes("CartPole-v1", 3, seed=0)
    environments.reset()
    counts, rewards = np.zeros(3, dtype=int), np.zeros(3)
    while not environments.finished.all():
        given = environments.step(np.ones(3, dtype=int))
        counts += ~given.only_reset
        rewards += given.rewards
        assert not (given.only_reset & (given.terminated | given.truncated)).any()
    episodes = environments.take_episodes()
    assert sorted(counts) == sorted(episode.length for episode in episodes)
    assert len(set(counts)) > 1, "nobody had to wait"
    np.testing.assert_array_equal(rewards, counts)


def test_environments_that_cannot_be_made_are_named():
    with pytest.raises(InputError, match="env is 'NoSuch-v0'"):
        Environments("NoSuch-v0", 1, seed=0)
    with pytest.raises(InputError, match="environments is 2, but one environment object"):
        Environments(Counting(), 2, seed=0)


class OneArray(gymnasium.Env):
    """Gives the same array each time, with the step in it; a time limit after 3 steps."""

    observation_space = spaces.Box(0, 9, (1,), np.float32)
    action_space = spaces.MultiDiscrete([3, 3])

    def __init__(self):
        self.seen = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen[:] = 0
        return self.seen, {}

    def step(self, action):
        action -= 1  # an environment may do as it likes with what it is given
        self.seen += 1
        return self.seen, 0.0, False, bool(self.seen[0] == 3), {}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_the_last_observation_is_not_the_one_that_the_reset_wrote_over_it(vectorization):
    environments = Environments(OneArray, 2, seed=0, vectorization=vectorization)
    environments.reset()
    try:
        given = [environments.step(np.ones((2, 2), np.int64)) for _ in range(3)]
    finally:
        environments.close()
    assert [float(one.observations[0, 0]) for one in given] == [1, 2, 0]
    assert {place: float(seen[0]) for place, seen in given[2].last_observations.items()} == {0: 3.0, 1: 3.0}


def test_actions_are_kept_as_they_were_drawn():
    drawn = np.ones((2, 2), np.int64)
    environments = Environments(OneArray, 2, seed=0)
    environments.reset()
    environments.step(distribution_for(OneArray.action_space).to_environment(drawn))
    assert (drawn == 1).all()


class OneBuffer(gymnasium.vector.VectorEnv):
    """A vector class that goes on in the same memory."""

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    single_observation_space = spaces.Box(0, 9, (1,), np.float32)
    single_action_space = spaces.Discrete(2)

    def __init__(self, num_envs, **arguments):
        self.num_envs = num_envs
        self.seen, self.rewards = np.zeros((num_envs, 1), np.float32), np.zeros(num_envs)
        self.no = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        self.seen[:] = 0
        return self.seen, {}

    def step(self, actions):
        self.seen += 1
        self.rewards += 1
        return self.seen, self.rewards, self.no, self.no, {}


def test_what_a_vector_class_gives_is_kept_though_it_goes_on_in_the_same_memory():
    name = "OneBuffer-v0"
    gymnasium.register(name, entry_point=OneArray, vector_entry_point=OneBuffer)
    try:
        environments = Environments(name, 4, seed=0)
        first = environments.reset()
        given = [environments.step(np.zeros(4, np.int64)) for _ in range(3)]
    finally:
        del gymnasium.registry[name]
    assert float(first[0, 0]) == 0
    assert [float(one.observations[0, 0]) for one in given] == [1, 2, 3]
    assert [float(one.rewards[0]) for one in given] == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "problem"),
    [((np.zeros(2, np.float32), 0.0, False, {}), "ValueError: not enough values to unpack"), (None, "TypeError")],
)
def test_an_environment_that_gives_something_else_is_named(given, problem):
    class Faulty(Counting):
        def step(self, action):
            return given

    environments = Environments(Faulty, 2, seed=0)
    environments.reset()
    with pytest.raises(RunError, match=rf"Faulty: step 1 of 2 copies failed with {problem}.*check_env"):
        environments.step(np.zeros(2, dtype=np.int64))


def test_ctrl_c_reaches_no_environment_in_a_process_of_its_own(tmp_path):
    """The terminal signals the whole group; the run finishes its step and saves, which its environments outlive."""
    program = (
        "from taurl.control import PPO, PPOConfig\n"
        "from taurl.control.environments import Environments\n"
        "if __name__ == '__main__':\n"
        "    never_closed = Environments('CartPole-v1', 1, seed=0, vectorization='async')\n"
        f"    settings = dict(out={str(tmp_path / 'run')!r}, steps=10**7, record_every=256, eval_episodes=0)\n"
        "    PPO('CartPole-v1', PPOConfig(environments=2, vectorization='async', **settings)).train()\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert "Interrupted: SIGINT: stopped after step" in said
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_environments_in_processes_of_their_own_are_ended_by_closing_and_by_no_signal_but_one(monkeypatch):
    monkeypatch.setattr(making, "PATIENCE", 60.0)
    environments = Environments(Counting, 2, seed=0, vectorization="async")
    environments.reset()
    processes = environments.vector.processes
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    environments.step(np.zeros(2, dtype=np.int64))
    environments.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_processes_of_environments_that_nobody_holds_are_ended():
    environments = Environments(Counting, 2, seed=0, vectorization="async")
    processes = environments.vector.processes
    del environments
    gc.collect()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_of_a_process_that_was_killed_one_error_is_said_and_the_others_are_ended():
    class Killed(Counting):
        def step(self, action):
            if action:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(action)

    environments = Environments(Killed, 2, seed=0, vectorization="async")
    environments.reset()
    processes = environments.vector.processes
    with pytest.raises(RunError, match=r"step 1 of . copies failed with EOFError"):
        environments.step(np.array([0, 1]))
    environments.close()
    assert environments.vector.closed
    assert not any(process.is_alive() for process in processes)


def test_a_close_that_fails_hides_no_other_error():
    class Stuck(Counting):
        def close(self):
            raise OSError("stuck")

    environments = Environments(Stuck, 1, seed=0)
    with pytest.raises(ValueError, match="what it is closed for"):  # noqa: PT012
        try:
            raise ValueError("what it is closed for")
        finally:
            environments.close()
    with pytest.raises(OSError, match="stuck"):
        Environments(Stuck, 1, seed=0).close()


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("FrozenLake-v1", {"map_name": "5x5"}, "KeyError: '5x5'; its arguments: render_mode, desc, map_name"),
        ("LunarLander-v3", {"gravity": 5}, "AssertionError: gravity"),
        ("HalfCheetah-v5", {"xml_file": "nothing.xml"}, "OSError: "),
    ],
)
def test_arguments_that_an_environment_does_not_take_are_said_in_one_line(name, arguments, said):
    pytest.importorskip({"LunarLander-v3": "Box2D", "HalfCheetah-v5": "mujoco"}.get(name, "gymnasium"))
    with pytest.raises(InputError, match=f"env is '{name}': cannot be made: {said}") as caught:
        Environments(name, 1, seed=0, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_what_is_no_environment_is_refused():
    for wrong in (gymnasium.make_vec("CartPole-v1", num_envs=2), 3):
        with pytest.raises(InputError, match=r"env is of type (CartPoleVectorEnv|int), expected an id"):
            Environments(wrong, 1, seed=0)


def test_a_function_that_gives_one_environment_twice_is_refused():
    one = Counting()
    with pytest.raises(InputError, match="gave the same environment twice"):
        Environments(lambda: gymnasium.wrappers.TimeLimit(one, 3), 2, seed=0)


def test_a_first_step_after_a_record_that_fails_has_moved_them_on():
    class Failing(Counting):
        def step(self, action):
            if self.episode and self.step_number:
                raise OSError("lost")
            return super().step(action)

    makers = iter([Counting, lambda: Failing(first=1)])
    environments = Environments(lambda: next(makers)(), 2, seed=0)
    environments.reset()
    environments.step(np.zeros(2, dtype=np.int64))
    environments.take_episodes()
    with pytest.raises(RunError, match=r"step 2 of . copies failed with OSError: lost"):
        environments.step(np.zeros(2, dtype=np.int64))
    environments.tensors()
    assert environments.unsaved == "a step that failed has moved it on"
