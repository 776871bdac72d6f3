"""Tabular Q-learning (Watkins and Dayan 1992, "Q-learning", Machine Learning 8), double Q-learning (van Hasselt 2010,
"Double Q-learning"), SARSA and expected SARSA (Sutton and Barto 2018, sections 6.4 to 6.7).

`steps`, `_step` and `_targets` are the algorithm, in this order; its mathematics is called from `taurl.functional`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from taurl.control.algorithms.q_learning_config import QLearningConfig
from taurl.control.environments import Transition, batched
from taurl.control.grid_pictures import grid_of, value_picture
from taurl.control.tables import Table, TablePolicy, state_index
from taurl.control.trainer import Trainer
from taurl.functional.values import (
    double_q_target,
    epsilon_greedy_probabilities,
    expected_sarsa_target,
    q_learning_target,
    sarsa_target,
)
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Record

PICTURE = "state-values.svg"


class QLearning(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "q-learning"
    config_class = QLearningConfig
    config: QLearningConfig

    def set_up(self) -> None:
        config, environments = self.config, self.environments
        self.policy = TablePolicy.create(environments, config)
        ahead = environments.count if config.rule == "sarsa" else 0
        self.table = Table(2 if config.rule == "double_q" else 1, *self.policy.values.shape, ahead=ahead)
        self.state = {"table": self.table}
        # Fixed when the run begins: with more steps given on resume, those already taken keep the ε they had.
        self.falls_over = config.epsilon_fraction * self.run.chosen.setdefault("planned_steps", config.steps)
        self.grid = grid_of(environments.vector)

    def restore(self) -> None:
        super().restore()
        self._publish(self.run.step)

    def steps(self) -> Iterator[Record]:
        config, count = self.config, self.environments.count
        with self.begin():
            for step, iterations in self.records(count):
                errors = torch.zeros(iterations, dtype=torch.float64)
                with step.phase("learning", "acting and learning"):
                    self._take_up()
                    for iteration in range(iterations):
                        errors[iteration] = self._step(self.run.step + iteration * count)
                self._publish(step.number)
                figures = {
                    "train/td_error": float(errors.mean()),
                    "train/epsilon": self.policy.epsilon,
                    "learning_rate": learning_rate(step.number, config),
                }
                record = self.finish(step, figures)
                self._draw_picture()
                yield record

    def _take_up(self) -> None:
        """Go on from where the environments stand, which evaluation or a checkpoint may have changed."""
        self.states = self._rows(self.environments.observations)
        if self.config.rule == "sarsa" and self.environments.fresh:
            self.table.next_actions = self._draw(self.states, self._epsilon(self.run.step))

    def _publish(self, taken: int) -> None:
        """Let the policy be the table's."""
        self.policy.values, self.policy.epsilon = self.table.mean(), self._epsilon(taken)

    def _step(self, taken: int) -> float:
        """Act once in every copy and learn from it. Returns: the mean of |target − Q(s, a)|."""
        config, states = self.config, self.states
        epsilon = self._epsilon(taken)
        ahead = config.rule == "sarsa"
        actions = self.table.next_actions if ahead else self._draw(states, epsilon)
        transition = self.environments.step(actions.numpy() + self.policy.start)
        self.states = self._rows(transition.observations)
        followed = self._followed(transition)
        next_actions = self._draw(followed, epsilon) if ahead else actions
        which = torch.randint(len(self.table.values), (len(states),))  # which of two tables learns

        targets = self._targets(transition, which, followed, next_actions, epsilon)
        learns = ~torch.from_numpy(transition.only_reset)
        cells = which[learns], states[learns], actions[learns]
        errors = targets[learns] - self.table.values[cells]
        rate = learning_rate(taken + len(states), config)
        self.table.learn(cells, targets[learns], rate=rate, visit_exponent=config.visit_exponent)

        if ahead:
            self.table.next_actions = next_actions
        if ahead and transition.last_observations:  # of copies that have reset, and act from where they begin
            reset = followed != self.states
            self.table.next_actions = torch.where(reset, self._draw(self.states, epsilon), next_actions)
        return float(errors.abs().mean()) if len(errors) else 0.0

    def _targets(
        self, transition: Transition, which: Tensor, followed: Tensor, next_actions: Tensor, epsilon: float
    ) -> Tensor:
        """What Q(s, a) of each copy moves towards, float64 [B]; a truncated episode has a future, a terminated none."""
        discount = self.config.discount
        rewards, terminated = torch.from_numpy(transition.rewards), torch.from_numpy(transition.terminated)
        values = self.table.values[:, followed]  # [K, B, A]
        match self.config.rule:
            case "q_learning":
                return q_learning_target(rewards, values[0], terminated, discount=discount)
            case "double_q":
                copies = torch.arange(len(which))
                mine, other = values[which, copies], values[1 - which, copies]
                return double_q_target(rewards, mine, other, terminated, discount=discount)
            case "sarsa":
                return sarsa_target(rewards, values[0], next_actions, terminated, discount=discount)
            case "expected_sarsa":
                probabilities = epsilon_greedy_probabilities(values[0], epsilon=epsilon)
                return expected_sarsa_target(rewards, values[0], probabilities, terminated, discount=discount)

    def _draw(self, states: Tensor, epsilon: float) -> Tensor:
        """ε-greedy actions, equal ones at random."""
        values = self.table.values[:, states].mean(0)
        return torch.multinomial(epsilon_greedy_probabilities(values, epsilon=epsilon), 1).squeeze(1)

    def _epsilon(self, taken: int) -> float:
        start, end = self.config.epsilon_start, self.config.epsilon_end
        return end if taken >= self.falls_over else start + (end - start) * taken / self.falls_over

    def _rows(self, observations: object) -> Tensor:
        return torch.from_numpy(state_index(self.policy.observation_space, observations))

    def _followed(self, transition: Transition) -> Tensor:
        """The state that followed each action, before any reset."""
        if not transition.last_observations:
            return self.states
        followed = self.states.clone()
        for copy, observation in transition.last_observations.items():
            followed[copy] = self._rows(batched(observation))[0]
        return followed

    def _draw_picture(self) -> None:
        if self.grid is not None:
            visited = self.table.visits.sum((0, 2)) > 0
            title = f"{self.environments.name} after {self.run.step:,} steps"
            picture = value_picture(np.asarray(self.policy.values), visited.numpy(), self.grid, title=title)
            self.run.write_artifact(PICTURE, picture.encode())
