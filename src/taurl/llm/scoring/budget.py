"""How many rows go through a model together: as many as a number of tokens allows, padding included."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

Item = TypeVar("Item")


# Every completion has a copy of its prompt's keys and values, which take less memory than the activations of as many
# tokens: of SmolLM2-135M 46 kB a token, where a backward pass holds some 1.6 MB.
TOKENS_WHOSE_KEYS_WEIGH_ONE = 32


@dataclass(frozen=True)
class Size:
    """Completions and prompts, each padded to the longest of them."""

    completions: int
    length: int
    prompts: int = 0
    prompt_length: int = 0

    @property
    def tokens(self) -> int:
        """All of them, padding included, and what the copies of keys and values weigh."""
        copied = self.completions * self.prompt_length // TOKENS_WHOSE_KEYS_WEIGH_ONE
        return self.completions * self.length + self.prompts * self.prompt_length + copied

    def beside(self, other: Self) -> "Size":
        """Both together."""
        counts = self.completions + other.completions, self.prompts + other.prompts
        lengths = max(self.length, other.length), max(self.prompt_length, other.prompt_length)
        return Size(counts[0], lengths[0], counts[1], lengths[1])


def fitting(items: Iterable[Item], size: Callable[[Item], Size], tokens: int) -> Iterator[list[Item]]:
    """Cut items, in their order, into runs of at most so many tokens (one item at least)."""
    run: list[Item] = []
    together = Size(0, 0)
    for item in items:
        wider = together.beside(size(item))
        if run and wider.tokens > tokens:
            yield run
            run, wider = [], size(item)
        run.append(item)
        together = wider
    if run:
        yield run
