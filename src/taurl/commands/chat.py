"""`taurl llm chat`: talk to a model in the terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taurl.commands.options import parse
from taurl.llm.inference_config import ChatConfig
from taurl.runtime.errors import InputError

if TYPE_CHECKING:
    from taurl.llm.inference import Model


def main(words: Sequence[str]) -> int:
    config = parse(ChatConfig, words, prog="taurl llm chat")

    from taurl.llm.inference import Model

    model = Model(config)
    if not model.tokenizer.chat_template:
        raise InputError(f"model {config.model!r} has no chat template; use `taurl llm generate` for raw text")
    messages: list[dict[str, str]] = []
    if sys.stdin.isatty():
        print("an empty line ends the talk", file=sys.stderr)
    while question := read_line():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(model, messages)})
    return 0


def read_line() -> str:
    """The next line of the person; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def answer(model: "Model", messages: list[dict[str, str]]) -> str:
    """One answer, printed as it comes. A turn's draws have their own key, so that answers do not repeat."""
    from taurl.llm.evaluation import decode

    prompt = model.reader().encode([{"prompt": messages}])[0]
    tokens: list[int] = []
    shown = ""

    def show(_: int, __: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = decode(model.tokenizer, tokens)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text

    model.generator.generate([prompt], 1, model.sampling, key=(model.config.seed, len(messages)), on_token=show)
    text = decode(model.tokenizer, tokens)
    print(text[len(shown) :])
    return text
