"""FlatAdam: PyTorch's AdamW number for number, and gradients that are not finite are left out, counted and said."""

import pytest
import torch
from small_environments import Endless
from torch import nn

from taurl.control import DQN, PPO, REINFORCE, DQNConfig, PPOConfig, REINFORCEConfig
from taurl.control.settings import AdamSettings
from taurl.control.updates import FlatAdam
from taurl.runtime.errors import RunError


def networks():
    torch.manual_seed(0)
    return {"one": nn.Linear(3, 4), "other": nn.Linear(2, 1, bias=False)}


def loss_of(modules, target):
    return ((modules["one"](torch.ones(3)) - target) ** 2).sum() + modules["other"](torch.ones(2)).sum() ** 3


class Settings(AdamSettings):
    learning_rate: float = 0.1
    max_grad_norm: float = 15.0
    adam_betas: tuple[float, float] = (0.5, 0.9)
    adam_epsilon: float = 1e-2
    weight_decay: float = 0.1


def test_it_is_adamw_with_a_clipped_gradient():
    mine, theirs = networks(), networks()
    optimizer = FlatAdam(mine, lambda target: (loss_of(mine, target), {}), Settings())
    weights = [*theirs["one"].parameters(), *theirs["other"].parameters()]
    adam = torch.optim.AdamW(weights, betas=(0.5, 0.9), eps=1e-2, weight_decay=0.1)
    norms = []
    for update in range(20):
        target, rate = torch.tensor([1.0, -2.0, 0.5, 3.0]) * (-1) ** update, 0.05 / (1 + update)
        norm, _ = optimizer.update(rate, target)
        adam.zero_grad()
        loss_of(theirs, target).backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights, 15.0)))
        assert norm == pytest.approx(norms[-1], rel=1e-5)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    assert min(norms) < 15.0 < max(norms), "nothing, or everything, is clipped"
    for one, other in zip(optimizer.named.values(), weights, strict=True):
        torch.testing.assert_close(one, other)


def test_averages_of_what_has_no_gradient_any_more_become_0_and_the_parameters_those_of_adamw():
    mine, theirs = nn.Linear(16, 16), nn.Linear(16, 16)
    theirs.load_state_dict(mine.state_dict())
    optimizer = FlatAdam({"one": mine}, None, AdamSettings(max_grad_norm=1e9, adam_betas=(0.9, 0.8)))
    settings = optimizer.config
    adam = torch.optim.AdamW(
        theirs.parameters(), lr=1e-3, betas=settings.adam_betas, eps=settings.adam_epsilon, weight_decay=0.0, fused=True
    )
    for update in range(1280):
        for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            other.grad = torch.randn(own.shape)
            if update > 4:
                other.grad[:8] = 0  # half of the units are dead from now on
            own.grad.copy_(other.grad)
        optimizer.step(1e-3)
        adam.step()
    smallest = torch.finfo(torch.float32).tiny
    for name, average in (("exp_avg", optimizer.mean), ("exp_avg_sq", optimizer.square)):
        of_torch = torch.cat([adam.state[weight][name].flatten() for weight in theirs.parameters()])
        assert ((of_torch != 0) & (of_torch.abs() < smallest)).any(), "nothing that could be left out"
        assert (average == 0).any()
        assert not ((average != 0) & (average.abs() < smallest)).any()
    for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_gradient_that_is_not_finite_changes_nothing_but_its_count():
    mine = networks()
    optimizer = FlatAdam(mine, lambda target: (loss_of(mine, target), {}), Settings(stop_after_non_finite=3))
    fine, broken = torch.ones(4), torch.full((4,), torch.nan)
    optimizer.update(0.1, fine)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    for _ in range(2):
        optimizer.update(0.1, broken)
    after = optimizer.tensors()
    assert int(after.pop("non_finite_in_a_row")) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    optimizer.update(0.1, fine)
    for _ in range(2):  # not three in a row
        optimizer.update(0.1, broken)
    assert optimizer.take_skipped() == 4
    with pytest.raises(RunError, match=r"gradient norm nan: not finite, 3 times in a row \(stop_after_non_finite\)"):
        optimizer.update(0.1, broken)
    assert optimizer.take_skipped() == 1


class Huge(Endless):
    """Its first episode has rewards whose squares are none of float32."""

    episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed)

    def step(self, action):
        shown, reward, *rest = super().step(action)
        return shown, 1e30 if self.episode == 1 else reward, *rest


RECORDED = {"environments": 4, "steps": 64, "record_every": 32, "eval_episodes": 0, "stop_after_non_finite": 100}
ON_POLICY = {"rollout_steps": 8, "minibatch_size": 16, "epochs": 3}


@pytest.mark.parametrize(
    ("trainer_class", "config", "skipped"),
    [
        (PPO, PPOConfig(**RECORDED, **ON_POLICY), [6, 0]),
        (REINFORCE, REINFORCEConfig(**{**RECORDED, "record_every": 20}, critic_updates=3, updates=2), [5, 0, 0, 0]),
        (DQN, DQNConfig(**RECORDED, train_every=32, learning_starts=0, gradient_steps=2, buffer_size=64), [0, 0]),
    ],
    ids=["ppo", "reinforce", "dqn"],
)
def test_updates_that_were_not_taken_are_in_the_record_and_said(trainer_class, config, skipped, tmp_path):
    trainer, said = trainer_class(Huge, config.model_copy(update={"out": tmp_path / "run"})), []
    trainer.run.view.note = said.append
    trainer.train()
    assert [record["updates_skipped"] for record in trainer.run.records()] == skipped
    expected = f"step {trainer.run.records()[0]['step']}: {skipped[0]} of its updates not taken: their gradient"
    assert [line[: len(expected)] for line in said if "not taken" in line] == [expected] * (skipped[0] > 0)
