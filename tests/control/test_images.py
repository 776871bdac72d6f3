"""Images: kept as bytes, seen through convolutions, beside numbers too, by actor and critic in common."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import Showing, same_records, same_weights, unbroken_and_resumed
from torch import nn

from taurl.control import A2C, DQN, GRPO, PPO, REINFORCE, TRPO, A2CConfig, PPOConfig
from taurl.control import load as load_policy
from taurl.control.environments import Environments
from taurl.control.images import ROWS, Convolution, Features
from taurl.control.networks import both_with_pullback, parameters_and_values
from taurl.control.spaces import encode, has_images, is_image, width
from taurl.runtime.errors import InputError


def pixels(*shape, dtype=np.uint8):
    return spaces.Box(0, 255 if dtype == np.uint8 else 1, shape, dtype)


class Sides(gymnasium.Env):
    """Rewards the third of the image that is bright; beside numbers, the next one where they say so. 8 steps."""

    action_space = spaces.Discrete(3)

    def __init__(self, shape=(7, 9, 3), numbers=False):
        self.image = pixels(*shape)
        parts = spaces.Tuple([spaces.Box(-1, 1, (2,), np.float32), self.image])
        self.observation_space = spaces.Dict(kind=spaces.Discrete(2), parts=parts) if numbers else self.image
        self.numbers = numbers

    def _show(self):
        shown = np.zeros(self.image.shape, np.uint8)
        self.bright, self.kind = self.np_random.integers(3), self.np_random.integers(2)
        width = np.moveaxis(shown, 0, -1) if shown.shape[0] < shown.shape[2] else shown  # [height, width, channels]
        third = width.shape[1] // 3
        width[:, self.bright * third : (self.bright + 1) * third] = 255
        return {"kind": self.kind, "parts": (np.array([0.5, -1], np.float32), shown)} if self.numbers else shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action):
        wanted = (self.bright + self.kind * self.numbers) % 3
        self.steps += 1
        return self._show(), float(action == wanted), False, self.steps == 8, {}


SETTINGS = {"environments": 8, "rollout_steps": 16, "learning_rate": 2e-3, "record_every": 256, "eval_episodes": 5}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (pixels(84, 84, 3), True),
        (pixels(4, 84, 84), True),
        (pixels(10, 10, 4, dtype=np.bool_), True),
        (pixels(84, 84), False),
        (spaces.Box(0, 1, (84, 84, 3), np.float32), False),
        (spaces.MultiBinary((3, 3, 3)), False),
    ],
    ids=str,
)
def test_what_is_an_image(space, expected):
    assert is_image(space) == expected
    assert has_images(spaces.Dict(a=spaces.Tuple([spaces.Discrete(2), space]))) == expected


def test_images_and_numbers_are_kept_exactly():
    image, box = pixels(2, 3, 5), spaces.Box(-np.inf, np.inf, (2,), np.float32)
    space = spaces.Dict(a=spaces.Tuple([box, image]), z=spaces.Discrete(3))
    shown = np.random.default_rng(0).integers(256, size=(4, 2, 3, 5), dtype=np.uint8)
    numbers = np.array([[1 / 3, -1e30], [np.pi, 0.0], [1e-40, 5.0], [-0.1, 7.0]], np.float32)
    encoded = encode(space, {"a": (numbers, shown), "z": np.array([0, 2, 1, 1])})
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (4, width(space)) == (4, 2 * 4 + 30 + 3 * 4)
    assert torch.equal(encoded[:, 8:38], torch.from_numpy(shown).flatten(1))

    features = Features(space)
    found = features(encoded.view(2, 2, -1)).flatten(0, 1)
    assert found.shape == (4, features.width) == (4, 2 + 128 + 3)
    assert torch.equal(found[:, :2], torch.from_numpy(numbers))
    assert found[:, -3:].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    torch.testing.assert_close(found[:, 2:-3], features.convolutions[0](torch.from_numpy(shown).flatten(1)))


def by_hand(convolution, images):
    """The same layers as PyTorch's modules, [N, channels, height, width] of 0 to 1 → features."""
    parts = [part for one in convolution.filters for part in (one, nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), convolution.units, nn.ReLU())(images)


