"""Rows about policies: GRPO and RLOO of TRL, rollouts of Stable-Baselines3, conjugate gradient of sb3-contrib."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from agreement import peers
from agreement.batch import ADVANTAGES, ENTROPIES, HALVES, LENGTH, LOGPROBS, MASK, OLD, REFERENCE, ROWS
from agreement.compare import Row, compare, compare_values, distance, with_gradient
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from torch import Tensor

from taurl.functional.advantages import group_relative, leave_one_out, normalize_then_sum, sum_then_normalize
from taurl.functional.aggregation import weighted_sum
from taurl.functional.entropy import top_entropy_mask
from taurl.functional.importance import sequence_ratios, token_ratios, trajectory_log_weights
from taurl.functional.kl import kl_loss
from taurl.functional.loss_types import LOSS_TYPES, loss_weights, policy_loss
from taurl.functional.returns import generalized_advantage
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.trust_region import conjugate_gradient
from taurl.functional.value_losses import clipped_value_loss, explained_variance, squared_value_loss
from taurl.functional.whitening import whiten

SAPO = {"expected": "float32", "why": "TRL's `torch.where` makes the temperature 1.05 a float32."}


def our_grpo(
    logprobs: Tensor,
    loss_type: str,
    *,
    level: str | None = None,
    mask: Tensor = MASK,
    old: Tensor = OLD,
    beta: float = 0.0,
    weighted_kl: bool = False,
    kept: Tensor | None = None,
    delta: float = math.inf,
) -> Tensor:
    """By taurl: loss per token, KL by k3 per token, aggregation."""
    options = {"ratio_level": level, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": delta}
    losses = policy_loss(loss_type, logprobs, old, ADVANTAGES[:, None], mask, **options)
    losses = losses if kept is None else losses * kept
    if beta:
        ratios = sequence_ratios(logprobs, old, mask) if level == "sequence" else token_ratios(logprobs, old)
        weights = ratios if weighted_kl else None
        losses = losses + beta * kl_loss(logprobs, REFERENCE, mask, estimator="k3", level="token", ratios=weights)
    return weighted_sum(losses, loss_weights(loss_type, mask, max_tokens=LENGTH, dtype=torch.float64))


def their_grpo(
    logprobs: Tensor,
    loss_type: str,
    *,
    level: str | None = None,
    mask: Tensor = MASK,
    old: Tensor = OLD,
    beta: float = 0.0,
    weighted_kl: bool = False,
    **options: object,
) -> Tensor:
    """By TRL, told the same; the cap of cispo is 1 + ε there."""
    cap = 1.28 if loss_type == "cispo" else 0.28
    options = {"loss_type": loss_type, "epsilon": 0.2, "epsilon_high": cap, "beta": beta, **options}
    if level:
        options["importance_sampling_level"] = level
    reference = REFERENCE if beta else None
    return peers.grpo_loss(
        logprobs, old, ADVANTAGES, mask, reference_logprobs=reference, use_bias_correction_kl=weighted_kl, **options
    )


def pair(name: str, loss_type: str, ours: dict, theirs: dict, **rest: object) -> Row:
    cases = [(lambda x: our_grpo(x, loss_type, **ours), lambda x: their_grpo(x, loss_type, **theirs))]
    return compare(name, cases, LOGPROBS, **rest)


def grpo_rows() -> Iterator[Row]:
    for name, definition in LOSS_TYPES.items():
        variants = [{}, {"beta": 0.04}, {"beta": 0.04, "weighted_kl": True}]
        variants += [{"delta": 2.0}] if definition.surrogate == "clip" else []
        for level in ["token", "sequence"] if definition.ratio_level else [None]:
            given = [{"loss_type": name, "level": level, **options} for options in variants]
            cases = [(partial(our_grpo, **options), partial(their_grpo, **options)) for options in given]
            note = ", TRL's cap less 1 as clip_high" if name == "cispo" else ""
            label = f"{level} ratio" if level else "trajectory weight"
            yield compare(f"{name}, {label}{note}", cases, LOGPROBS, **(SAPO if name == "sapo" else {}))
    ours = {"kept": top_entropy_mask(ENTROPIES, MASK, share=0.2)}
    theirs = {"entropies": ENTROPIES, "top_entropy_quantile": 0.2}
    yield pair("dapo, top entropy quantile 0.2", "dapo", ours, theirs)
    for name in ("grpo", "dr_grpo", "dapo", "sapo"):
        rest = SAPO if name == "sapo" else {}
        yield pair(f"{name}, two micro-batches of equal rows", name, {}, {"parts": HALVES}, **rest)
    yield from grpo_differences()


def grpo_differences() -> Iterator[Row]:
    yield pair(
        "cispo, ε_high 0.28 given to both",
        "cispo",
        {},
        {"epsilon_high": 0.28},
        expected="differs",
        judge=lambda x: (-(x - OLD).exp().detach().clamp(max=1.28) * ADVANTAGES[:, None] * x)[MASK].mean(),
        why="The paper caps the weight at 1 + ε_high, taurl too; TRL reads `epsilon_high` as the cap, so that a value "
        "meant as ε shrinks every gradient.",
    )
    yield pair(
        "dapo, delta 1.1 below 1 + ε_high",
        "dapo",
        {"delta": 1.1},
        {"delta": 1.1},
        expected="differs",
        judge=lambda x: dual_clip_by_hand((x - OLD).exp(), 1.1)[MASK].mean(),
        why="The paper's dual clip is for A < 0, as in taurl; TRL caps the ratio of good tokens too, which lose their "
        "gradient before the clip asks for it.",
    )
    masked, rest = MASK.clone(), torch.arange(ROWS) != 4
    masked[4] = False
    without = {"loss_type": "grpo", "epsilon_high": 0.28}
    yield pair(
        "grpo, one row fully masked",
        "grpo",
        {"mask": masked},
        {"mask": masked},
        expected="differs",
        judge=lambda x: peers.grpo_loss(x[rest], OLD[rest], ADVANTAGES[rest], MASK[rest], **without),
        why="A row left out counts nowhere in taurl, as if not sampled; TRL keeps it in the number of rows. "
        "The third computation is TRL's own, without the row.",
    )
    yield pair(
        "bnpo, two micro-batches",
        "bnpo",
        {},
        {"parts": HALVES},
        expected="differs",
        judge=lambda x: their_grpo(x, "bnpo"),
        why="TRL divides by the tokens of the micro-batch, so that its gradient depends on how the batch is cut. The "
        "third computation is TRL's own of the uncut batch.",
    )
    yield pair(
        "luspo, the default ratio of both",
        "luspo",
        {},
        {},
        expected="differs",
        judge=luspo_by_hand,
        why="LUSPO is defined with the sequence's ratio, taurl's default; TRL's is the token's.",
    )
    far = LOGPROBS + 30 / MASK.sum(1, keepdim=True)
    yield pair(
        "vespo, log W = −30",
        "vespo",
        {"old": far},
        {"old": far},
        expected="differs",
        judge=lambda x: vespo_by_hand(x, far)[MASK].mean(),
        why="TRL stops log W at −18.4 and with it the decay of φ; the formula, and taurl, do not. Both are next to "
        "nothing there.",
    )
    yield pair(
        "dapo, top entropy quantile 0",
        "dapo",
        {"kept": torch.zeros_like(MASK)},
        {"entropies": ENTROPIES, "top_entropy_quantile": 0.0},
        expected="differs",
        judge=lambda x: 0 * x.sum(),
        why="A share of 0 keeps no token in taurl; TRL keeps the one with the highest entropy.",
    )


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
        yield compare_values(
            f"two rewards, {name}", ours(rewards, weights), peers.advantages(rewards, "grpo", **options)
        )
    alone = leave_one_out(one[..., 0])
    yield compare_values("RLOO advantage", alone, peers.advantages(one, "rloo"))
    normalized = peers.advantages(one, "rloo", normalize_advantages=True)
    yield compare_values("RLOO advantage, normalised", whiten(alone, ~one[..., 0].isnan()), normalized)

    def our_rloo(x: Tensor) -> Tensor:
        ratios = trajectory_log_weights(x, OLD, MASK).exp()[:, None]
        return clipped_surrogate(ratios, ADVANTAGES[:, None], clip_low=0.2, clip_high=0.2).mean()

    yield compare("RLOO loss", [(our_rloo, lambda x: peers.rloo_loss(x, OLD, ADVANTAGES, MASK))], LOGPROBS)


def stable_baselines_rows() -> Iterator[Row]:
    factors = {"discount": 0.97, "trace_decay": 0.9}
    ppo, logs = peers.ppo_rollout(**factors)
    buffer = ppo.rollout_buffer
    rewards, terminated, truncated = (torch.tensor([[step[k] for step in log] for log in logs]).T for k in range(3))
    followed = torch.from_numpy(np.stack([[step[3] for step in log] for log in logs], 1))
    next_values = ppo.policy.predict_values(followed.flatten(0, 1)).detach().view(rewards.shape).double()
    values, found = torch.tensor(buffer.values).double(), torch.tensor(buffer.advantages).double()
    ours = generalized_advantage(rewards.double(), values, next_values, terminated, truncated, **factors)
    yield compare_values(
        "GAE of a rollout with ends and time limits",
        ours,
        found,
        expected="float32",
        why="Stable-Baselines3's buffer is float32. It adds γV to the reward of a truncated step, where taurl reads V "
        "of what followed: the same advantage.",
    )
    theirs = peers.gae_in_float64(buffer, next_values[-1:].T, ppo._last_episode_starts)
    folded, done, never = torch.from_numpy(buffer.rewards), terminated | truncated, torch.zeros_like(terminated)
    ours = generalized_advantage(folded, values, next_values, done, never, **factors)
    yield compare_values("GAE, the buffer's recurrence in float64", ours, theirs[0])
    yield compare_values("λ-returns, likewise", ours + values, theirs[1])
    targets = theirs[1].flatten()
    guesses = targets + torch.randn_like(targets)
    explained = sb3_explained_variance(guesses.numpy(), targets.numpy())
    yield compare_values(
        "explained variance", explained_variance(guesses, targets), torch.tensor(explained, dtype=torch.float64)
    )
    yield from value_clipping(ppo, 0.2)
    yield from conjugate_gradient_rows()


def value_clipping(ppo: PPO, clip: float) -> Iterator[Row]:
    buffer, shift = ppo.rollout_buffer, torch.zeros((), dtype=torch.float64)
    states, old, targets = (
        torch.from_numpy(array.copy()).flatten(0, 1) for array in (buffer.observations, buffer.values, buffer.returns)
    )
    with torch.no_grad():
        ppo.policy.value_net.weight *= 1.5  # many values move by more than the clip, some away from their targets
    now = ppo.policy.predict_values(states).detach()[:, 0].double()

    def by_hand(shift: Tensor) -> Tensor:
        steps = zip((now + shift).unbind(), old.tolist(), targets.tolist(), strict=True)
        return torch.stack([max((v - t) ** 2, (v.clamp(o - clip, o + clip) - t) ** 2) for v, o, t in steps]).mean()

    plain = with_gradient(lambda shift: 2 * squared_value_loss(now + shift, targets).mean(), shift)
    clipped = with_gradient(lambda shift: 2 * clipped_value_loss(now + shift, old, targets, clip=clip).mean(), shift)
    third, found = with_gradient(by_hand, shift), peers.ppo_value_loss(ppo, clip=clip)
    yield Row(
        "PPO, value loss (twice taurl's ½)",
        *map(distance, plain, peers.ppo_value_loss(ppo, clip=None)),
        expected="float32",
        why="Stable-Baselines3's critic is float32.",
    )
    yield Row(
        "PPO, clipped value loss (twice taurl's ½)",
        *map(distance, clipped, found),
        expected="differs",
        why="Without the maximum of PPO's code, a V that strayed from its target by more than ε has gradient 0 and "
        "stays astray. The third computation is that maximum in a loop.",
        judged=tuple(max(map(distance, outcome, third)) for outcome in (clipped, found)),
    )


def conjugate_gradient_rows() -> Iterator[Row]:
    root, target = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    matrix = root @ root.T / 12 + 0.1 * torch.eye(12, dtype=torch.float64)
    found = conjugate_gradient_solver(matrix.mv, target, max_iter=40, residual_tol=1e-28)
    ours = conjugate_gradient(matrix.mv, target, iterations=40, tolerance=1e-14).vector
    yield compare_values("conjugate gradient to the end, random SPD system", ours, found)
    small = 1e-6 * target
    yield compare_values(
        "conjugate gradient, default tolerance, right side of 10⁻⁶",
        conjugate_gradient(matrix.mv, small, iterations=40).vector,
        conjugate_gradient_solver(matrix.mv, small, max_iter=40),
        expected="differs",
        judge=torch.linalg.solve(matrix, small),
        why="sb3-contrib starts at noise and stops at ‖r‖ < 10⁻⁵ whatever the scale, here more than the right side "
        "itself; taurl's tolerance is relative. The third computation is a direct solve.",
    )
