"""What a divergence costs, adapted from one iteration to the next: `(coefficient, divergence) → coefficient`."""

TOLERANCE = 1.5
SMALLEST, LARGEST = 2.0**-20, 2.0**20


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
    if not (coefficient > 0 and target > 0):
        raise ValueError(f"coefficient is {coefficient} and target {target}, expected positive numbers")
    if divergence < target / TOLERANCE:
        coefficient /= 2
    elif divergence > target * TOLERANCE:
        coefficient *= 2
    return min(max(coefficient, SMALLEST), LARGEST)
