"""Settings of tabular Q-learning. Imports no torch, so that the command line answers at once."""

from typing import Literal

from pydantic import Field

from taurl.control.settings import ControlConfig

Rule = Literal["q_learning", "double_q", "sarsa", "expected_sarsa"]


class QLearningConfig(ControlConfig):
    """Tabular Q-learning (Watkins and Dayan 1992), and its kin.

    Each step acts ε-greedily in every environment and moves Q(s, a) of the table towards the target of `rule`. The
    environment's observations are choices (Discrete, MultiDiscrete, or a Tuple of them), its actions Discrete.
    """

    rule: Rule = "q_learning"
    """What Q(s, a) moves towards: the best next action (q_learning); the one that one table finds best and another
    judges (double_q); the one that is taken next (sarsa); the mean over the policy (expected_sarsa)."""
    learning_rate: float = Field(0.1, gt=0, le=1)
    """α: how far a step moves Q(s, a) towards its target; `schedule` applies."""
    visit_exponent: float = Field(0.0, ge=0, le=1)
    """ω: divide α by N(s, a)^ω, N counting the updates of that cell. Q converges for 1/2 < ω ≤ 1 and a constant
    schedule; 0 leaves α as it is."""
    epsilon_start: float = Field(1.0, ge=0, le=1)
    """Probability of an action at random in the beginning."""
    epsilon_end: float = Field(0.05, ge=0, le=1)
    """Probability of an action at random in the end."""
    epsilon_fraction: float = Field(0.5, ge=0, le=1)
    """Share of all steps over which ε goes from start to end, linearly."""
    environments: int = Field(16, ge=1)
    """Copies that are stepped together: all act on one table, and their updates follow one another."""
