"""SFT: supervised fine-tuning. `steps`, `_update` and `_losses` are the algorithm; its mathematics is called from
`taurl.functional`. M is the number of trained tokens of a part.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.functional.logprobs import TokenScores
from taurl.functional.supervised import dft_loss, nll_loss, smoothed_loss, z_loss
from taurl.llm.algorithms.figures import Tally
from taurl.llm.algorithms.setup import loading_model, repeat_data
from taurl.llm.algorithms.sft_config import REWARDS_SCORE_ANSWERS, SFTConfig
from taurl.llm.algorithms.trainer import Trainer
from taurl.llm.answering import Answering
from taurl.llm.data.row_data import RowData, RowPosition
from taurl.llm.data.row_reader import RowReader
from taurl.llm.data.token_rows import TokenRow
from taurl.llm.evaluation import Evaluation
from taurl.llm.models.heads import causal_lm, context_length, evaluating
from taurl.llm.rewards import RewardSet
from taurl.llm.scoring.row_attention import attending_within_rows, knows_rows
from taurl.llm.scoring.supervised import RowPart, embedding_noise, part_scores, row_parts, trained_tokens
from taurl.runtime.config import refuse_unread
from taurl.runtime.directory import write_folder
from taurl.runtime.errors import InputError
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Callback, Record

HEADLINE = {
    "loss": "loss",
    "accuracy": "mean_token_accuracy",
    "held-out loss": "eval/loss",
    "tokens/s": "tokens_per_second",
}


class SFT(Trainer):
    """Trains a causal language model on rows that hold the answers.

        SFT("smollm2-135m-instruct", rows, SFTConfig(epochs=2)).train()

    Args:
        model: a name (see `SFTConfig.model`) or a model object, which is trained in place.
        dataset: a name, a `datasets.Dataset`, or any sequence of dicts (see the page SFT for their columns).
        config: settings; what is given here as an object stands in place of its setting there.
        rewards: names or functions that score answers to held-out rows (with `generate_rows`).
        eval_dataset: held-out data, as `dataset`.
        tokenizer: by default the model's own.
        callbacks: called with every record: each step's, and that of an evaluation before the first.
    """

    algorithm = "sft"
    config_class = SFTConfig
    headline = HEADLINE
    memory_settings = "tokens_per_part (or max_length)"
    takes = ("model", "dataset", "rewards", "eval_dataset", "tokenizer")
    config: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        dataset: object = None,
        config: SFTConfig | None = None,
        *,
        rewards: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] = (),
        eval_dataset: object = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.start(
            config,
            callbacks,
            model=model,
            dataset=dataset,
            rewards=rewards,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
        )

    def set_up(self, dtype: torch.dtype | None) -> None:
        config, run = self.config, self.run
        if self.given("rewards") and not config.generate_rows:
            raise InputError(REWARDS_SCORE_ANSWERS)
        if not config.generate_rows and not run.step:
            why = "it is for answers to held-out rows, and generate_rows is 0"
            refuse_unread(config, ["max_tokens"], f"{why} (what cuts rows is max_length)")
            refuse_unread(config, ("stop", "reward_weights", "reward_timeout", "reward_process"), why)
        reader = RowReader.of(config, self.tokenizer, self.outline())
        self.data = RowData.read(reader, self.given("dataset"), self.given("eval_dataset"), config)
        for note in self.data.notes:
            run.view.note(note)
        repeat_data(run, self.data.fingerprint)
        self.held_out = self.data.held_out
        self._check_data(reader)
        self.position = RowPosition(self.data.order)
        self.count_steps(self.data.count, config.rows_per_step)
        self.make_policy(dtype)
        with loading_model():
            reader.settle(causal_lm(self.policy.model))
        self._train_new_tokens(reader.new_tokens)
        self.make_optimizer()
        self.state = {"optimizer": self.optimizer, "data": self.position}
        self.packed = self._packed()
        self.answering = None
        if config.generate_rows:
            self.rewards = RewardSet.of(config, self.given("rewards"))
            generator, context = self.new_generator(), context_length(self.policy.model)
            self.answering = Answering.of(
                config, self.rewards, self.held_out, generator, self.policy.tokenizer, context
            )

    def _train_new_tokens(self, tokens: Sequence[int]) -> None:
        """See to it that the embeddings of new tokens are trained. All begin as one, so that fixed they stay alike."""
        if not tokens:
            return
        if self.policy.has_adapter:
            self.policy.train_tokens(tokens)
            return
        model = self.policy.model
        layers = {"embeddings": model.get_input_embeddings(), "output layer": model.get_output_embeddings()}
        for what, layer in layers.items():
            if layer is not None and not layer.weight.requires_grad:
                names = " ".join(self.tokenizer.convert_ids_to_tokens(list(tokens)))
                raise InputError(
                    f"freeze holds the {what} fixed, and the chat template needs new tokens, {names}, which could not "
                    f"be told apart: leave the {what} out of freeze, or give a chat_template without new tokens"
                )

    def _check_data(self, reader: RowReader) -> None:
        """Refuse settings that the data, as it was read, does not allow."""
        config, held_out = self.config, len(self.held_out)
        self.note_nothing_held_out()
        if config.generate_rows > (rows := len(self.held_out.rows)):
            what = f"generate_rows is {config.generate_rows}, more than the held-out rows ({rows})"
            raise InputError(f"{what}: lower it, or give eval_rows or eval_dataset")
        if config.patience and not held_out:
            raise InputError("patience needs held-out rows, and there are none: give eval_rows or eval_dataset")
        if not reader.new_tokens or not config.lora_rank:
            return
        names = " ".join(self.tokenizer.convert_ids_to_tokens(reader.new_tokens))
        why = f"the chat template needs the new tokens {names}, whose embeddings are trained beside the adapter"
        if config.weight_decay:
            raise InputError(f"weight_decay would shrink those of all tokens: leave it out ({why})")
        if config.load_in_4bit:
            raise InputError(f"load_in_4bit has no weights that they could be merged into: leave it out ({why})")
        self.run.view.note(f"{why}; the result is written merged")

    def _packed(self) -> bool:
        """Whether rows are laid end to end: as asked for, and where the model can."""
        if self.config.packing is False:
            return False
        able = knows_rows(self.policy.model)
        if self.config.packing and not able:
            name = type(self.policy.model).__name__
            raise InputError(f"packing: {name}'s attention cannot be held within rows; leave packing out")
        return able

    def steps(self) -> Iterator[Record]:
        """Yields after each update, with its record."""
        config = self.config
        with self.begin() as run:
            for step in run.steps():
                if self._out_of_patience():
                    run.stop(f"{config.patience} evaluations without a lower held-out loss")
                    break
                with step.phase("read", "reading rows"):
                    batch = self.data.order.take(config.rows_per_step)
                with step.phase("update", "updating"):
                    figures = self._update(batch, step.number)
                self.note_updates(step, figures)
                self.position.mark()
                tokens = sum(map(len, batch))
                figures |= {"tokens": tokens, "trained_tokens": trained_tokens(batch)}
                figures |= {"tokens_per_second": tokens / sum(step.times.values()), **self.data.figures()}
                yield self.finish(step, figures)

    def _update(self, batch: Sequence[TokenRow], step: int) -> Record:
        """One optimiser update. The mean is over all trained tokens of the batch, however it is cut (promise 1)."""
        config, model = self.config, self.policy.model
        rate = learning_rate(step, config)
        count = trained_tokens(batch)
        tally = Tally()
        with self._attention(), self.optimizer.update(rate) as backward:
            for part in row_parts(batch, config.tokens_per_part, self.device, packed=self.packed):
                noise = self._noise(batch, part, step) if config.neftune_alpha else None
                scores = part_scores(model, part, noise)
                backward(self._losses(scores).sum() / count)
                found = {"nll": -scores.logprobs, "entropy": scores.entropies, "mean_token_accuracy": scores.is_largest}
                tally.add(torch.ones_like(part.targets, dtype=torch.bool), found)
        tally.updates.append(backward)
        return {**tally.figures(), "learning_rate": rate}

    def _losses(self, scores: TokenScores) -> Tensor:
        """The loss [M] of each trained token."""
        config = self.config
        if config.loss_type == "dft":
            losses = dft_loss(scores.logprobs)
        elif config.label_smoothing:
            losses = smoothed_loss(scores.logprobs, scores.mean_logprobs, label_smoothing=config.label_smoothing)
        else:
            losses = nll_loss(scores.logprobs)
        if config.z_loss:
            losses = losses + z_loss(scores.log_normalizers, coefficient=config.z_loss)
        return losses

    def _noise(self, batch: Sequence[TokenRow], part: RowPart, step: int) -> Tensor:
        width = self.policy.model.get_input_embeddings().weight.shape[1]
        return embedding_noise(part, batch, width, self.config.neftune_alpha, (self.config.seed, step))

    def _attention(self) -> AbstractContextManager[None]:
        return attending_within_rows(self.policy.model) if self.packed else nullcontext()

    def evaluation(self, step: int) -> Evaluation:
        """Loss, perplexity and token accuracy on the held-out rows, and scores of answers to some of them."""
        figures = self._held_out()
        if self.answering is None:
            return Evaluation(figures)
        found = self.answering(step, self.config.steps, self.run.view.status)
        return Evaluation(figures | found.metrics, found.samples)

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        rows = self.data.held_out.token_rows
        total = right = 0.0
        self.run.view.status("evaluating on held-out rows")
        with evaluating(self.policy.model), self._attention():
            for part in row_parts(rows, self.config.tokens_per_part, self.device, packed=self.packed):
                scores = part_scores(self.policy.model, part)
                total -= float(scores.logprobs.double().sum())
                right += float(scores.is_largest.sum())
        count = trained_tokens(rows)
        loss = total / count
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond that no float holds it
            "eval/mean_token_accuracy": right / count,
        }

    def evaluate_at(self, step: int) -> Record:
        """The same within the run: answers go to samples.jsonl, and the best weights to best/."""
        figures = super().evaluate_at(step)
        before = [loss for at, loss in self._losses_held_out() if at < step]
        if self.config.eval_every and step > 0 and figures["eval/loss"] < min(before, default=math.inf):
            self.latest = {"step": step, **figures}
            write_folder(self.run.directory / "best", self.export)
            self.latest = {}
        return figures

    def _losses_held_out(self) -> list[tuple[int, float]]:
        """Step and held-out loss of each evaluation after the first step, up to the present one; ∞ if not finite."""
        records = [record for record in self.run.records() if 0 < record["step"] <= self.run.step]
        found = [(record["step"], record["eval/loss"]) for record in records if "eval/loss" in record]
        return [(step, math.inf if loss is None else loss) for step, loss in found]  # JSON has no ∞

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought no lower loss than the best before them."""
        if not self.config.patience or not self.evaluation_due(self.run.step):
            return False
        losses = [loss for _, loss in self._losses_held_out()]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.config.patience
