"""What every generator takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from taurl.llm.models.heads import context_length, known_tokens
from taurl.runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: longest completion, in tokens, the stop token included.
        temperature: logits are divided by it before the softmax; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 keeps all.
        min_p: keep tokens with at least this share of the most likely token's probability; 0 keeps all.
        stop: a completion ends with the token that completes one of these strings (the string stays in it).
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        )
        for name, fits, expected in bounds:
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        tokens: token ids as they were drawn, the stop token included.
        logprobs: log-probability of each token under the distribution it was drawn from (after temperature and
            truncation; 0 where the draw was greedy).
        finish: "stop" at a stop token or stop string, "length" at max_tokens.
        chosen: which tokens were drawn; None for all. In an episode of several turns the others are the environment's.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    chosen: list[bool] | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut off."""
        return self.finish == "length"

    @property
    def length(self) -> int:
        """How many tokens were drawn."""
        return len(self.tokens) if self.chosen is None else sum(self.chosen)


class Generator(Protocol):
    """Samples completions of prompts given as token ids."""

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
        """`count` completions of each prompt.

        Args:
            prompts: P lists of token ids, each non-empty.
            count: completions a prompt (the group size G).
            sampling: how tokens are drawn.
            key: (seed, step), whole numbers of 0 or more. The uniform number behind each draw depends on the key, the
                prompt's place in `prompts`, the completion's in its group and the token's in the completion, and on
                nothing else: a prompt at the same place draws the same whatever stands beside it, up to the rounding
                of its logits.
            on_token: called with (prompt, completion, token) as each token is drawn, for streaming.
            progress: called with (completions done, completions in all).
        Returns: P lists of G completions.
        """
        ...

    def release(self) -> None:
        """Let go, before an update, of the memory for what was made from the weights that it changes."""
        ...


BROKEN = "\ufffd"  # what stands for bytes that are no character


def ends(
    tokens: Sequence[int],
    stop_token_ids: Container[int],
    stop: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> bool:
    """Whether a completion ends with its last token: a stop token, or the token that completes a stop string."""
    if tokens[-1] in stop_token_ids:
        return True
    if not stop:
        return False
    if tokenizer is None:
        raise InputError("stop strings need the sampler's `tokenizer`")
    longest = max(len(text.encode()) for text in stop)  # a token stands for at least one byte
    for before in range(1, 5):
        tail = str(tokenizer.decode(list(tokens[-longest - before :]), clean_up_tokenization_spaces=False))
        if any(text in tail for text in stop):
            return True
        if not tail.startswith(BROKEN):  # else the cut fell into a character, of up to four bytes, and may hide others
            return False
    return False


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling, model: PreTrainedModel) -> None:
    """Raise an InputError for prompts that are empty, hold tokens that the model does not know, or leave no room for
    max_tokens in its context."""
    context, known = context_length(model), known_tokens(model)
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index} is empty, expected at least one token")
        if max(prompt) >= known:
            raise InputError(
                f"prompt {index} holds token {max(prompt)}, and the model knows {known} tokens: is the tokenizer that "
                "of another model, or were tokens added to it?"
            )
        if context and len(prompt) + sampling.max_tokens > context:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; with max_tokens {sampling.max_tokens} that is more than the "
                f"model's context of {context}: shorten the prompt or lower max_tokens"
            )
