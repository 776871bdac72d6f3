"""The model that a preference run is measured against: asked once for each row and kept on disk, or asked each time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taurl.llm.algorithms.setup import loading_model
from taurl.llm.data.given_answers import GivenAnswers
from taurl.llm.models.heads import evaluating
from taurl.llm.models.loading import load_model
from taurl.llm.models.others import check_reference
from taurl.llm.models.policies import Policy
from taurl.llm.scoring.answer_batches import AnswerBatch
from taurl.llm.scoring.reference_logprobs import ReferenceCache, model_hash


class Reference:
    """Log-probabilities of answers under a reference.

    Args:
        policy: what is trained; its starting weights are the reference unless another one is given.
        other: the name or the object of another model.
        forward: (model, batch) → float [N, K], without gradient.
        live: asked at each step, so that it stays in memory. Otherwise the rows that are wanted are computed before
            the first update (`know`), while the policy itself still has its starting weights.
        circumstances: what the numbers follow from beside weights and tokens, rounding included.
    Raises: InputError for another model with another tokenizer.
    """

    def __init__(
        self,
        policy: Policy,
        other: Any,
        *,
        forward: Callable[[Any, AnswerBatch], Tensor],
        live: bool,
        circumstances: Any,
    ):
        self.policy, self.other, self.forward, self.live = policy, other, forward, live
        self.circumstances = circumstances
        self.caches: dict[str, ReferenceCache] = {}
        self._loaded: Any = None
        self.hash = ""
        if other is not None:
            check_reference(other, policy)

    def weights(self) -> Iterable[Tensor]:
        """Those of another model that is asked at each step; of one that is asked once there is its hash."""
        return self._other_model().parameters() if self.live and self.other is not None else ()

    def sampled(self, batch: AnswerBatch) -> Tensor:
        """Log-probabilities [N, K] of answers that nobody knew before."""
        with self._model() as model:
            return self.forward(model, batch)

    def given(self, answers: GivenAnswers, rows: Sequence[int], batch: AnswerBatch) -> Tensor:
        """Log-probabilities [N, K] of rows of a data set, whose batch this is."""
        if self.live:
            return self.sampled(batch)
        return self.cache(answers).values[list(rows)].to(batch.tokens.device)

    def know(
        self, answers: GivenAnswers, batches: Iterable[Sequence[int]], device: torch.device, note: Callable[[str], None]
    ) -> None:
        """Compute what the cache lacks of these batches of rows, in their order; the caller has not trained yet."""
        if self.live:
            return
        cache = self.cache(answers)
        batches = [missing for rows in batches if (missing := cache.missing(rows))]
        if not batches:
            self._loaded = None  # loaded for its hash
            return
        count = len({row for rows in batches for row in rows})
        note(f"computing the reference's log-probabilities of {count:,} rows once; they are kept in {cache.path}")
        done = 0
        with self._model() as model:
            for rows in batches:
                missing = cache.missing(rows)  # a batch before may have had some of them
                done += len(missing)
                if missing and cache.put(missing, self.forward(model, answers.take(missing, device))):
                    note(f"reference: {done:,} of {count:,} rows")
        if problem := cache.save():
            note(f"{problem}; the reference will be computed again by the next run")
        self._loaded = None  # its memory is wanted for training

    def cache(self, answers: GivenAnswers) -> ReferenceCache:
        """The cache of a data set; it must be asked for first while the policy has its starting weights."""
        tokens = answers.fingerprint
        if tokens not in self.caches:
            if not self.hash:
                with self._model() as model:
                    self.hash = model_hash(model)
            key = [self.hash, self.other is None and self.policy.adapter_is_new, tokens, self.circumstances]
            dtype = torch.promote_types(self.policy.model.dtype, torch.float32)
            self.caches[tokens] = ReferenceCache(key, (len(answers), answers.count), dtype)
        return self.caches[tokens]

    @contextmanager
    def _model(self) -> Iterator[Any]:
        if self.other is not None:
            model = self._other_model()
            with evaluating(model):
                yield model
        elif self.live or self.policy.adapter_is_new:
            with self.policy.reference() as model:
                yield model
        else:
            yield self.policy.model

    def _other_model(self) -> Any:
        if self._loaded is None:
            own = self.policy.model
            if isinstance(self.other, str):
                with loading_model():
                    self._loaded = load_model(self.other, dtype=own.dtype, device=own.device)
            else:
                self._loaded = self.other.to(own.device)
        return self._loaded


class NoReference:
    """For losses that need none: every log-probability is 0."""

    hash = ""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def weights(self) -> Iterable[Tensor]:
        """There are none."""
        return ()

    def sampled(self, batch: AnswerBatch) -> Tensor:
        """Zeros [N, K]."""
        return torch.zeros_like(batch.lengths, dtype=self.dtype)

    def given(self, answers: GivenAnswers, rows: Sequence[int], batch: AnswerBatch) -> Tensor:
        """Zeros [N, K]."""
        return self.sampled(batch)

    def know(
        self, answers: GivenAnswers, batches: Iterable[Sequence[int]], device: torch.device, note: Callable[[str], None]
    ) -> None:
        """Nothing to ask."""
