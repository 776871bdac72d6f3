"""The slow generator: `model.generate`, as the yardstick for the fast one and for models that it does not know."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from taurl.llm.generation.draw import draw, require_finite, uniforms
from taurl.llm.generation.protocol import Completion, Sampling, check_prompts, ends
from taurl.llm.models.heads import causal_lm, evaluating


class KeyedDraw(LogitsProcessor):
    """Draws each row's token by its own uniform number and leaves only that token possible."""

    def __init__(self, sampling: Sampling, numbers: np.ndarray):
        self.sampling, self.numbers = sampling, torch.from_numpy(numbers)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = draw(scores, self.numbers[:, len(self.logprobs)].to(scores.device), self.sampling)
        require_finite(logprobs)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


class TransformersSampler:
    """`model.generate` one prompt at a time, with the draws of the slot sampler: the same tokens, slowly.

    Args: as for `SlotSampler`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling,
        *,
        key: tuple[int, int] = (0, 0),
        on_token: Callable[[int, int, int], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`; `on_token` is called when a prompt's completions are all there."""
        check_prompts(prompts, sampling, self.model)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_token_ids) or None,
            pad_token_id=0,
        )
        groups = []
        with evaluating(self.model), generating_by(config, self.model):
            for prompt, ids in enumerate(prompts):
                numbers = [uniforms(key, prompt, completion, sampling.max_tokens) for completion in range(count)]
                keyed = KeyedDraw(sampling, np.stack(numbers))
                rows = self._generate(torch.tensor(ids, device=self.model.device).expand(count, -1), keyed)
                logprobs = torch.stack(keyed.logprobs, 1).tolist()
                groups.append([self._cut(*row, sampling) for row in zip(rows, logprobs, strict=True)])
                if on_token:
                    for completion, cut in enumerate(groups[-1]):
                        for token in cut.tokens:
                            on_token(prompt, completion, token)
                if progress:
                    progress((prompt + 1) * count, len(prompts) * count)
        return groups

    def release(self) -> None:
        """Nothing is made from the weights."""

    def _generate(self, copies: Tensor, keyed: KeyedDraw) -> list[list[int]]:
        """What `generate` puts after the prompt's copies [G, L]."""
        model: Any = causal_lm(self.model)
        output = model.generate(
            copies, attention_mask=torch.ones_like(copies), logits_processor=LogitsProcessorList([keyed])
        )
        rows: list[list[int]] = output[:, copies.shape[1] :].tolist()
        return rows

    def _cut(self, tokens: list[int], logprobs: list[float], sampling: Sampling) -> Completion:
        """Cut a row where it ends; `generate` pads it until the longest one does."""
        for length in range(1, len(tokens) + 1):
            if ends(tokens[:length], self.stop_token_ids, sampling.stop, self.tokenizer):
                return Completion(tokens[:length], logprobs[:length], "stop")
        return Completion(tokens, logprobs, "length")


@contextmanager
def generating_by(config: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """Put a model's own generation config aside: it may hold penalties that its distribution knows nothing of."""
    plain: Any = causal_lm(model)
    own = plain.generation_config
    plain.generation_config = config
    try:
        yield
    finally:
        plain.generation_config = own
