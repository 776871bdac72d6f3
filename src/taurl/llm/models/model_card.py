"""The model card: README.md of a folder that a run leaves, which says where its weights come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from taurl import __version__

PRINTED = ("learning_rate", "schedule", "lora_rank", "seed")


def model_card(algorithm: str, config: Any, records: Sequence[dict[str, Any]], *, adapter: bool) -> str:
    """Markdown with the header that the hub reads: the base model, the data, settings, and held-out figures.

    Args:
        config: of the run. Folders and files are named without the path to them.
        records: the run's metrics so far.
        adapter: whether the folder holds an adapter alone.
    """
    base, data = config.model, getattr(config, "dataset", None)
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if algorithm == "reward" else "text-generation",
        "tags": ["taurl", algorithm],
    }
    if base and is_on_hub(base):
        header["base_model"] = base
    if data and is_on_hub(data):
        header["datasets"] = [data.partition(":")[0]]
    settings = {name: getattr(config, name) for name in PRINTED if getattr(config, name, None) is not None}
    taken = max((record["step"] for record in records), default=0)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {shown(base)} after {algorithm.upper()}",
        "",
        f"{'An adapter for' if adapter else 'Weights of'} {shown(base)}, trained on {shown(data)} by `taurl llm "
        f"{algorithm}` (taurl {__version__}).",
        "",
        f"Steps: {taken}{f' of {config.steps}' if taken < config.steps else ''}. "
        + " ".join(f"{name.replace('_', ' ').capitalize()}: {value}." for name, value in settings.items()),
        "",
        *held_out_table(records),
    ]
    return "\n".join(lines) + "\n"


def is_on_hub(name: str) -> bool:
    """Whether a name is one of the hub's, `owner/name` with what a data set's may have after it."""
    plain = not name.startswith(("/", "~", ".")) and not Path(name).exists()
    return plain and name.count("/") == 1 and not Path(name).suffix.startswith((".json", ".csv", ".parquet"))


def shown(name: str | None) -> str:
    """A name as it may leave this machine: of a path its last part."""
    if name is None:
        return "a model or data given from Python"
    return name if is_on_hub(name) or "/" not in name else Path(name).name


def held_out_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The figures of the first and the last evaluation."""
    evaluations = [record for record in records if any(name.startswith("eval/") for name in record)]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [
        name
        for name, value in last.items()
        if name.startswith("eval/") and not name.endswith(("/seconds", "/std")) and isinstance(value, int | float)
    ]
    head = [f"| held-out rows | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    return head + [
        f"| {name.removeprefix('eval/')} | {figure(first.get(name))} | {figure(last[name])} |" for name in names
    ]


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
