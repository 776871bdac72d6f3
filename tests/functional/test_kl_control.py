"""The rule for the price of a divergence."""

import math

import numpy as np
import pytest

from taurl.functional.kl_control import LARGEST, SMALLEST, adapted_kl_coefficient, proportional_kl_coefficient


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (0.0, 1.5),
        (0.0066, 1.5),
        (0.0067, 3.0),
        (0.01, 3.0),
        (0.0149, 3.0),
        (0.0151, 6.0),
        (math.inf, 6.0),
        (math.nan, 3.0),
    ],
)
def test_it_doubles_and_halves_outside_of_the_band(divergence, expected):
    assert adapted_kl_coefficient(3.0, divergence, target=0.01) == expected


def test_it_stays_within_bounds():
    coefficients = [1.0, 1.0]
    for _ in range(100):
        coefficients = [
            adapted_kl_coefficient(c, d, target=0.01) for c, d in zip(coefficients, (0.0, 1.0), strict=True)
        ]
    assert coefficients == [SMALLEST, LARGEST]


@pytest.mark.parametrize(("coefficient", "target"), [(0.0, 0.01), (1.0, 0.0), (math.nan, 0.01), (1.0, math.inf)])
def test_numbers_that_are_not_positive_are_refused(coefficient, target):
    with pytest.raises(ValueError, match="expected a positive, finite number"):
        adapted_kl_coefficient(coefficient, 0.01, target=target)
    with pytest.raises(ValueError, match="expected a positive, finite number"):
        proportional_kl_coefficient(coefficient, 0.01, target=target, gain=0.1)


# --- the controller of the divergence from a reference


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [(6.0, 3.0), (6.6, 3.03), (5.7, 2.985), (60.0, 3.06), (math.inf, 3.06), (-1.0, 2.94), (math.nan, 3.0)],
)
def test_it_moves_in_proportion_up_to_a_fifth_of_the_target(divergence, expected):
    assert proportional_kl_coefficient(3.0, divergence, target=6.0, gain=0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("first", "target"), [(1e-3, 0.3), (10.0, 0.3), (0.5, 1.0)])
def test_the_controller_converges_to_the_price_that_buys_the_target(first, target):
    """The best policy at price β is π_ref · e^(r/β), whose divergence is known exactly; π lags behind it."""
    reference, rewards = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, 0.5, 2.0])

    def best(price):
        tilted = reference * np.exp((rewards - rewards.max()) / price)
        return tilted / tilted.sum()

    price, policy = first, reference
    for _ in range(3000):
        policy = 0.9 * policy + 0.1 * best(price)
        divergence = float((policy * np.log(policy / reference)).sum())
        price = proportional_kl_coefficient(price, divergence, target=target)
    assert divergence == pytest.approx(target, rel=1e-6)
    optimum = best(price)
    assert (optimum * np.log(optimum / reference)).sum() == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"target": 0.0}, {"coefficient": 0.0}, {"gain": 5.0}, {"gain": 0.0}, {"gain": math.nan}]
)
def test_a_controller_that_cannot_work_is_refused(wrong):
    given = {"coefficient": 1.0, "divergence": 1.0, "target": 1.0} | wrong
    with pytest.raises(ValueError, match=rf"\b{next(iter(wrong))}\b.*expected"):
        proportional_kl_coefficient(**given)
