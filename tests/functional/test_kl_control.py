"""The rule for the price of a divergence."""

import math

import pytest

from taurl.functional.kl_control import LARGEST, SMALLEST, adapted_kl_coefficient


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


@pytest.mark.parametrize(("coefficient", "target"), [(0.0, 0.01), (1.0, 0.0), (math.nan, 0.01)])
def test_numbers_that_are_not_positive_are_refused(coefficient, target):
    with pytest.raises(ValueError, match="expected positive numbers"):
        adapted_kl_coefficient(coefficient, 0.01, target=target)
