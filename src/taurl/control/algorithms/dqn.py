"""DQN: deep Q-learning (Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518).

Optionally double (van Hasselt et al. 2016, arXiv:1509.06461), dueling (Wang et al. 2016, arXiv:1511.06581), with
prioritised replay (Schaul et al. 2016, arXiv:1511.05952) and n-step returns (as in Hessel et al. 2018,
arXiv:1710.02298).

`steps`, `_act`, `_learn`, `_targets` and `_update` are the algorithm, in this order; its mathematics is called from
`taurl.functional`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from taurl.control.action_values import TargetNetwork, ValuePolicy
from taurl.control.algorithms.dqn_config import DQNConfig
from taurl.control.dense import WithPullback, of_arrays
from taurl.control.environments import Array, Transition, batched
from taurl.control.replay import Batch, PrioritizedReplay, Replay
from taurl.control.spaces import encode
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam
from taurl.functional.slopes import huber_value_slope
from taurl.functional.value_losses import huber_value_loss
from taurl.functional.values import double_q_target, q_learning_target
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Record

ROWS_AT_ONCE = 1024  # of targets: operators cost by number and not by size up to here


class DQN(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "dqn"
    config_class = DQNConfig
    config: DQNConfig
    policy: ValuePolicy

    def set_up(self) -> None:
        config, environments = self.config, self.environments
        self.policy = ValuePolicy.create(environments, config)
        self.network = self.policy.network
        self.target = TargetNetwork(self.network)
        self.optimizer = FlatAdam({"network": self.network}, None, config)
        space = config.buffer_size, self.policy.width, environments.count
        self.replay = (
            PrioritizedReplay(*space, exponent=config.priority_exponent) if config.prioritized else Replay(*space)
        )
        self.state = {"optimizer": self.optimizer, "target": self.target, "replay": self.replay}
        # Fixed when the run begins: with more steps given on resume, those already taken keep what they had.
        self.planned_steps = self.run.chosen.setdefault("planned_steps", config.steps)

    def restore(self) -> None:
        super().restore()
        self.policy.epsilon = self._epsilon(self.run.step)

    def steps(self) -> Iterator[Record]:
        config = self.config
        with self.begin():
            for step, iterations in self.records(config.train_every):
                figures: list[Record] = []
                for iteration in range(iterations):
                    taken = self.run.step + iteration * config.train_every
                    with step.phase("rollout", "acting"):
                        self._act(taken)
                    taken += config.train_every
                    self._move_target(taken)
                    if taken > config.learning_starts:
                        with step.phase("update", "updating"):
                            figures += self._learn(taken)
                self.policy.epsilon = self._epsilon(step.number)
                shown = {"train/epsilon": self.policy.epsilon, "learning_rate": learning_rate(step.number, config)}
                yield self.finish(step, {**means(figures), **shown})

    @torch.no_grad()
    def _act(self, taken: int) -> None:
        """Act ε-greedily for `train_every` steps and keep them."""
        environments, values = self.environments, of_arrays(self.network)
        seen = [encode(environments.observation_space, environments.observations).numpy()]
        if environments.fresh:
            self.replay.cut()
        shape = self.config.train_every // environments.count, environments.count
        epsilons = np.array([self._epsilon(taken + t * environments.count) for t in range(shape[0])])
        explores = np.random.random(shape) < epsilons[:, None]
        actions = np.random.randint(self.policy.actions, size=shape)  # where nothing better is chosen below
        given: list[Transition] = []
        try:
            for explored, chosen in zip(explores, actions, strict=True):
                if not explored.all():
                    chosen[:] = np.where(explored, chosen, values(seen[-1]).argmax(-1))
                given.append(environments.step(chosen + self.policy.start))
                seen.append(encode(environments.observation_space, given[-1].observations).numpy())
        except BaseException:
            self.replay.cut()  # the copies have moved on: what is kept next does not follow what was kept last
            raise
        self._keep(np.stack(seen), actions, given)

    def _keep(self, seen: Array, actions: Array, given: list[Transition]) -> None:
        """Put into replay what were actions: steps that only reset are none."""
        following = seen[1:].copy()
        for t, transition in enumerate(given):  # of copies that have reset already, what did not lead to what is next
            for copy, last in transition.last_observations.items():
                following[t, copy] = encode(self.environments.observation_space, batched(last)).numpy()[0]
        rewards, terminated, truncated, only_reset = (
            np.stack(column) for column in list(zip(*given, strict=True))[1:5]
        )
        kept, columns = ~only_reset, (seen[:-1], actions, rewards, following, terminated, truncated)
        self.replay.add(np.nonzero(kept)[1], *(column[kept] for column in columns))

    def _move_target(self, taken: int) -> None:
        """As often as it was due in the last `train_every` steps, in one go."""
        config = self.config
        due = taken // config.target_every - (taken - config.train_every) // config.target_every
        if due:
            self.target.move(self.network, 1 - (1 - config.target_share) ** due)

    @torch.no_grad()
    @np.errstate(over="ignore", invalid="ignore")  # a gradient that is not finite takes no step
    def _learn(self, taken: int) -> list[Record]:
        """Updates on steps drawn from replay."""
        config = self.config
        rate, network = learning_rate(taken, config), self.network.with_pullback()
        # Targets depend on nothing that an update changes, so those of several come at once; but the double target
        # depends on the network, and what is drawn by priority on the last errors.
        at_once = 1 if config.double or config.prioritized else max(1, ROWS_AT_ONCE // config.batch_size)
        figures: list[Record] = []
        for start in range(0, config.gradient_steps, at_once):
            updates = min(at_once, config.gradient_steps - start)
            batch = self._draw(updates * config.batch_size, taken)
            targets = self._targets(batch)
            parts = zip(minibatches(batch, config.batch_size), torch.split(targets, config.batch_size), strict=True)
            values, norms = zip(*(self._update(network, part, goals, rate) for part, goals in parts), strict=True)
            figures.append(self._figures(batch, targets, torch.from_numpy(np.concatenate(values)), norms))
        return figures

    def _draw(self, count: int, taken: int) -> Batch:
        config, replay = self.config, self.replay
        if isinstance(replay, PrioritizedReplay):
            share = min(1.0, taken / self.planned_steps)
            weight_exponent = config.weight_exponent + (1 - config.weight_exponent) * share
            return replay.draw_weighted(
                count, discount=config.discount, steps=config.n_step, weight_exponent=weight_exponent
            )
        return replay.draw(count, discount=config.discount, steps=config.n_step)

    def _targets(self, batch: Batch) -> Tensor:
        """What Q of each step moves towards, [N]."""
        following = self.target.network(batch.next_observations)
        if self.config.double:
            online = self.network(batch.next_observations)
            return double_q_target(batch.rewards, online, following, batch.terminated, discount=batch.discounts)
        return q_learning_target(batch.rewards, following, batch.terminated, discount=batch.discounts)

    def _update(self, network: WithPullback, batch: Batch, targets: Tensor, rate: float) -> tuple[Array, float]:
        """One step down the weighted mean of Huber's losses of a minibatch; the gradient is put together by hand.

        Returns: Q of the actions before it, [N], and the gradient's norm.
        """
        action_values, pullback = network(batch.observations.numpy())
        taken = np.arange(len(targets)), batch.actions.numpy()
        values, gradient = action_values[taken], np.zeros_like(action_values)
        slopes = huber_value_slope(values, targets.numpy()) * batch.weights.numpy()
        gradient[taken] = slopes / len(slopes)
        pullback(gradient)
        norm = self.optimizer.step(rate)
        if isinstance(self.replay, PrioritizedReplay):
            self.replay.set_errors(batch.places.numpy(), targets - torch.from_numpy(values))
        return values, norm

    def _figures(self, batch: Batch, targets: Tensor, values: Tensor, norms: tuple[float, ...]) -> Record:
        """Of some updates together: they cost as much as those of one."""
        losses = huber_value_loss(values, targets)
        return {
            "loss": (losses * batch.weights).mean(),
            "train/q_mean": values.mean(),
            "grad_norm": sum(norms) / len(norms),
        }

    def _epsilon(self, taken: int) -> float:
        """Probability of an action at random: 1 while nothing is learnt, else falling linearly."""
        config = self.config
        if taken < config.learning_starts:
            return 1.0
        falls_over = config.epsilon_fraction * self.planned_steps
        share = taken / falls_over if taken < falls_over else 1.0
        return config.epsilon_start + (config.epsilon_end - config.epsilon_start) * share


def minibatches(batch: Batch, size: int) -> Iterator[Batch]:
    """`size` steps at a time."""
    for columns in zip(*(torch.split(column, size) for column in batch), strict=True):
        yield Batch(*columns)


def means(figures: list[Record]) -> Record:
    """Of each figure; nothing where there were no updates."""
    names = figures[0] if figures else ()
    return {name: float(sum(one[name] for one in figures)) / len(figures) for name in names}
