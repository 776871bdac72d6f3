"""Where environments stand: what is put back goes on bit for bit, and what cannot be had is said."""

import enum
import json
import math
import random
import re
from collections import deque

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import Counting, Hidden, Showing

from taurl.control.environment_states import NoState, restore, state_text
from taurl.control.environments import Environments, SingleEpisodes

KNOWN = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "Taxi-v4", "Blackjack-v1"]
MUJOCO = ["Hopper-v5", "Ant-v5"]  # the second reads positions that MuJoCo computes in the step before


def equal(one, other):
    if isinstance(one, tuple | list):
        return all(equal(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return np.array_equal(one, other)


def goes_on_alike(one, other, steps):
    one.vector.action_space.seed(0)
    for _ in range(steps):
        actions = one.vector.action_space.sample()
        if not equal(one.step(actions), other.step(actions)):
            return False
    return one.episodes == other.episodes


def moved(environment, steps, count=2):
    environments = Environments(environment, count, seed=1)
    environments.vector.action_space.seed(1)
    environments.reset()
    for _ in range(steps):
        environments.step(environments.vector.action_space.sample())
    environments.take_episodes()
    return environments


@pytest.mark.parametrize("name", KNOWN + MUJOCO)
def test_what_is_put_back_goes_on_alike(name):
    if name in MUJOCO:
        pytest.importorskip("mujoco")
    before = moved(name, 37)
    after = Environments(name, 2, seed=99)
    after.load_tensors(before.tensors())
    assert before.unsaved is None
    assert equal(before.observations, after.observations)
    assert goes_on_alike(before, after, 120)
    assert list(before.recent) == list(after.recent)


def test_so_it_does_into_copies_that_have_moved_on():
    before, after = moved(Counting, 7), moved(Counting, 3)
    after.load_tensors(before.tensors())
    assert goes_on_alike(before, after, 20)


def test_without_what_is_put_back_it_does_not():
    assert not goes_on_alike(moved("CartPole-v1", 37), moved("CartPole-v1", 36), 120)


class Holding(Counting):
    """Attributes of many kinds; a list and an array are met twice, and changed in place."""

    def __init__(self):
        super().__init__()
        self.array = np.arange(3.0)
        self.also = self.array
        self.nested = {"deque": deque([1, 2], maxlen=2), 3: (True, None, "text"), "nan": float("nan")}
        self.bytes = np.array([b"ab", b"c"])
        self.scalar = np.float32(1.5)
        self.other = spaces.Discrete(10_000)
        self.function = len

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.array += reward
        self.nested["deque"].append(self.step_number)
        reward = float(self.also.sum() + self.nested["deque"][0] + self.other.sample() + self.np_random.random())
        return observation, reward, *rest


def test_attributes_of_many_kinds_come_back():
    before = moved(Holding, 5)
    after = Environments(Holding, 2, seed=1)
    after.load_tensors(before.tensors())
    holding = after.vector.envs[0]
    assert holding.array is holding.also
    assert holding.nested["deque"].maxlen == 2
    assert holding.nested[3] == (True, None, "text")
    assert holding.bytes.dtype == np.dtype("S2")
    assert type(holding.scalar) is np.float32
    assert goes_on_alike(before, after, 30)


class Asked(Counting):
    """Says itself what it holds."""

    def __init__(self):
        super().__init__()
        self.world = object()

    def get_state(self):
        return {"at": (self.episode, self.step_number)}

    def set_state(self, state):
        self.episode, self.step_number = state["at"]


def test_environments_that_offer_their_state_are_asked():
    before = moved(Asked, 5)
    after = Environments(Asked, 2, seed=9)
    after.load_tensors(before.tensors())
    assert goes_on_alike(before, after, 20)


def test_wrappers_are_part_of_it():
    def stacked():
        return gymnasium.wrappers.FrameStackObservation(gymnasium.wrappers.TimeLimit(Counting(), 3), 2)

    before = moved(stacked, 4)
    after = Environments(stacked, 2, seed=1)
    after.load_tensors(before.tensors())
    assert goes_on_alike(before, after, 20)


def test_observations_of_parts_come_back():
    space = spaces.Dict(a=spaces.Discrete(4), b=spaces.Tuple([spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))]))
    before = moved(lambda: Showing(space), 3)
    after = Environments(lambda: Showing(space), 2, seed=1)
    after.load_tensors(before.tensors())
    assert equal(before.observations, after.observations)


@pytest.mark.parametrize(
    ("environment", "why"),
    [(Hidden, r"Hidden\.world is of type object"), ("LunarLander-v3", r"LunarLander.*\.world is of type b2World")],
)
def test_what_hides_its_state_is_named_and_begins_anew_on_both_sides(environment, why):
    if environment == "LunarLander-v3":
        pytest.importorskip("Box2D")
    with pytest.raises(NoState, match=why):
        state_text(moved(environment, 3).vector, [])
    before = moved(environment, 5)
    after = Environments(environment, 2, seed=1)
    after.load_tensors(before.tensors())
    assert after.unsaved == before.unsaved != ""
    assert equal(before.observations, after.observations)
    assert before.fresh
    assert goes_on_alike(before, after, 20)


def test_processes_of_their_own_have_no_state():
    environments = Environments(Counting, 1, seed=0, vectorization="async")
    try:
        with pytest.raises(NoState, match="processes"):
            state_text(environments.vector, [])
    finally:
        environments.close()


def test_after_a_step_that_failed_they_begin_anew():
    before = moved(Counting, 5)
    before.step(np.zeros(2, dtype=int))  # and no record of it
    after = Environments(Counting, 2, seed=1)
    after.load_tensors(before.tensors())
    assert after.unsaved == "a step that failed has moved it on"
    assert after.observations[:, 1].tolist() == [0, 0]


