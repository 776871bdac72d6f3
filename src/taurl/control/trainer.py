"""What surrounds the loop of every algorithm of the wing: starting, resuming, evaluating, writing the result."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium
import torch

from taurl.control.environments import Environments
from taurl.control.evaluation import (
    Acting,
    Evaluation,
    copies_for,
    cut_short,
    evaluate,
    evaluation_seed,
    require_episodes,
    with_limit,
)
from taurl.control.making import EnvironmentLike
from taurl.control.playing import recorded
from taurl.control.saved import load
from taurl.control.settings import ControlConfig
from taurl.control.spaces import has_images, refuse_stacked_images
from taurl.control.updates import FlatAdam
from taurl.runtime.config import did_you_mean, read_config
from taurl.runtime.directory import require_algorithm, write_folder
from taurl.runtime.errors import InputError, one_line
from taurl.runtime.given import own_callbacks, own_config, require_given_again, with_changes
from taurl.runtime.machine import peak_memory_gb, set_threads
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import GIVEN, Callback, Record, Run, Stateful
from taurl.runtime.seeding import drawn_apart, seed_everything
from taurl.runtime.step import Step

HEADLINE = {
    "return": "rollout/ep_rew_mean",
    "length": "rollout/ep_len_mean",
    "evaluation": "eval/mean_reward",
    "steps/s": "time/fps",
}
PICTURE = "trained-policy.gif"


class Trainer(ABC):
    """An algorithm on an environment.

        PPO("CartPole-v1").train()

    Args:
        env: a gymnasium id, a function that makes an environment, or an environment.
        config: settings; `env` stands in place of its setting there.
        callbacks: called with each record.
    """

    algorithm: ClassVar[str]
    config_class: ClassVar[type[ControlConfig]]
    environments_class: ClassVar[type[Environments]] = Environments
    sees_images: ClassVar[bool] = False
    one_copy_will_do: ClassVar[bool] = True
    policy: Any
    state: dict[str, Stateful]

    def __init__(
        self,
        env: EnvironmentLike | None = None,
        config: ControlConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ):
        config = self._with_copies(own_config(config or self.config_class(), self.config_class), env)
        given = env is not None and not isinstance(env, str)
        if given and config.env_args:
            raise InputError(
                f"env_args is {config.env_args}, which is for an environment named by its id; give the function or "
                "object that makes it so"
            )
        if env is not None:  # what was given otherwise has no name by which it could be made again
            config = config.model_copy(update={"env": None if given else env})
        run = Run.start(config, algorithm=self.algorithm, headline=HEADLINE)
        run.environment[GIVEN] = ["env"] if given else []
        self._begin(run, env if given else None, callbacks)

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        config: ControlConfig | None = None,
        *,
        env: EnvironmentLike | None = None,
        callbacks: Sequence[Callback] = (),
        **changes: Any,
    ) -> Self:
        """Go on with a run; an environment that it was given as an object or function is given again.

        Args:
            config: all settings to go on with, by default those of the run.
            changes: settings that change, by name (`steps=200_000`).
        Raises: InputError for a change that would alter steps already taken.
        """
        if unknown := sorted(changes.keys() - cls.config_class.model_fields):
            near = did_you_mean(unknown[0], cls.config_class.model_fields)
            raise TypeError(f"resume() got {', '.join(map(repr, unknown))}, expected env or settings{near}")
        require_algorithm(Path(directory), cls.algorithm)
        config = own_config(config or read_config(Path(directory), cls.config_class), cls.config_class)
        config = cls._with_copies(with_changes(config, changes), env)
        run = Run.resume(Path(directory), config, headline=HEADLINE)
        require_given_again(run, [] if env is None else ["env"])
        trainer = cls.__new__(cls)
        trainer._begin(run, env, callbacks)
        return trainer

    @classmethod
    def _with_copies(cls, config: ControlConfig, env: object) -> ControlConfig:
        """The config with one copy where an environment object was given, unless the config says otherwise."""
        if not isinstance(env, gymnasium.Env) or not cls.one_copy_will_do or "environments" in config.model_fields_set:
            return config
        return config.model_copy(update={"environments": 1})

    def _begin(self, run: Run, env: EnvironmentLike | None, callbacks: Sequence[Callback]) -> None:
        assert isinstance(run.config, self.config_class)
        self.run, self.config, run.callbacks = run, run.config, own_callbacks(callbacks)
        environment = env if env is not None else self.config.env
        if environment is None:
            raise InputError("no environment given: name one with env (for example CartPole-v1)")
        self.environment: EnvironmentLike = environment
        run.chosen |= {"threads": set_threads(self.config.threads), "device": "cpu"}
        seed_everything(self.config.seed)
        self.environments = self.environments_class(
            environment,
            self.config.environments,
            seed=self.config.seed,
            arguments=self.config.env_args,
            vectorization=self.config.vectorization,
            mask_actions=getattr(self.config, "mask_actions", False),
            for_learning=True,
        )
        space = self.environments.observation_space
        refuse_stacked_images(space)
        if has_images(space) and not self.sees_images:
            raise InputError(
                f"observation space {space} has images, which {self.algorithm} does not take; take ppo or a2c, or make "
                "numbers of them with gymnasium.wrappers.FlattenObservation"
            )
        self._said_unsaved = False
        before = (record for record in run.records() if record["step"] <= run.step)  # those after it are done again
        self.best = max((record.get("eval/mean_reward", -math.inf) for record in before), default=-math.inf)
        self.set_up()
        self.restore()
        self.policy.facts["steps"] = run.step

    def restore(self) -> None:
        """Put back what the checkpoint of a resumed run holds: what acts now is what was trained."""
        self.run.restore(environments=self.environments, **self.state)

    @abstractmethod
    def set_up(self) -> None:
        """Make what the algorithm needs beside `self.environments`: `self.policy` first of all, and `self.state`."""

    @abstractmethod
    def steps(self) -> Iterator[Record]:
        """Yields after each record, with it."""

    def train(self) -> Self:
        """Run all steps that are left, and write the policy to `final/`."""
        try:
            with self.run.leaving(self.save):
                for _ in self.steps():
                    pass
        finally:
            self.environments.close()
        if self.config.video:
            self._record()
        return self

    def _record(self) -> None:
        """Leave a GIF of the policy for the report, where the environment can draw; a failure is only said."""
        vector = self.environments.vector
        draws = "rgb_array" in vector.metadata.get("render_modes", ())
        if not draws or not (isinstance(self.environment, str) or vector.render_mode == "rgb_array"):
            return
        seed = evaluation_seed(self.config.seed)
        try:
            film = recorded(self.policy, self.environment, self.config.env_args, seed=seed)
            self.run.write_artifact(PICTURE, film)
        except Exception as error:
            self.run.view.note(f"no video of the policy: {one_line(error)}")

    def begin(self) -> Run:
        """`Run.begin` with the environments among the state."""
        run = self.run.begin(environments=self.environments, **self.state)
        self._say_unsaved()
        return run

    def _say_unsaved(self) -> None:
        """Say once when a checkpoint could not hold where the environments stand."""
        if self.environments.unsaved and not self._said_unsaved:
            self._said_unsaved = True
            self.run.view.note(
                f"{self.environments.name}: where it stands cannot be kept or restored ({self.environments.unsaved}); "
                "its episodes begin anew after such a checkpoint, and what it keeps between them is lost on resume"
            )

    def records(self, size: int) -> Iterator[tuple[Step, int]]:
        """The records still to come, and of how many iterations of `size` environment steps each is made."""
        width = size * max(1, -(-self.config.record_every // size))
        for step in self.run.steps(width, unit=size):
            yield step, (step.number - self.run.step) // size

    def rate_of(self, first: int, count: int) -> float:
        """The learning rate of an iteration that begins with this step and takes so many.

        That of its first step, as in the reference code, and in the warm-up that of its last: so no end of a run is
        spent at a rate of nearly 0.
        """
        last, warmup = first + count - 1, self.config.warmup_steps
        return learning_rate(last if last <= warmup else max(first, warmup + 1), self.config)

    def evaluate(self, episodes: int | None = None, *, deterministic: bool = True) -> Evaluation:
        """Play whole episodes in environments of their own: the same ones each time, with the same draws."""
        try:
            with drawn_apart(evaluation_seed(self.config.seed)):  # a loop that evaluates trains as one that does not
                found = evaluate_policy(
                    self.policy,
                    self.environment,
                    self.config.eval_episodes if episodes is None else episodes,
                    seed=evaluation_seed(self.config.seed),
                    arguments=self.config.env_args,
                    vectorization=self.config.vectorization,
                    deterministic=deterministic,
                )
            if found.cut:
                self.run.view.note(cut_short(found))
            return found
        finally:
            if isinstance(self.environment, gymnasium.Env):  # the only one there is: evaluation has moved it on
                self.environments.begin_anew()

    def predict(self, observation: Any, *, deterministic: bool = True, **told: Any) -> Any:
        """The action for one observation.

        Args:
            told: what this policy is told beside it: `episode_start` with a memory, `action_mask` with masks.
        """
        return self.policy.predict(observation, deterministic=deterministic, **told)

    def save(self, directory: str | Path) -> None:
        """Write the policy to a folder, which `load` reads."""
        self.policy.save(directory)

    @staticmethod
    def load(directory: str | Path) -> Any:
        """The saved policy, not a trainer: `taurl.control.load`."""
        return load(directory)

    def finish(self, step: Step, figures: Record) -> Record:
        """Close a record: episodes, speed, and an evaluation where one is due, which may end the run (`stop_at`)."""
        self.policy.facts["steps"] = step.number
        self.environments.take_episodes()
        if recent := self.environments.recent:
            figures["rollout/ep_rew_mean"] = sum(episode.reward for episode in recent) / len(recent)
            figures["rollout/ep_len_mean"] = sum(episode.length for episode in recent) / len(recent)
        self._count_skipped(step, figures)
        figures["time/fps"] = (step.number - self.run.step) / step.elapsed()
        try:
            if self._evaluation_due(step.number):
                with step.phase("evaluation", "evaluating"):
                    found = self.evaluate().metrics()
                figures |= found
                if found["eval/mean_reward"] > self.best:
                    self.best = found["eval/mean_reward"]
                    write_folder(self.run.directory / "best", self.save)
        finally:  # an evaluation that fails does not undo the updates
            record = step.finish(**figures, **{"memory/peak_gb": peak_memory_gb(torch.device("cpu"))})
        if step.number < self.config.steps:
            self._say_unsaved()
            target = self.config.stop_at
            if target is not None and record.get("eval/mean_reward", -math.inf) >= target:
                self.run.stop(f"an evaluation has reached {target:g}")
        return record

    def _count_skipped(self, step: Step, figures: Record) -> None:
        """How many updates were not taken, said where there were any; nothing where no network is trained."""
        optimizers = [holder for holder in self.state.values() if isinstance(holder, FlatAdam)]
        if not optimizers:
            return
        figures["updates_skipped"] = skipped = sum(optimizer.take_skipped() for optimizer in optimizers)
        if skipped:
            self.run.view.note(f"step {step.number}: {skipped} of its updates not taken: their gradient was not finite")

    def _evaluation_due(self, step: int) -> bool:
        every, before = self.config.eval_every, self.run.step
        return self.config.eval_episodes > 0 and (
            step >= self.config.steps or bool(every and step // every > before // every)
        )


def evaluate_policy(
    policy: Acting | Trainer,
    environment: EnvironmentLike,
    episodes: int = 100,
    *,
    seed: int = 10_000,
    arguments: dict[str, Any] | None = None,
    vectorization: str = "auto",
    deterministic: bool = True,
) -> Evaluation:
    """Play whole episodes in new environments, several at once, and close them; in the one object, if one was given.

    Args:
        policy: what `load` gives, a trainer, or anything with their policy's `act`.
        environment: an id, a function that makes one, or an environment.
        seed: of the environments; by default that of `taurl control evaluate`, far from those that runs train with.
        arguments: of an id.
        vectorization: see `EnvironmentSettings`.
        deterministic: the most likely actions; False draws them.
    Returns: returns and lengths of the episodes, and of how many the end was a bound set here: 10,000 steps where an id
        has none of its own, 100,000 where the environment came otherwise. `metrics()` has their means.
    """
    require_episodes(episodes)
    acting: Acting = policy.policy if isinstance(policy, Trainer) else policy
    copies = 1 if isinstance(environment, gymnasium.Env) else copies_for(episodes)
    arguments, longest = with_limit(environment, arguments or {})
    environments = Environments(
        environment,
        copies,
        seed=seed,
        arguments=arguments,
        # Processes of their own would take longer to start than the episodes take.
        vectorization="auto" if vectorization == "async" else vectorization,
        mask_actions=getattr(acting, "masks_actions", False),
    )
    try:
        found = evaluate(acting, environments, episodes, deterministic=deterministic, longest=longest)
        return found if longest is None else found._replace(cut=sum(length >= longest for length in found.lengths))
    finally:
        environments.close()
