"""Figures of a step: what was sampled, and what its updates did."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from taurl.functional.advantages import has_variance
from taurl.llm.scoring.rollouts import Rollout
from taurl.runtime.optimization import Update


class Tally:
    """What the updates of a step did, and means over the tokens that they trained on."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.sums: dict[str, Tensor] = {}  # float64, where the values are: reading one of them waits for a GPU
        self.counts: dict[str, int] = {}

    def add(self, mask: Tensor, values: Mapping[str, Tensor]) -> None:
        """Count values [N, L] of one part where its mask holds."""
        places = mask.flatten().nonzero()[:, 0]  # found once: each time that they are, a GPU is waited for
        for name, value in values.items():
            total = value.detach().flatten()[places].double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + len(places)

    def figures(self) -> dict[str, float]:
        """Everything by metric name; what no part reported (all groups skipped) is not there."""
        return {
            "loss": float(np.mean([update.loss for update in self.updates])),
            "grad_norm": float(np.mean([update.grad_norm for update in self.updates])),
            "updates_skipped": sum(not update.taken for update in self.updates),
            **self.means(),
        }

    def means(self) -> dict[str, float]:
        """The means over tokens alone."""
        totals = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {name: total / max(1, self.counts[name]) for name, total in zip(self.sums, totals, strict=True)}


def rollout_figures(rollout: Rollout, rewards: Tensor, times: Mapping[str, float]) -> dict[str, float]:
    """Spread of the rewards [P, G] within their groups (with G = 1: in the step), lengths, and speed.

    Args:
        times: seconds of the step's phases, `time/sample` among them.
    """
    grouped = rewards.shape[1] > 1
    groups = [group[~np.isnan(group)] for group in (rewards if grouped else rewards.T).numpy()]
    spreads = [group.std(ddof=1) for group in groups if len(group) > 1]
    lengths = [completion.length for completion in rollout.completions]
    return {
        "reward_std": float(np.mean(spreads)) if spreads else 0.0,
        **({"frac_reward_zero_std": 1 - float(has_variance(rewards).float().mean())} if grouped else {}),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": float(np.mean([c.truncated for c in rollout.completions])),
        "sampling/tokens_per_second": sum(lengths) / times["time/sample"],
        "tokens_per_second": sum(lengths) / sum(times.values()),
    }
