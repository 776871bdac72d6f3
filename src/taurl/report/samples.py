"""Which of a run's sampled completions the page shows: a spread over the whole run, within a budget of bytes."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taurl.report.lines import parse_line, read_lines

MAXIMUM_SAMPLES = 2_000
SAMPLE_BYTES = 700_000  # for all browsable samples together
MAXIMUM_PAIRS = 24  # answers before and after
TEXT_LIMIT = 2_000  # characters of one prompt or completion; the middle is left out beyond that

Entry = tuple[int, int]  # byte offset and length of a line of the file


@dataclass
class Samples:
    """What of `samples.jsonl` is shown.

    `shown`: samples to browse, in the order of the file, `total` being how many the file holds.
    `pairs`: the same held-out row before and after, the rows in the order of the file; `pair_steps` their two steps.
    """

    total: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    pair_steps: tuple[int, int] = (0, 0)


def read_samples(path: Path, notices: list[str]) -> Samples:
    """Read the samples to show. The file is read as a stream: only the place of each line is held in memory."""
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    held_out_rows: dict[int, dict[str, Entry]] = defaultdict(dict)
    size = 0
    for offset, length, record in read_lines(path, notices):
        kind, step = str(record.get("kind", "train")), int(record["step"])
        groups[kind, step].append((offset, length))
        size += min(length, 2 * TEXT_LIMIT)
        if kind == "evaluation":
            held_out_rows[step].setdefault(str(record.get("row")), (offset, length))
    total = sum(map(len, groups.values()))
    if not total:
        return Samples()
    limit = max(50, min(MAXIMUM_SAMPLES, SAMPLE_BYTES * total // size))
    first, last = min(held_out_rows, default=0), max(held_out_rows, default=0)
    common = [row for row in held_out_rows[first] if row in held_out_rows[last]] if first != last else []
    pairs = [(held_out_rows[first][row], held_out_rows[last][row]) for row in common[:MAXIMUM_PAIRS]]
    with path.open("rb") as file:

        def load(entry: Entry) -> dict[str, Any]:
            file.seek(entry[0])
            return _for_page(parse_line(file.read(entry[1])) or {})

        shown = [load(entry) for entry in sorted(choose(list(groups.values()), limit))]
        return Samples(total, shown, [(load(before), load(after)) for before, after in pairs], (first, last))


def choose(groups: Sequence[Sequence[Entry]], limit: int) -> list[Entry]:
    """At most `limit` entries, spread evenly over the groups.

    The first ones of each group, because those belong together: the completions of one prompt, the same held-out rows
    each time. With more groups than `limit`, one entry each of evenly spaced groups, the first and the last among them.
    """
    if len(groups) > limit:
        groups = [groups[round(index * (len(groups) - 1) / max(1, limit - 1))] for index in range(limit)]
    left, chosen = limit, list[Entry]()
    for done, group in enumerate(sorted(groups, key=len)):  # what a small group does not need goes to the larger ones
        taken = group[: left // (len(groups) - done)]
        chosen.extend(taken)
        left -= len(taken)
    return chosen


def _for_page(record: dict[str, Any]) -> dict[str, Any]:
    """A sample with the fields the page knows, texts shortened."""
    names = ("step", "kind", "row", "reward", "rewards", "advantage", "finish", "tokens")
    sample = {name: record[name] for name in names if record.get(name) is not None}
    sample.setdefault("kind", "train")
    if not isinstance(sample.get("rewards"), dict):
        sample.pop("rewards", None)
    for name in ("prompt", "completion", "answer"):
        if record.get(name) is not None:
            sample[name] = shorten(as_text(record[name]))
    return sample


def as_text(value: Any) -> str:
    """A prompt or completion as text: strings as they are, messages as `role: content` lines, other values as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) and "content" in part for part in value):
        return "\n".join(f"{part.get('role', '')}: {as_text(part['content'])}" for part in value)
    return json.dumps(value, ensure_ascii=False)


def shorten(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, or its beginning and its end (where answers stand) with a note of how much is left out between them."""
    if len(text) <= limit:
        return text
    ending = limit // 3
    return f"{text[: limit - ending]}\n[… {len(text) - limit:,} characters left out …]\n{text[-ending:]}"
