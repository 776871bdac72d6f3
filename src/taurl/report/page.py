"""The page itself: headline, tables and what the template needs, written beside the run as `report.html`."""

import json
import math
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from taurl.report.charts import MAXIMUM_POINTS, Section, sections
from taurl.report.read import RunRecord, read_run
from taurl.runtime.errors import RunError
from taurl.runtime.metrics import finite
from taurl.runtime.terminal import duration, is_score

PAIRS_SHOWN = 3  # answers before and after that are open from the start
NAME = "report.html"
EVALUATED = {
    "eval/mean_reward": "mean return",
    "eval/std_reward": "standard deviation",
    "eval/reward_p10": "10th percentile",
    "eval/reward_p50": "median",
    "eval/reward_p90": "90th percentile",
    "eval/mean_ep_length": "mean length",
}


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Change:
    """A held-out metric at its first and its last evaluation, as (step, value); no `after` while there is only one."""

    name: str
    before: tuple[int, float]
    after: tuple[int, float] | None

    @property
    def difference(self) -> str:
        """After less before, with its sign."""
        difference = self.after[1] - self.before[1] if self.after else math.nan
        return "+" * (difference > 0) + format_number(difference)


def write_page(run_directory: Path) -> Path:
    """See `taurl.report.write_report`."""
    page = render(read_run(run_directory))
    path = run_directory / NAME
    beside = run_directory / f"{NAME}.{os.getpid()}.part"
    try:  # replaced in one go: somebody may have the page open, and a run may be writing it too
        beside.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror}; free space or give write permission") from error
    return path


def render(run: RunRecord) -> str:
    """The page as one string of HTML. All of a run's own text is escaped by the template or by `embed`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("taurl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    curves, compared = sections(run), changes(run)
    return environment.get_template("page.html.j2").render(
        run=run,
        title=run.name,
        subtitle=subtitle(run),
        state=state(run),
        tiles=tiles(run),
        comparison="Evaluation" if run.acts else "Before and after",
        changes=compared,
        compared=any(row.after for row in compared),
        pairs_shown=PAIRS_SHOWN,
        sections=curves,
        thinned=any(len(points) > MAXIMUM_POINTS for points in map(run.points, run.metric_names)),
        maximum_points=MAXIMUM_POINTS,
        chart_data=Markup(embed(_figures(curves))),
        sample_data=Markup(embed(run.samples.shown)),
        config=list(flatten(run.config)),
        environment=list(flatten(run.environment)),
        plotly=Markup(get_plotlyjs()) if curves else "",
        nonce=secrets.token_urlsafe(16),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _figures(curves: list[Section]) -> list[dict[str, Any]]:
    return [chart.figure for section in curves for chart in section.charts]


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>` or `&` can end it, no NaN that JSON does not know."""
    text = json.dumps(finite(value), separators=(",", ":"))  # ASCII: no line separators either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def subtitle(run: RunRecord) -> str:
    """Model, data and machine on one line, as far as they are known."""
    model, dataset = (run.config.get(name) for name in ("model", "dataset"))
    environment = run.config.get("environment") or run.config.get("env")
    machine = run.environment.get("device"), run.environment.get("cpu")
    parts = [part for part in (model, dataset, environment, *machine) if isinstance(part, str) and part]
    return " · ".join(dict.fromkeys(parts))


def state(run: RunRecord) -> str:
    """How far the run is."""
    last, planned = max(run.metrics, default=0), run.config.get("steps")
    steps = f"step {last:,} of {planned:,}" if isinstance(planned, int) and planned >= last else f"step {last:,}"
    return f"Finished at {steps}" if run.finished else f"Not finished: {steps} so far"


def tiles(run: RunRecord) -> list[Tile]:
    """The headline figures, each only if the run recorded it."""
    learning = (
        [_last_evaluation(run), _best_evaluation(run), _before_after(run, "While training", "rollout/ep_rew_mean")]
        if run.acts
        else [_before_after(run, "Held-out", _held_out_metric(run)), _before_after(run, "Reward", "reward")]
    )
    candidates = [
        *learning,
        _median(run, "Tokens per second", "tokens_per_second"),
        _median(run, "Steps per second", "time/fps"),
        _wall_time(run),
        _peak_memory(run),
    ]
    return [tile for tile in candidates if tile is not None]


def _last_evaluation(run: RunRecord) -> Tile | None:
    """Mean and deviation of the return; how many episodes are behind it."""
    points, spreads = run.points("eval/mean_reward"), run.points("eval/std_reward")
    if not points:
        return None
    (step, mean), episodes = points[-1], run.config.get("eval_episodes")
    spread = f" ± {format_number(spreads[-1][1])}" if spreads else ""
    of = f"{episodes:,} episodes, " if isinstance(episodes, int) else ""
    return Tile("Return, evaluated", f"{format_number(mean)}{spread}", f"{of}step {step:,}")


def _best_evaluation(run: RunRecord) -> Tile | None:
    """The best mean return, where it is not the last."""
    points = run.points("eval/mean_reward")
    step, mean = max(points, key=lambda point: point[1], default=(0, 0.0))
    if not points or mean == points[-1][1]:
        return None
    return Tile("Best evaluation", format_number(mean), f"step {step:,}")


def _held_out_metric(run: RunRecord) -> str:
    """The only held-out reward function, else the total, else whatever was evaluated first."""
    names = [name for name in run.metric_names if name.startswith("eval/")]
    functions = [name for name in names if is_score(name)]
    if len(functions) == 1:
        return functions[0]
    return "eval/reward" if "eval/reward" in names or not names else names[0]


def _before_after(run: RunRecord, label: str, metric: str) -> Tile | None:
    points = run.points(metric)
    if not points:
        return None
    name = metric.removeprefix("eval/").removeprefix("rewards/").removesuffix("/mean")
    label = label if run.acts or name.lower() in (label.lower(), "reward") else f"{label}: {name}"
    (first, before), (last, after) = points[0], points[-1]
    if first == last:
        return Tile(label, format_number(before), f"step {first} only, so far")
    return Tile(label, f"{format_number(before)} → {format_number(after)}", f"step {first:,} → step {last:,}")


def _median(run: RunRecord, label: str, metric: str) -> Tile | None:
    values = [value for _, value in run.points(metric)]
    return Tile(label, f"{median(values):,.0f}", "median of all steps") if values else None


def _wall_time(run: RunRecord) -> Tile | None:
    points = run.points("seconds")
    if not points:
        return None
    return Tile("Wall time", duration(max(value for _, value in points)), "all parts of the run")


def _peak_memory(run: RunRecord) -> Tile | None:
    points = run.points("memory/peak_gb")
    return Tile("Peak memory", f"{max(value for _, value in points):.1f} GB") if points else None


def changes(run: RunRecord) -> list[Change]:
    """Each held-out metric at its first and its last evaluation."""
    rows = []
    for name in run.metric_names:
        if name.startswith("eval/") and not name.endswith("/seconds"):  # what scoring took is no result
            points = run.points(name)
            label = EVALUATED.get(name, name) if run.acts else name
            rows.append(Change(label, points[0], points[-1] if len(points) > 1 else None))
    return rows


def flatten(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, text of the value) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            rows.append((f"{prefix}{key}", value))
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            rows.append((f"{prefix}{key}", ", ".join(value)))
        else:
            rows.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)))
    return rows


def format_number(value: Any) -> str:
    """A figure for reading: up to four digits, `–` for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 10:
        text = f"{value:,.{0 if size >= 1e4 else 1 if size >= 100 else 2}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.3f}" if size >= 1e-3 else f"{value:.4g}"
    return text.replace("-", "−")
