"""Rows about policies: GRPO and RLOO of TRL, rollouts of Stable-Baselines3, conjugate gradient of sb3-contrib."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from agreement import peers
from agreement.batch import ADVANTAGES, ENTROPIES, HALVES, LENGTH, LOGPROBS, MASK, OLD, REFERENCE, ROWS
from agreement.compare import Row, compare, compare_values, distance, with_gradient
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from torch import Tensor

from taurl.functional.advantages import group_relative, leave_one_out, normalize_then_sum, sum_then_normalize, whiten
from taurl.functional.aggregation import weighted_sum
from taurl.functional.entropy import top_entropy_mask
from taurl.functional.importance import token_ratios, trajectory_log_weights
from taurl.functional.kl import kl_loss
from taurl.functional.loss_types import LOSS_TYPES, loss_weights, policy_loss
from taurl.functional.returns import generalized_advantage
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.trust_region import conjugate_gradient
from taurl.functional.values import clipped_value_loss, explained_variance


def our_grpo(
    logprobs: Tensor, loss_type: str, *, level: str | None = None, mask: Tensor = MASK, beta: float = 0.0,
    delta: float = math.inf, clip_high: float = 0.28, old: Tensor = OLD, kept: Tensor | None = None,
    weighted_kl: bool = False,
) -> Tensor:  # fmt: skip
    options = {"ratio": level, "clip_low": 0.2, "clip_high": clip_high, "dual_clip": delta}
    losses = policy_loss(loss_type, logprobs, old, ADVANTAGES[:, None], mask, **options)
    losses = losses if kept is None else losses * kept
    if beta:
        ratios = token_ratios(logprobs, old) if weighted_kl else None
        losses = losses + beta * kl_loss(logprobs, REFERENCE, mask, estimator="k3", level="token", ratios=ratios)
    return weighted_sum(losses, loss_weights(loss_type, mask, max_tokens=LENGTH, dtype=torch.float64))


def their_grpo(logprobs: Tensor, loss_type: str, *, mask: Tensor = MASK, old: Tensor = OLD, **options: object) -> Tensor:
    cap = {"epsilon_high": 1.28 if loss_type == "cispo" else 0.28}
    given = {"epsilon": 0.2, "loss_type": loss_type, **cap, **options}
    beta = given.pop("beta", 0.0)
    reference = REFERENCE if beta else None
    return peers.grpo_loss(logprobs, old, ADVANTAGES, mask, reference_logprobs=reference, beta=beta, **given)


def grpo_rows() -> Iterator[Row]:
    for name, definition in LOSS_TYPES.items():
        for level in ["token", "sequence"] if definition.ratio else [None]:
            theirs = {"importance_sampling_level": level} if level else {}
            cases = [
                (
                    lambda x, o=options, name=name, level=level: our_grpo(x, name, level=level, **o),
                    lambda x, o=options, name=name, theirs=theirs: their_grpo(x, name, **theirs, **o),
                )
                for options in ({}, {"delta": 2.0}, {"beta": 0.04})
            ]
            note = ", its cap less 1 as clip_high" if name == "cispo" else ""
            label = f"{level} ratio" if level else "trajectory weight"
            yield compare(f"{name}, {label}: plain, delta 2, KL{note}", cases, LOGPROBS)
    yield pair("dapo, KL weighted by the token's ratio", "dapo",
               {"beta": 0.04, "weighted_kl": True}, {"beta": 0.04, "use_bias_correction_kl": True})  # fmt: skip
    kept = top_entropy_mask(ENTROPIES, MASK, quantile=0.2)
    yield pair("dapo, top entropy quantile 0.2", "dapo",
               {"kept": kept}, {"entropies": ENTROPIES, "top_entropy_quantile": 0.2})  # fmt: skip
    for name in ("grpo", "dr_grpo", "dapo", "sapo"):
        yield pair(f"{name}, two micro-batches of equal rows", name, {}, {"parts": HALVES})
    yield from grpo_differences()


def pair(name: str, loss_type: str, ours: dict, theirs: dict, **rest: object) -> Row:
    cases = [(lambda x: our_grpo(x, loss_type, **ours), lambda x: their_grpo(x, loss_type, **theirs))]
    return compare(name, cases, LOGPROBS, **rest)


def grpo_differences() -> Iterator[Row]:
    ratios = lambda x: (x - OLD).exp()  # noqa: E731
    mean = lambda losses: losses[MASK].mean()  # noqa: E731
    differs = {"expected": "differs"}
    yield pair("cispo, ε_high 0.28 given to both", "cispo", {}, {"epsilon_high": 0.28}, **differs,
        judge=lambda x: mean(-ratios(x).detach().clamp(max=1.28) * ADVANTAGES[:, None] * x),
        why="The paper caps the weight at 1 + ε_high; TRL reads `epsilon_high` as the cap, so a value meant as ε "
        "shrinks every gradient.")  # fmt: skip
    yield pair("dapo, delta 1.1 below 1 + ε_high", "dapo", {"delta": 1.1}, {"delta": 1.1}, **differs,
        judge=lambda x: mean(dual_clip_by_hand(ratios(x), 1.1)),
        why="The dual clip is for A < 0; TRL caps the ratio of good tokens too, which then lose their gradient before "
        "the clip says so.")  # fmt: skip
    masked, rest = MASK.clone(), torch.arange(ROWS) != 4
    masked[4] = False
    yield pair("grpo, one row fully masked", "grpo", {"mask": masked}, {"mask": masked}, **differs,
        judge=lambda x: peers.grpo_loss(x[rest], OLD[rest], ADVANTAGES[rest], MASK[rest], epsilon_high=0.28),
        why="A row left out should count nowhere, as if it had not been sampled; TRL keeps it in the number of rows. "
        "The third number is TRL's own, without the row.")  # fmt: skip
    yield pair("bnpo, two micro-batches", "bnpo", {}, {"parts": HALVES}, **differs,
        judge=lambda x: their_grpo(x, "bnpo"),
        why="TRL divides by the tokens of the micro-batch, so its gradient depends on how the batch is cut. The third "
        "number is TRL's own of the uncut batch.")  # fmt: skip
    yield pair("luspo, the default ratio of both", "luspo", {}, {}, **differs,
        judge=lambda x: luspo_by_hand(x),
        why="LUSPO is defined on the sequence's ratio; TRL's default is the token's, and it warns.")  # fmt: skip
    far = LOGPROBS + 30 / MASK.sum(1, keepdim=True)
    yield pair("vespo, log W at −30", "vespo", {"old": far}, {"old": far}, **differs,
        judge=lambda x: mean(vespo_by_hand(x, far)),
        why="TRL stops log W at −18.4, and with it the decay of the weight; the formula has no such stop. Both are "
        "next to nothing there.")  # fmt: skip
    yield pair("dapo, top entropy quantile 0", "dapo", {"kept": torch.zeros_like(MASK)},
        {"entropies": ENTROPIES, "top_entropy_quantile": 0.0}, **differs, judge=lambda x: 0 * x.sum(),
        why="A share of 0 keeps no token; TRL keeps the one with the highest entropy.")  # fmt: skip


def dual_clip_by_hand(ratios: Tensor, c: float) -> Tensor:
    losses = torch.zeros_like(ratios)
    for i, t in MASK.nonzero().tolist():
        a, r = ADVANTAGES[i], ratios[i, t]
        clipped = torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
        losses[i, t] = -(torch.maximum(clipped, c * a) if a < 0 else clipped)
    return losses


def luspo_by_hand(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, old, mask, a in zip(x, OLD, MASK, ADVANTAGES, strict=True):
        ratio = (row - old)[mask].mean().exp()
        total = total - int(mask.sum()) * torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
    return total / ROWS


def vespo_by_hand(x: Tensor, old: Tensor) -> Tensor:
    losses = torch.zeros_like(x)
    for i, t in MASK.nonzero().tolist():
        log_weight = sum((x[i, s] - old[i, s]).item() for s in range(LENGTH) if MASK[i, s])
        k, decay = (2.0, 3.0) if ADVANTAGES[i] >= 0 else (3.0, 2.0)
        losses[i, t] = -math.exp(k * log_weight + decay * (1 - math.exp(log_weight))) * ADVANTAGES[i] * x[i, t]
    return losses


def advantage_rows() -> Iterator[Row]:
    # Multiples of 1/64: TRL stores rewards in float32, which holds them exactly. The last completion has none.
    rewards = torch.randint(-200, 200, (ROWS // peers.GROUP, peers.GROUP, 2)).double() / 64
    rewards[0, 1, 1] = torch.nan
    rewards[1, 2] = torch.nan
    one, weights = rewards[..., :1], torch.tensor([0.5, 2.0], dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        ours, theirs = group_relative(one[..., 0], scale=scale), peers.advantages(one, "grpo", scale_rewards=scale)
        yield compare_values(f"GRPO advantage, scaled by {scale}", ours, theirs)
    for name, ours in {"sum_then_normalize": sum_then_normalize, "normalize_then_sum": normalize_then_sum}.items():
        options = {"multi_objective_aggregation": name, "reward_weights": weights.tolist()}
        yield compare_values(f"two rewards, {name}", ours(rewards, weights), peers.advantages(rewards, "grpo", **options))
    alone = leave_one_out(one[..., 0])
    yield compare_values("RLOO advantage", alone, peers.advantages(one, "rloo"))
    normalized = peers.advantages(one, "rloo", normalize_advantages=True)
    yield compare_values("RLOO advantage, normalised", whiten(alone, ~one[..., 0].isnan()), normalized)

    def our_rloo(x: Tensor) -> Tensor:
        ratios = trajectory_log_weights(x, OLD, MASK).exp()[:, None]
        return clipped_surrogate(ratios, ADVANTAGES[:, None], clip_low=0.2, clip_high=0.2).mean()

    yield compare("RLOO loss", [(our_rloo, lambda x: peers.rloo_loss(x, OLD, ADVANTAGES, MASK))], LOGPROBS)


def stable_baselines_rows() -> Iterator[Row]:
    discount, decay, clip = 0.97, 0.9, 0.2
    single = {"clip_range_vf": clip, "vf_coef": 1.0, "n_epochs": 1, "batch_size": 256, "max_grad_norm": 1e9}
    ppo, logs = peers.ppo_rollout(discount=discount, trace_decay=decay, **single)
    buffer, value = ppo.rollout_buffer, lambda states: ppo.policy.predict_values(torch.as_tensor(states)).detach()
    rewards, ended, cut = (torch.tensor([[step[k] for step in log] for log in logs]).T for k in range(3))
    following = torch.cat([value(np.stack([step[3] for step in log])) for log in logs], 1)
    values = torch.from_numpy(buffer.values.copy())
    factors = {"discount": discount, "trace_decay": decay}
    ours = generalized_advantage(rewards.double(), values.double(), following.double(), ended, cut, **factors)
    yield compare_values("GAE of a whole rollout, ends and time limits", ours, torch.tensor(buffer.advantages).double(),
        expected="float32", why="Stable-Baselines3's buffer and critic are float32; it adds γV to a truncated reward "
        "where taurl reads V of what followed: the same advantage.")  # fmt: skip
    observations, old, targets = (torch.from_numpy(a.copy()).double() for a in (buffer.observations, buffer.values, buffer.returns))
    last, dones = following[-1:].T, ppo._last_episode_starts
    theirs, _ = peers.gae_in_float64(buffer, last, dones)
    folded, done = torch.from_numpy(buffer.rewards), ended | cut
    ours = generalized_advantage(folded, values.double(), following.double(), done, torch.zeros_like(done), **factors)
    # within a rollout SB3 reads V of the state that followed from the next step's own value
    yield compare_values("GAE, the buffer's recurrence in float64, its rewards", ours, theirs)
    noise = targets.flatten() + torch.randn(targets.numel(), dtype=torch.float64)
    yield compare_values("explained variance", explained_variance(noise, targets.flatten()),
        torch.tensor(sb3_explained_variance(noise.numpy(), targets.flatten().numpy())))  # fmt: skip
    yield from value_clipping(ppo, observations, old, targets, clip)
    yield from conjugate_gradient_rows()


def value_clipping(ppo, observations: Tensor, old: Tensor, targets: Tensor, clip: float) -> Iterator[Row]:
    with torch.no_grad():
        ppo.policy.value_net.bias += 0.5  # every value moves by more than the clip, some of them away from the target
    now = ppo.policy.predict_values(observations.flatten(0, 1).float()).detach().double()[:, 0]
    old, targets, shift = old.flatten(), targets.flatten(), torch.zeros((), dtype=torch.float64)
    ppo.rollout_buffer.returns = ppo.rollout_buffer.returns.astype(np.float32)
    value, gradient = peers.ppo_value_step(ppo)
    mine = with_gradient(lambda s: 2 * clipped_value_loss(now + s, old, targets, clip=clip).mean(), shift)

    def by_hand(s: Tensor) -> Tensor:
        pairs = zip((now + s).unbind(), old.tolist(), targets.tolist(), strict=True)
        return torch.stack([max((v - t) ** 2, (v.clamp(o - clip, o + clip) - t) ** 2) for v, o, t in pairs]).mean()

    theirs = tuple(torch.tensor(number, dtype=torch.float64) for number in (value, gradient))
    third = with_gradient(by_hand, shift)
    judged = tuple(max(map(distance, outcome, third)) for outcome in (mine, theirs))
    yield Row("PPO, clipped value loss", *map(distance, mine, theirs), "differs",
        "Without the maximum a V that strayed from its target by more than ε has gradient 0 and stays astray; the third "
        "number is the maximum written as a loop.", judged)  # fmt: skip


def conjugate_gradient_rows() -> Iterator[Row]:
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix, target = root @ root.T / 12 + 0.1 * torch.eye(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    product = lambda vector: matrix @ vector  # noqa: E731
    for name, scale, theirs, rest in (
        ("CG on a random SPD system, run to the end", 1.0, {"max_iter": 40, "residual_tol": 1e-28}, {}),
        ("CG with default tolerances, right side 10⁻⁶ of that", 1e-6, {"max_iter": 40}, {"expected": "differs",
            "why": "sb3-contrib starts at noise and stops at ‖r‖² < 10⁻¹⁰ whatever the scale: it returns the noise. "
            "The third number is a direct solve."}),
    ):  # fmt: skip
        tolerance = {} if rest else {"tolerance": 1e-14}
        ours = conjugate_gradient(product, scale * target, iterations=40, **tolerance).vector
        found, exact = conjugate_gradient_solver(product, scale * target, **theirs), torch.linalg.solve(matrix, scale * target)
        yield compare_values(name, ours, found, **rest, judge=exact if rest else None)
