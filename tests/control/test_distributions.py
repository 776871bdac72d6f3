"""Action distributions against torch.distributions: log-probability, entropy, divergence, frequencies."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as reference

from taurl.control.distributions import Gaussian, distribution_for
from taurl.runtime.errors import InputError

BATCH = 5


class Together:
    """Independent reference distributions side by side."""

    def __init__(self, parts):
        self.parts = parts

    def log_prob(self, actions):
        return sum(part.log_prob(actions[..., k]) for k, part in enumerate(self.parts))

    def entropy(self):
        return sum(part.entropy() for part in self.parts)

    def kl(self, other):
        return sum(reference.kl_divergence(*pair) for pair in zip(self.parts, other.parts, strict=True))


def categorical(parameters):
    return reference.Categorical(logits=parameters)


def several(parameters):
    return Together([reference.Categorical(logits=part) for part in torch.split(parameters, [2, 4], -1)])


def switches(parameters):
    return reference.Independent(reference.Bernoulli(logits=parameters), 1)


def gaussian(parameters):
    mean, log_std = parameters.chunk(2, -1)
    return reference.Independent(reference.Normal(mean, log_std.exp()), 1)


CASES = {
    "discrete": (spaces.Discrete(4), categorical),
    "multi_discrete": (spaces.MultiDiscrete([2, 4]), several),
    "multi_binary": (spaces.MultiBinary(3), switches),
    "box": (spaces.Box(-1, 1, (3,), np.float32), gaussian),
}


def parameters_of(distribution, seed, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, distribution.width + distribution.free, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_logprobs_entropy_and_kl(name):
    space, reference_of = CASES[name]
    distribution = distribution_for(space)
    parameters, other = parameters_of(distribution, 0), parameters_of(distribution, 1)
    torch.manual_seed(0)
    actions = torch.from_numpy(distribution.sample(parameters.numpy()))
    expected, another = reference_of(parameters), reference_of(other)
    torch.testing.assert_close(distribution.logprobs(parameters, actions), expected.log_prob(actions.double()))
    torch.testing.assert_close(distribution.entropy(parameters), expected.entropy())
    kl = expected.kl(another) if isinstance(expected, Together) else reference.kl_divergence(expected, another)
    torch.testing.assert_close(distribution.kl(parameters, other), kl)


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary"])
def test_actions_come_as_often_as_they_are_likely(name):
    space, _ = CASES[name]
    distribution, draws = distribution_for(space), 40_000
    parameters = parameters_of(distribution, 2, batch=1).expand(draws, -1)
    torch.manual_seed(0)
    kinds, counts = (
        torch.from_numpy(distribution.sample(parameters.numpy())).reshape(draws, -1).unique(dim=0, return_counts=True)
    )
    actions = kinds.squeeze(1) if isinstance(space, spaces.Discrete) else kinds
    likely = distribution.logprobs(parameters[: len(kinds)], actions).exp()
    assert float(likely.sum()) == pytest.approx(1)  # every kind came
    torch.testing.assert_close(counts / draws, likely.float(), atol=0.01, rtol=0)


def test_moments_of_the_gaussian():
    distribution = distribution_for(spaces.Box(-1, 1, (2,), np.float32))
    parameters = torch.tensor([0.5, -2.0, 0.0, -1.0]).expand(40_000, -1)
    torch.manual_seed(0)
    drawn = torch.from_numpy(distribution.sample(parameters.numpy()))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.5, -2.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([1.0, np.exp(-1)]).float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_no_action_is_likelier_than_the_mode(name):
    distribution = distribution_for(CASES[name][0])
    parameters = parameters_of(distribution, 3, batch=1).expand(500, -1)
    torch.manual_seed(0)
    drawn = distribution.logprobs(parameters, torch.from_numpy(distribution.sample(parameters.numpy())))
    mode = distribution.logprobs(parameters[:1], torch.from_numpy(distribution.mode(parameters[:1].numpy())))
    assert (drawn <= mode + 1e-9).all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=5),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiDiscrete([2, 2], start=[4, -3]),
        spaces.MultiBinary((2, 3)),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Box(-1, 1, (), np.float32),
    ],
    ids=str,
)
def test_actions_have_the_shape_and_numbers_of_their_space(space):
    distribution = distribution_for(space)
    actions = distribution.to_environment(distribution.mode(parameters_of(distribution, 4).float().numpy()))
    assert actions.shape == (BATCH, *space.shape)
    for action in actions:
        clipped = np.asarray(np.clip(action, space.low, space.high)) if isinstance(space, spaces.Box) else action
        assert space.contains(clipped), action


def test_the_gaussian_scores_what_was_drawn_outside_of_the_box():
    distribution = Gaussian(1, (1,))
    inside, outside = (distribution.logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([[x]])) for x in (1.0, 3.0))
    assert float(inside - outside) == pytest.approx((9 - 1) / 2)


def test_other_spaces_are_refused():
    with pytest.raises(InputError, match=r"action space .* is not one of .*ActionWrapper"):
        distribution_for(spaces.Text(3))


@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 5, np.int64), (-3, 3, np.int8)])
def test_a_box_of_whole_numbers_is_given_some_of_its_own(low, high, dtype):
    space = spaces.Box(low, high, (1,), dtype)
    actions = distribution_for(space).to_environment(np.array([[-7.3], [1.6], [9.0]], np.float32))
    assert actions.tolist() == [[low], [2], [high]]
    assert all(space.contains(action) for action in actions)