@pytest.mark.parametrize(
    ("space", "shapes"),
    [
        (pixels(4, 84, 84), [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]),  # Mnih et al. 2015
        (pixels(96, 84, 3), [(32, 3, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 8 * 7)]),
        (pixels(36, 36, 3), [(32, 3, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64)]),
        (pixels(10, 10, 4, dtype=np.bool_), [(16, 4, 3, 3), (32, 16, 3, 3), (128, 32 * 25)]),
        (pixels(2, 7, 5), [(16, 2, 3, 3), (32, 16, 3, 3), (128, 32 * 12)]),
        (pixels(1, 1, 1), [(16, 1, 3, 3), (32, 16, 3, 3), (128, 32)]),
    ],
    ids=str,
)
def test_the_network_that_fits(space, shapes):
    convolution = Convolution(space)
    assert [tuple(one.weight.shape) for one in (*convolution.filters, convolution.units)] == shapes
    space.seed(0)
    shown = np.stack([space.sample() for _ in range(3)])
    images = torch.from_numpy(shown).float() / (1 if space.dtype == np.bool_ else 255)
    images = images if space.shape[0] < space.shape[2] else images.permute(0, 3, 1, 2)
    torch.testing.assert_close(convolution(encode(space, shown)), by_hand(convolution, images))


def test_weights_are_orthogonal_with_gain_root_two():
    convolution = Convolution(pixels(4, 84, 84))
    for one in (*convolution.filters, convolution.units):
        rows = one.weight.detach().flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
        assert not one.bias.any()


def test_many_images_are_convolved_in_parts():
    features = Features(pixels(3, 4, 4))
    many = torch.randint(256, (ROWS + 3, 48), dtype=torch.uint8)
    torch.testing.assert_close(features(many), features.convolutions[0](many))


def trainer_of(tmp_path, kind=PPO, config=PPOConfig, **settings):
    numbers = settings.pop("numbers", False)
    if config is PPOConfig:
        settings.setdefault("minibatch_size", 64)
    return kind(lambda: Sides(numbers=numbers), config(out=tmp_path / "run", **SETTINGS | settings))


def test_rollouts_keep_bytes(tmp_path):
    trainer = trainer_of(tmp_path, steps=256)
    shown = trainer.environments.reset()
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 3)
    assert rollout.observations.dtype == torch.uint8
    np.testing.assert_array_equal(rollout.observations[0].view(8, 7, 9, 3), shown)


@pytest.mark.parametrize("numbers", [False, True])
def test_convolutions_are_common_to_actor_and_critic_and_trained_once(tmp_path, numbers):
    trainer = trainer_of(tmp_path, steps=256, numbers=numbers)
    actor, critic = trainer.policy.actor, trainer.critic
    assert actor.features is critic.features
    sizes = [len(one) for one in actor.head.parameters() if one.dim() == 2]
    assert sizes == ([64, 64, 3] if numbers else [3])  # after convolutions alone no hidden ones, as the reference code
    each = {id(one): one.numel() for part in (actor, critic) for one in part.parameters()}
    assert len(trainer.optimizer.parameters) == sum(each.values())

    seen = encode(trainer.environments.observation_space, trainer.environments.reset())
    parameters, values = parameters_and_values(actor, critic, seen)
    torch.testing.assert_close(parameters, actor(seen))
    torch.testing.assert_close(values, critic(seen))


@pytest.mark.parametrize("numbers", [False, True])
def test_the_gradient_is_that_of_automatic_differentiation(tmp_path, numbers):
    trainer = trainer_of(tmp_path, steps=256, numbers=numbers)
    actor, critic = trainer.policy.actor, trainer.critic
    seen = encode(trainer.environments.observation_space, trainer.environments.reset())
    slopes, others = torch.randn(8, 3), torch.randn(8)
    parameters, values = parameters_and_values(actor, critic, seen)
    trainer.optimizer.gradient.zero_()
    ((parameters * slopes).sum() + (values * others).sum()).backward()
    expected = trainer.optimizer.gradient.clone()
    trainer.optimizer.gradient.fill_(7.0)  # what was there before is not added to
    again, valued, pullback = both_with_pullback(actor, critic)(seen.numpy())
    pullback(slopes.numpy(), others.numpy())
    torch.testing.assert_close(torch.from_numpy(again), parameters.detach())
    torch.testing.assert_close(torch.from_numpy(valued), values.detach())
    torch.testing.assert_close(trainer.optimizer.gradient, expected, rtol=1e-4, atol=1e-5)
    assert all(one.grad.any() for one in actor.features.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [False, True])
