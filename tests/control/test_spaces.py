"""Observation spaces: what becomes of each kind as numbers, and spaces as plain values and back."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from taurl.control.spaces import described, encode, has_images, require_member, space_of, width
from taurl.runtime.errors import InputError

BOX = spaces.Box(np.array([-np.inf, 0.0]).astype(np.float32), np.array([1.5, np.inf]).astype(np.float32))
CASES = {
    "box": (BOX, [0.5, 7.0], [0.5, 7.0]),
    "image": (spaces.Box(0, 255, (2, 2), np.uint8), np.array([[1, 2], [3, 255]], np.uint8), [1, 2, 3, 255]),
    "pixels": (spaces.Box(0, 255, (1, 2, 2), np.uint8), np.array([[[1, 2], [3, 255]]], np.uint8), [1, 2, 3, 255]),
    "booleans": (spaces.Box(0, 1, (1, 2, 2), np.bool_), [[[True, False], [False, True]]], [1, 0, 0, 1]),
    "discrete": (spaces.Discrete(3, start=4), 6, [0, 0, 1]),
    "multi_discrete": (spaces.MultiDiscrete([2, 3], start=[0, 5]), [1, 6], [0, 1, 0, 1, 0]),
    "multi_discrete_2d": (spaces.MultiDiscrete([[2], [2]]), [[0], [1]], [1, 0, 0, 1]),
    "multi_binary": (spaces.MultiBinary((2, 2)), [[1, 0], [0, 1]], [1, 0, 0, 1]),
    "tuple": (spaces.Tuple([spaces.Discrete(2), BOX]), (1, [0.5, 7.0]), [0, 1, 0.5, 7.0]),
    "dict": (
        spaces.Dict(z=spaces.Discrete(2), a=spaces.Tuple([spaces.MultiBinary(1), spaces.Discrete(2)])),
        {"z": 0, "a": ([1], 1)},
        None,  # in the space's own order, see below
    ),
}


def batch_of(space: gymnasium.Space, one: object) -> object:
    """What a vector environment gives of two copies that see this and a sample."""
    space.seed(0)
    return concatenate(space, [one, space.sample()], create_empty_array(space, 2))


@pytest.mark.parametrize("name", CASES)
def test_encoding_by_hand(name):
    space, one, expected = CASES[name]
    encoded = encode(space, batch_of(space, one))
    if expected is None:
        parts = {"z": [1.0, 0.0], "a": [1.0, 0.0, 1.0]}
        expected = [number for part in space.spaces for number in parts[part]]
    assert encoded.dtype == (torch.uint8 if has_images(space) else torch.float32)
    assert encoded.shape == (2, width(space))
    assert encoded[0].tolist() == expected


@pytest.mark.parametrize("name", CASES)
def test_a_space_comes_back_from_json(name):
    space, one, _ = CASES[name]
    again = space_of(json.loads(json.dumps(described(space))))
    assert again == space
    if isinstance(space, spaces.Dict):
        assert list(again.spaces) == list(space.spaces)  # == does not look at the order, encoding does
    torch.testing.assert_close(encode(again, batch_of(space, one)), encode(space, batch_of(space, one)))
    assert batch_space(again, 2) == batch_space(space, 2)


def test_spaces_that_are_not_known_are_refused():
    space = spaces.Dict(name=spaces.Text(5))
    for function in (width, described):
        with pytest.raises(InputError, match="Text"):
            function(space)


@pytest.mark.parametrize(("low", "high", "dtype"), [(-(2**63), 2**63 - 1, "int64"), (0, 2**64 - 1, "uint64")])
def test_bounds_of_whole_numbers_keep_all_their_bits(low, high, dtype):
    for least, most in ((low, high), ([low, high - 1], [high, high])):
        space = spaces.Box(np.array(least, dtype), np.array(most, dtype), dtype=dtype)
        assert space_of(json.loads(json.dumps(described(space)))) == space


def test_a_subclass_comes_back_as_what_it_is_a_kind_of():
    class Own(spaces.Box):
        pass

    assert space_of(described(Own(-1, 1, (2,)))) == spaces.Box(-1, 1, (2,))


def test_bounds_that_are_all_the_same_are_written_once():
    assert len(json.dumps(described(spaces.Box(0, 255, (4, 84, 84), np.uint8)))) < 100
    assert described(BOX)["high"] == [1.5, np.inf]


@pytest.mark.parametrize("name", CASES)
def test_what_a_space_gives_is_a_member(name):
    space, one, _ = CASES[name]
    require_member(space, one)
    space.seed(1)
    require_member(space, space.sample())


@pytest.mark.parametrize(
    ("name", "observation", "problem"),
    [
        ("box", [0.5], r"has shape \(1,\), not \(2,\)"),
        ("box", ["a", "b"], "no number"),
        ("discrete", 3, "is 3, outside 4 to 6"),
        ("discrete", 5.0, "is 5.0 of float64, no whole number"),
        ("multi_discrete", [1, 8], r"is \[1 8\], outside \[0 5\] to \[1 7\]"),
        ("multi_discrete", [2, 6], r"is \[2 6\], outside"),
        ("tuple", (1,), "is a tuple, not a tuple of 2"),
        ("tuple", [1, [0.5, 7.0]], "is a list, not a tuple of 2"),
        ("tuple", (1, [0.5]), r"\[1\] has shape \(1,\)"),
        ("dict", {"z": 0}, r"is \['z'\], not a dict with z, a"),
        ("dict", 3, "is int, not a dict"),
    ],
)
def test_what_is_no_member_is_named(name, observation, problem):
    with pytest.raises(InputError, match=problem):
        require_member(CASES[name][0], observation)
