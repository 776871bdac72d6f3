"""Puts tables of settings into the built pages, where a line says `{{ settings package.module:Config }}`."""

import importlib
import re
from typing import Any, get_args

from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

from taurl.runtime.config import free_on_resume

LINE = re.compile(r"^\{\{ settings (\S+):(\w+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    return LINE.sub(lambda found: table(getattr(importlib.import_module(found[1]), found[2])), markdown)


def table(config: Any) -> str:
    resumes = "steps" in config.model_fields
    marks = {name: " ↻" if resumes and free_on_resume(config, name) else "" for name in config.model_fields}
    rows = [
        f"| `{name}`{marks[name]} | {default(field)} | {meaning(field)} |"
        for name, field in config.model_fields.items()
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ((), {}) else f"`{list(value) if isinstance(value, tuple) else value}`"


def meaning(field: FieldInfo) -> str:
    words = " ".join((field.description or "").split())
    if choices := choices_of(field.annotation):
        words += " Choices: " + ", ".join(f"`{choice}`" for choice in choices) + "."
    return words.replace("|", "\\|")


def choices_of(annotation: Any) -> list[str]:
    """The words that a `Literal` has, alone, beside None, or within a tuple."""
    parts = get_args(annotation)
    return [word for part in parts for word in ([part] if isinstance(part, str) else choices_of(part))]