def test_ppo_learns_to_see(tmp_path, numbers):
    trainer = trainer_of(tmp_path, steps=6144 if numbers else 2048, numbers=numbers).train()
    assert trainer.evaluate(10).metrics()["eval/mean_reward"] > 7  # of 8; blind 2.7
    assert load_policy(tmp_path / "run").predict(trainer.environments.vector.envs[0].reset(seed=0)[0]) in range(3)


@pytest.mark.slow
def test_a2c_learns_to_see(tmp_path):
    trainer = trainer_of(tmp_path, A2C, A2CConfig, steps=12_000, rollout_steps=8, learning_rate=7e-4).train()
    assert trainer.evaluate(10).metrics()["eval/mean_reward"] > 7


def test_a_policy_with_images_and_numbers_acts_alike_when_loaded(tmp_path):
    trainer = trainer_of(tmp_path, steps=256, numbers=True).train()
    loaded = load_policy(tmp_path / "run")
    assert loaded.observation_space == trainer.environments.observation_space
    environments = Environments(lambda: Sides(numbers=True), 40, seed=5)
    shown = environments.reset()
    actions = trainer.policy.act(shown)
    assert len(set(actions.tolist())) > 1
    np.testing.assert_array_equal(loaded.act(shown), actions)


def test_a_resumed_run_with_images_is_an_unbroken_one(tmp_path):
    settings = SETTINGS | {"steps": 1024, "save_every": 512, "eval_episodes": 0, "minibatch_size": 64}
    whole, parts = unbroken_and_resumed(PPO, PPOConfig, tmp_path, stop_after=768, env=Sides, **settings)
    assert same_records(whole, parts)
    assert same_weights(whole, parts)


@pytest.mark.parametrize("kind", [DQN, GRPO, REINFORCE, TRPO])
def test_algorithms_that_take_no_images_say_so(tmp_path, kind):
    with pytest.raises(InputError, match=r"has images, which .* does not take; take ppo or a2c") as caught:
        kind(Sides, kind.config_class(out=tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(84, 84), (4, 84, 84, 3)])
def test_frames_that_would_be_read_as_numbers_are_refused(tmp_path, shape):
    frames = spaces.Box(0, 255, shape, np.uint8)
    with pytest.raises(InputError, match="looks like images, which have three dimensions here"):
        PPO(lambda: Showing(frames), PPOConfig(out=tmp_path / "run"))
    board = spaces.Box(0, 255, (21, 79), np.uint8)  # characters, say
    assert PPO(lambda: Showing(board), PPOConfig(out=tmp_path / "run")).environments.observation_space == board


def test_images_are_not_normalised(tmp_path):
    with pytest.raises(InputError, match="normalize_observations is true, but images are scaled"):
        trainer_of(tmp_path, steps=256, normalize_observations=True)


@pytest.mark.parametrize("setting", [{"hidden": (8,)}, {"activation": "relu"}])
def test_hidden_layers_are_refused_where_images_alone_have_none(tmp_path, setting):
    pixels = spaces.Box(0, 255, (84, 84, 3), np.uint8)
    with pytest.raises(InputError, match="but images alone go through convolutions to the outputs"):
        PPO(lambda: Showing(pixels), PPOConfig(out=tmp_path / "run", **setting))
    both = spaces.Dict({"pixels": pixels, "speed": spaces.Box(-1, 1, (2,))})
    PPO(lambda: Showing(both), PPOConfig(out=tmp_path / "run", **setting))


def test_images_have_no_memory(tmp_path):
    with pytest.raises(InputError, match="memory is 16, which is for observations without images"):
        trainer_of(tmp_path, steps=256, memory=16)
