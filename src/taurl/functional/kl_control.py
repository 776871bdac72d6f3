"""What a divergence costs, adapted from one iteration to the next: `(coefficient, divergence) → coefficient`.

`adapted_kl_coefficient` is made for the divergence from the policy that acted, which each iteration begins anew at 0;
`proportional_kl_coefficient` for the one from a fixed reference, which grows over the whole run.
"""

import math

from taurl.functional._inputs import require_positive

TOLERANCE = 1.5
SMALLEST, LARGEST = 2.0**-20, 2.0**20
LARGEST_ERROR = 0.2  # of the target; what the controller takes a larger one for, in either direction


def adapted_kl_coefficient(coefficient: float, divergence: float, *, target: float) -> float:
    """PPO's rule for the β of `surrogates.kl_penalized`: halved after a small move, doubled after a large one.

        d < d_targ / 1.5   β ← β / 2
        d > d_targ · 1.5   β ← β · 2

    Args:
        coefficient: β > 0 of the iteration that is over.
        divergence: d, the mean KL(π_old ‖ π) that it ended with. Infinite counts as large; NaN changes nothing.
        target: d_targ > 0.
    Returns: β of the next iteration, within [`SMALLEST`, `LARGEST`], which the paper has no need for: β soon meets
        the range that works, but where nothing is learned d is 0 and β would be halved for ever.
    Raises: ValueError if a number is not positive.
    Source: Schulman et al. 2017, arXiv:1707.06347, section 4.
    """
    require_positive(coefficient=coefficient, target=target)
    if divergence < target / TOLERANCE:
        coefficient /= 2
    elif divergence > target * TOLERANCE:
        coefficient *= 2
    return min(max(coefficient, SMALLEST), LARGEST)


def proportional_kl_coefficient(coefficient: float, divergence: float, *, target: float, gain: float = 0.1) -> float:
    """The controller of RLHF, proportional in log β, for the price of the divergence from the reference.

        e = clip( (d − d_targ) / d_targ, −0.2, 0.2 ),   β ← β · (1 + K · e)

    β rises while the divergence is above its target and falls while it is below; it rests where they are equal.

    Args:
        coefficient: β > 0 of the step that is over.
        divergence: d, the mean KL(π ‖ π_ref) of its completions, in nats; an estimate may be negative. NaN changes
            nothing.
        target: d_targ > 0, in nats.
        gain: K in (0, 5), so that β stays positive; 0.1 in the paper.
    Returns: β of the next step, within [`SMALLEST`, `LARGEST`].
    Raises: ValueError if a number is out of range.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    require_positive(coefficient=coefficient, target=target)
    if not 0 < gain < 1 / LARGEST_ERROR:
        raise ValueError(f"gain is {gain}, expected a number between 0 and {1 / LARGEST_ERROR:g}")
    error = min(max((divergence - target) / target, -LARGEST_ERROR), LARGEST_ERROR)
    if math.isnan(divergence):
        error = 0.0
    return min(max(coefficient * (1 + gain * error), SMALLEST), LARGEST)
