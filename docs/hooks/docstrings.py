"""Turns the sections of our docstrings (Args, Returns, Raises, Source) into Markdown for the reference pages."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args(?:, \w+)*|Returns|Raises|Source): ?(.*)$")
ITEM = re.compile(r"^    (\w[\w, .…]*): (.*)$")


def as_markdown(text: str) -> str:
    """Sections begin a paragraph with their name in bold, and their indented `name: meaning` lines become a list."""
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if found := SECTION.match(line):
            section = found[1]
            lines += ["", f"**{section}**: {found[2]}".rstrip()]
            if not found[2]:
                lines.append("")
        elif section.startswith("Args") and (found := ITEM.match(line)):
            lines.append(f"- `{found[1]}`: {found[2]}")
        else:
            lines.append(line.strip() if section and line.startswith(" ") else line)
            section = section if line.strip() else ""
    return "\n".join(lines)


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
