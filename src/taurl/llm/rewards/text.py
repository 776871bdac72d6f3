"""The words of a completion, and the answer that it marks."""

from collections.abc import Mapping, Sequence
from typing import Any

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What the model wrote: the string itself, or the contents of the assistant's messages, joined by newlines.

    Messages of other roles inside a completion (results of tools) are not the model's words. A content may be missing
    (a message that only calls tools) or a list of parts, of which those with a `text` count.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(content_of(message) for message in completion if message.get("role", "assistant") == "assistant")


def content_of(message: Mapping[str, Any]) -> str:
    """The text of one chat message."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def tagged_answer(text: str) -> str | None:
    """What stands between the last `<answer>` and the next `</answer>`, stripped; None where either is missing."""
    _, opening, rest = text.rpartition(ANSWER_OPEN)
    inside, closing, _ = rest.partition(ANSWER_CLOSE)
    return inside.strip() if opening and closing else None
