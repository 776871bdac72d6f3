"""Rows of token ids for supervised training, and which of their tokens are targets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenRow:
    """One row as the model sees it.

    Attributes:
        ids: token ids, special tokens included.
        trained: for each token, whether it is a target, predicted from those before it; never the first one.
    """

    ids: list[int]
    trained: list[bool]
