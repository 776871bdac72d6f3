"""`taurl llm chat`: talk to a model in the terminal."""

import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taurl.commands.options import parse
from taurl.llm.inference_config import ChatConfig
from taurl.runtime.errors import InputError

if TYPE_CHECKING:
    from taurl.llm.inference import Model

Messages = list[dict[str, str]]


def main(words: Sequence[str]) -> int:
    config = parse(ChatConfig, words, prog="taurl llm chat")

    from taurl.llm.inference import Model
    from taurl.runtime.machine import keep_freed_memory

    keep_freed_memory()
    model = Model(config)
    if not model.tokenizer.chat_template:
        raise InputError(f"model {config.model!r} has no chat template; use `taurl llm generate` for raw text")
    messages: Messages = []
    if sys.stdin.isatty():
        print("an empty line ends the talk", file=sys.stderr)
    while question := read_line():
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": answer(model, messages)})
        except InputError as error:  # one line that is too long does not end the talk
            if not sys.stdin.isatty():
                raise
            messages.pop()
            print(f"taurl: {error}", file=sys.stderr)
    return 0


def read_line() -> str:
    """The next line of the person; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def answer(model: "Model", messages: Messages) -> str:
    """One answer, printed as it comes. A turn's draws have their own key, so that answers do not repeat."""
    from taurl.llm.evaluation import decode

    tokens: list[int] = []
    shown = ""

    def show(_: int, __: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = decode(model.tokenizer, tokens)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            print(plain(text[len(shown) :]), end="", flush=True)
            shown = text

    key = (model.config.seed, len(messages))
    model.generator.generate([encode(model, messages)], 1, model.sampling, key=key, on_token=show)
    text = decode(model.tokenizer, tokens)
    print(plain(text[len(shown) :]))
    return text


def plain(text: str) -> str:
    """A text without the control characters that a terminal would obey."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def encode(model: "Model", messages: Messages) -> list[int]:
    """Token ids of the talk; its oldest turns are left out where they do not fit in the model's context."""
    from taurl.llm.data.chat import encode_prompt
    from taurl.llm.models.heads import context_length

    config, context = model.config, context_length(model.model)
    for start in range(0, len(messages), 2):
        ids = encode_prompt(
            messages[start:],
            model.tokenizer,
            system_prompt=config.system_prompt,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        if context is None or len(ids) + config.max_tokens <= context:
            if start:
                print(f"(the first {start // 2} turns no longer fit in the context)", file=sys.stderr)
            return ids
    raise InputError(
        f"the line has {len(ids)} tokens with its template; with max_tokens {config.max_tokens} that is more than the "
        f"model's context of {context}: shorten it or lower max_tokens"
    )
