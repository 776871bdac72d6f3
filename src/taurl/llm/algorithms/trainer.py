"""What surrounds the loop of every algorithm of the wing: starting, resuming, evaluating, writing the result."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.algorithms.setup import choose_machine, loading_model, repeat_weights, separate, with_whole_paths
from taurl.llm.evaluation import Evaluation
from taurl.llm.generation import Generator, default_kv_memory_gb
from taurl.llm.models.compiled import compile_layers
from taurl.llm.models.loading import load_outline
from taurl.llm.models.model_card import model_card
from taurl.llm.models.policies import Policy, make_generator, tokenizer_of
from taurl.llm.rewards import RewardSet
from taurl.llm.scoring.likelihood import shares_prompts
from taurl.runtime.config import TrainingConfig, read_config
from taurl.runtime.directory import require_algorithm
from taurl.runtime.errors import InputError
from taurl.runtime.given import own_callbacks, own_config, require_given_again, with_changes
from taurl.runtime.machine import out_of_memory_names, peak_memory_gb
from taurl.runtime.optimization import Optimizer
from taurl.runtime.run import GIVEN, Callback, Record, Run, Stateful
from taurl.runtime.seeding import seed_everything
from taurl.runtime.step import Step


class Trainer(ABC):
    """An algorithm on a language model: `set_up` makes what it needs, `steps` is its loop.

    Attributes:
        algorithm: its name, as on the command line.
        headline: what the terminal shows of each record, by label.
        takes: names of what it may be given from Python as an object, in place of the setting of that name.
        policy, optimizer: the model that is trained, and what trains it.
        device: where it lives.
        rewards: what scores answers, if anything does.
        held_out: what it is evaluated on, in the form that it reads; may be empty.
        memory_settings: those to lower where memory runs out.
        state: what a checkpoint holds, by name.
        latest: figures of an evaluation that the run's metrics do not have yet, for the model card.
    """

    algorithm: ClassVar[str]
    config_class: ClassVar[type[TrainingConfig]]
    headline: ClassVar[Mapping[str, str]]
    takes: ClassVar[tuple[str, ...]]
    config: Any
    policy: Policy
    optimizer: Optimizer
    rewards: RewardSet | None = None
    held_out: Any
    memory_settings: str
    state: dict[str, Stateful]

    def start(self, config: TrainingConfig | None, callbacks: Sequence[Callback], **given: Any) -> None:
        """A new run with a config and with what was given by name or as an object."""
        config = self.config_class() if config is None else own_config(config, self.config_class)
        config, objects = separate(config, **given)
        run = Run.start(with_whole_paths(config), algorithm=self.algorithm, headline=self.headline)
        run.environment[GIVEN] = sorted(objects)
        self._begin(run, objects, callbacks)

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        config: TrainingConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        **given: Any,
    ) -> Self:
        """Go on with a run. What it was given from Python as objects must be given again, the model untrained.

        Args:
            config: all settings to go on with, by default those of the run.
            given: the objects, by the names that the constructor has for them, and settings that change (`steps=200`).
        Raises: InputError for a change that would alter steps already taken.
        """
        fields = cls.config_class.model_fields
        for name in given:
            if name not in cls.takes and name not in fields:
                raise TypeError(f"resume() got {name!r}, which is neither a setting nor one of {', '.join(cls.takes)}")
        if config is not None:
            own_config(config, cls.config_class)
        require_algorithm(Path(directory), cls.algorithm)
        stored = read_config(Path(directory), cls.config_class)
        if config is not None and config.steps == 0:  # left to the epochs: as many as the run found them to be
            config = config.model_copy(update={"steps": stored.steps})
        changes = {name: given.pop(name) for name in tuple(given) if name not in cls.takes}
        config, objects = separate(with_changes(config or stored, changes), **given)
        run = Run.resume(Path(directory), with_whole_paths(config, stored), headline=cls.headline)
        require_given_again(run, objects)
        trainer = cls.__new__(cls)
        trainer._begin(run, objects, callbacks)
        return trainer

    def _begin(self, run: Run, objects: dict[str, Any], callbacks: Sequence[Callback]) -> None:
        self.run, self.config, run.callbacks, self._objects = run, run.config, own_callbacks(callbacks), objects
        self.latest: Record = {}
        model = self.given("model")
        if model is None:
            raise InputError("no model given: name one with model (for example smollm2-135m-instruct)")
        if not isinstance(model, str) and not hasattr(model, "config"):
            raise InputError(f"model is {model!r}, expected a name, a folder or a model object of transformers")
        self.device, dtype = choose_machine(run, keep_dtype=not isinstance(model, str))
        seed_everything(self.config.seed)
        self.set_up(dtype)
        repeat_weights(run, self.kept_weights())
        if self.config.compile_layers:
            models = [*self.trained_models(), self.policy.own_reference]  # which rounds as they do
            for said in {compile_layers(model, self.device) for model in models if model is not None}:
                run.view.note(said)
        self.restore()

    def restore(self) -> None:
        """Put back what the checkpoint of a resumed run holds, so that evaluating and exporting find it."""
        self.run.restore(**self.state)

    def trained_models(self) -> list[Any]:
        """The models that gradients go through: the policy's, and what else an algorithm trains."""
        return [self.policy.model]

    def kept_weights(self) -> Iterator[Tensor]:
        """The weights that stay as they are: those below an adapter, frozen ones, and the reference's."""
        for model in self.trained_models():
            for name, weight in model.named_parameters():
                if not weight.requires_grad and ".original_module." not in name:  # peft's, of which a copy is trained
                    yield weight
        yield from self.policy.reference_weights()

    def given(self, name: str) -> Any:
        """The object given from Python, or else the setting of that name (None where there is no such setting)."""
        return self._objects.get(name, getattr(self.config, name, None))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or a copy of the one given from Python: a chat template may add tokens to it."""
        given = self.given("tokenizer")
        return tokenizer_of(self.given("model")) if given is None else copy.deepcopy(given)

    def shares_prompts(self) -> bool:
        """Whether a prompt goes through the model once, however many completions it has."""
        return not self.config.gradient_checkpointing and shares_prompts(self.policy.model)

    def outline(self) -> PreTrainedModel:
        """The model, by name without its weights: what it takes to read data, before anything that takes long."""
        model = self.given("model")
        return load_outline(model) if isinstance(model, str) else model

    @abstractmethod
    def set_up(self, dtype: torch.dtype | None) -> None:
        """Make what the loop needs: the data, `self.policy`, its optimiser, and `self.state`.

        The data first, so that what is wrong with it is said before a large model is loaded.

        Args:
            dtype: of the weights; None leaves a model object's as they are.
        """

    def make_policy(
        self, dtype: torch.dtype | None, kind: type[Policy] = Policy, *, keep_reference: bool = False
    ) -> None:
        """Load the model that is trained, with an adapter where the config asks for one."""
        with loading_model():
            self.policy = kind(
                self.given("model"),
                self.tokenizer,
                self.config,
                dtype=dtype,
                device=self.device,
                keep_reference=keep_reference,
                gradient_checkpointing=self.config.gradient_checkpointing,
            )

    def make_optimizer(self) -> None:
        """Make the optimiser of the weights that are trained."""
        with loading_model():
            self.optimizer = self.policy.optimizer(self.config, layer_decay=self.config.layer_decay)

    def note_nothing_held_out(self) -> None:
        """Say that a data set is too small for held-out rows, where their number was left open."""
        if self.config.eval_rows is None and not self.can_evaluate():
            self.run.view.note(
                "nothing is held out of so few rows, so nothing is evaluated: give eval_rows or eval_dataset"
            )

    def count_steps(self, rows: int | None, per_step: int) -> None:
        """As many steps as `epochs` takes, unless their number is given.

        Raises: InputError for a stream, whose rows (None) nobody has counted.
        """
        if self.config.steps == 0:
            if rows is None:
                raise InputError("a stream has no known length, so epochs cannot be counted: give steps")
            whole = round(self.config.epochs * rows / per_step, 9)  # 1.1 · 100 / 10 is 11, and a little more in floats
            self.run.set_steps(max(1, math.ceil(whole)))
            self.config = self.run.config

    def new_generator(self) -> Generator:
        """What samples from the policy's current weights, within the memory that was free where the run began."""
        config = self.config
        default = self.run.chosen.setdefault("kv_memory_gb", default_kv_memory_gb(self.device))
        memory = config.kv_memory_gb or default
        return make_generator(config.generator, self.policy.model, self.policy.tokenizer, config.slots, memory)

    @abstractmethod
    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""

    @contextmanager
    def begin(self) -> Iterator[Run]:
        """Around the loop: `Run.begin` with the state, the evaluation before the first step, and what to lower where
        memory runs out."""
        with self.run.begin(**self.state) as run, out_of_memory_names(self.memory_settings):
            self.evaluate_before()
            yield run

    def train(self) -> Self:
        """Run all steps that are left, and export the result to `final/`."""
        with self.run.leaving(self.export, self.export_early):
            for _ in self.steps():
                pass
        return self

    def note_updates(self, step: Step, figures: Record) -> None:
        """Say where updates were not taken."""
        if skipped := figures["updates_skipped"]:
            at = f"step {step.number}: {skipped} of its updates not taken"
            self.run.view.note(f"{at}: loss {figures['loss']:g}, gradient norm {figures['grad_norm']:g}")

    def finish(self, step: Step, figures: Record) -> Record:
        """Evaluate where it is due, and close the step. An evaluation that fails does not undo the update."""
        try:
            if self.evaluation_due(step.number):
                figures |= self.evaluate_at(step.number)
        finally:
            record = step.finish(**figures, **{"memory/peak_gb": peak_memory_gb(self.device)})
        return record

    def evaluate_before(self) -> None:
        """Evaluate where the run begins, unless it has those figures already (its evaluation may have failed)."""
        step = self.run.step
        known = any(
            record["step"] == step and any(name.startswith("eval/") for name in record) for record in self.run.records()
        )
        if self.evaluation_due(step) and not known:
            self.run.log({"step": step, **self.evaluate_at(step)})

    def evaluation_due(self, step: int) -> bool:
        """Whether there are held-out rows to evaluate on after this step: before all, at the end, and in between."""
        every = self.config.eval_every
        at = step in (0, self.config.steps) or bool(every and step % every == 0)
        return at and self.can_evaluate()

    def can_evaluate(self) -> bool:
        """Whether there are held-out rows."""
        return len(self.held_out) > 0

    def evaluate(self) -> dict[str, float]:
        """Figures of the model on the held-out rows, by `eval/…` names. Raises: InputError if there are none."""
        if not self.can_evaluate():
            raise InputError("there are no held-out rows to evaluate on: give eval_rows or eval_dataset")
        return self.evaluation(self.run.step).metrics

    def evaluate_at(self, step: int) -> Record:
        """The same within the run: samples go to samples.jsonl, and pictures to the report."""
        found = self.evaluation(step)
        if found.samples:
            self.run.log_samples(found.samples)
        for name, picture in found.pictures.items():
            self.run.write_artifact(name, picture.encode())
        return dict(found.metrics)

    @abstractmethod
    def evaluation(self, step: int) -> Evaluation:
        """How the model does on the held-out rows, at this step."""

    def export(self, directory: str | Path) -> None:
        """Write a folder that `transformers` (with an adapter: `peft`) loads, as `Policy.export` says."""
        self.policy.export(Path(directory), merge=self.config.merge_adapter, card=self.card())

    def export_early(self, directory: Path) -> None:
        """What `train` leaves in `final/` where it was interrupted or has failed."""
        self.export(directory)

    def card(self) -> str:
        """The model card of what `export` writes, with the figures there are so far."""
        records = [record for record in self.run.records() if record["step"] <= self.run.step]
        alone = self.policy.exports_adapter(merge=self.config.merge_adapter)
        records += [self.latest] if self.latest else []
        return model_card(self.algorithm, self.config, records, adapter=alone)

    def close(self) -> None:
        """Stop the reward functions' process and threads, if they have any; what is scored later starts them again."""
        if self.rewards is not None:
            self.rewards.close()