def played(environment):
    environments = SingleEpisodes(environment, 2, seed=0)
    for _ in range(3):
        environments.reset()
        while not environments.finished.all():
            environments.step(np.zeros(2, dtype=int))
    environments.take_episodes()
    return environments


def test_between_single_episodes_what_the_copies_keep_is_held():
    before, after = played(Counting), SingleEpisodes(Counting, 2, seed=0)
    after.load_tensors(before.tensors())
    assert before.unsaved is after.unsaved is None
    assert after.observations[:, 0].tolist() == [6, 6]  # three played, and begun as often on their own
    assert equal(before.observations, after.observations)


def test_single_episodes_whose_copies_hide_their_state_say_so():
    before, after = played(Hidden), SingleEpisodes(Hidden, 2, seed=0)
    after.load_tensors(before.tensors())
    assert "world is of type object" in before.unsaved
    assert after.unsaved == before.unsaved


def test_one_object_that_an_evaluation_has_moved_on_is_held_all_the_same():
    before, environment = moved(Counting(), 3, count=1), Counting()
    before.begin_anew()
    after = Environments(environment, 1, seed=1)
    after.load_tensors(before.tensors())
    assert environment.episode == before.vector.envs[0].unwrapped.episode > 0
    assert equal(before.observations, after.observations)


def test_it_is_text_of_plain_values():
    environments = moved("CartPole-v1", 3)
    text = state_text(environments.vector, [np.arange(3)])
    assert isinstance(json.loads(text), list)
    assert equal(restore(text, environments.vector), [np.arange(3)])
    tensors = environments.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}


class Mode(enum.Enum):
    LOW = 0
    HIGH = 1


class Moody(Counting):
    """Changes its mood at every third step."""

    mode = Mode.LOW

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.step_number == 3:
            self.mode = Mode.HIGH if self.mode is Mode.LOW else Mode.LOW
        return observation, reward + self.mode.value, *rest


def test_members_of_enumerations_come_back():
    before = moved(Moody, 6)
    assert before.vector.envs[0].mode is Mode.HIGH
    after = Environments(Moody, 2, seed=1)
    after.load_tensors(before.tensors())
    assert after.vector.envs[0].mode is Mode.HIGH
    assert goes_on_alike(before, after, 30)


def test_members_that_no_name_leads_to_are_no_state():
    class Local(enum.Enum):
        ONE = 1

    environments = moved(Counting, 1)
    environments.vector.envs[0].mode = Local.ONE
    with pytest.raises(NoState, match=r"Counting\.mode is of type .*Local, which cannot be found"):
        state_text(environments.vector, [])


def test_arrays_that_share_memory_are_no_state():
    environments = moved(Counting, 1)
    one = environments.vector.envs[0]
    one.state = np.zeros(4)
    one.left, one.right = one.state[:2], one.state[2:]
    with pytest.raises(NoState, match=r"Counting\.left shares memory with Counting\.state"):
        state_text(environments.vector, [])
    one.state = None
    state_text(environments.vector, [])  # the two halves have nothing in common


class Within(Counting):
    """Makes what it plays in when an episode begins."""

    inner = None

    def __init__(self):
        super().__init__()
        self.inner, self.goes = None, self.slowly

    def slowly(self):
        pass

    def fast(self):
        pass

    def reset(self, *, seed=None, options=None):
        self.inner = Counting()
        self.inner.reset(seed=seed)
        return super().reset(seed=seed)


@pytest.mark.parametrize("other", ["inner", "goes"])
def test_what_is_made_otherwise_begins_anew(other):
    before, after = moved(Within, 1), Environments(Within, 2, seed=1)
    if other == "goes":
        before.vector.envs[1].goes = before.vector.envs[1].fast
        after.reset()
    after.load_tensors(before.tensors())
    expected = {"inner": "a NoneType is where a Counting was", "goes": r"a Within\.slowly is where a Within\.fast was"}
    assert re.search(expected[other], after.unsaved)
    assert after.observations[:, 1].tolist() == [0, 0]


class Misnamed(Counting):
    """Its methods have the names, and are others."""

    def get_state(self, player):
        return player

    def set_state(self, position, velocity):
        raise AssertionError("not called")


def test_methods_of_the_same_names_that_take_something_else_are_not_asked():
    before = moved(Misnamed, 5)
    after = Environments(Misnamed, 2, seed=99)
    after.load_tensors(before.tensors())
    assert before.unsaved is None
    assert goes_on_alike(before, after, 20)


class Failing(Counting):
    def get_state(self):
        raise ValueError("not now")

    def set_state(self, state): ...


class Drawing(Counting):
    """Keeps a method of its generator, which a generator put back would not be the one of."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed)
        self.draw = self.np_random.integers
        return found


class Calling(Counting):
    """Keeps functions written in C, and methods of the global generators, which a checkpoint holds by itself."""

    def __init__(self):
        super().__init__()
        self.square, self.draw, self.toss, self.name = math.sqrt, np.random.uniform, random.random, "a".upper


def test_functions_without_a_state_of_their_own_hide_none():
    before = moved(Calling, 5)
    before.tensors()
    assert before.unsaved is None


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (Failing, r"get_state\(\) raised ValueError: not now"),
        (Drawing, r"draw is a method of Generator, which it hides"),
    ],
)
def test_a_state_that_cannot_be_had_is_said(environment, why):
    before = moved(environment, 5)
    before.tensors()
    assert re.search(why, before.unsaved)
