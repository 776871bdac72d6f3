"""Which curves the page draws and how: plain plotly figures, with theme colours left as CSS variables for the page.

Known metrics have a place in `panels`; every other metric gets a chart of its own in a section named after its prefix,
so a run of any algorithm is drawn without this file knowing it.
"""

import html
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from taurl.report.panels import (
    CONTROL_PANELS,
    CONTROL_SECTIONS_BY_PREFIX,
    NOT_DRAWN,
    PANELS,
    SECTIONS_BY_PREFIX,
    Panel,
)
from taurl.report.read import Points, RunRecord

MAXIMUM_POINTS = 1_000  # a curve; more than the pixels of a chart, and the page stays below 6 MB
SERIES_COLOURS = 8  # --series-1 … in page.css; a chart with more lines is split
MARKERS_UP_TO = 40  # points; above that markers hide the line
BANDS = {1: "Band: ± one standard deviation of the total.", 2: "Band: from the 10th to the 90th percentile."}
THIN_LINE_FROM = 300  # points; a thick line turns noise into a bar

Band = dict[int, tuple[float, float]]  # lower and upper bound by step


@dataclass(frozen=True)
class Line:
    """One named line of a chart, its colour a CSS variable."""

    label: str
    points: Points
    colour: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure for plotly with what the page writes around it."""

    title: str
    note: str
    summary: str
    lines: list[Line]
    figure: dict[str, Any]

    @property
    def metric(self) -> str:
        """The name of the only line where the title does not say it; empty otherwise."""
        label = self.lines[0].label
        said = label.replace("_", " ").lower() in self.title.replace("_", " ").lower()
        return "" if len(self.lines) > 1 or said else label


@dataclass
class Section:
    """Charts under one heading."""

    title: str
    charts: list[Chart] = field(default_factory=list)


def sections(run: RunRecord) -> list[Section]:
    """All charts of a run in sections: the known ones in the order of `panels`, then the others as they appeared."""
    panels, prefixes = (CONTROL_PANELS, CONTROL_SECTIONS_BY_PREFIX) if run.acts else (PANELS, SECTIONS_BY_PREFIX)
    found: dict[str, Section] = {}
    names = [name for name in run.metric_names if not any(fnmatchcase(name, pattern) for pattern in NOT_DRAWN)]
    drawn = set[str]()

    def add(section: str, charts: list[Chart]) -> None:
        if charts:
            found.setdefault(section, Section(section)).charts.extend(charts)

    for panel in panels:
        named = {name: label for name, label in _matches(panel, names).items() if name not in drawn}
        drawn.update(named)
        lines = [Line(label, run.points(name)) for name, label in named.items()]
        add(panel.section, _charts(panel, lines, _band(panel, run), run.step_name))
    for name in names:
        if name not in drawn:
            prefix, _, rest = name.rpartition("/")
            section = prefixes.get(name.partition("/")[0], prefix or "Others")
            title = name if section in prefixes.values() else rest
            add(section, _charts(Panel(section, title, (name,)), [Line(rest, run.points(name))], {}, run.step_name))
    return list(found.values())


def _matches(panel: Panel, names: list[str]) -> dict[str, str]:
    """The panel's metrics among `names`, with their labels: the part `*` stands for, or the whole name."""
    matches: dict[str, str] = {}
    for key in panel.keys:
        pattern = re.compile(re.escape(key).replace(r"\*", "(.+)"), re.DOTALL)
        for name in names:
            if match := pattern.fullmatch(name):
                matches.setdefault(name, match.group(1) if "*" in key else name)
    return matches


def _band(panel: Panel, run: RunRecord) -> Band:
    """Lower and upper bound at each step where the metrics of the panel's band have a value."""
    match panel.band:
        case (spread,):
            (first, *_) = panel.keys
            around, widths = dict(run.points(first)), dict(run.points(spread))
            return {step: (around[step] - w, around[step] + w) for step, w in widths.items() if step in around}
        case (low, high):
            lowest, highest = dict(run.points(low)), dict(run.points(high))
            return {step: (value, highest[step]) for step, value in lowest.items() if step in highest}
    return {}


def _charts(panel: Panel, lines: list[Line], band: Band, step_name: str) -> list[Chart]:
    if len(lines) == 2 and lines[0].points == lines[1].points:  # one reward function of weight 1 is the total
        lines = [Line(f"{lines[0].label} = {lines[1].label}", lines[0].points)]
    charts = []
    for start in range(0, len(lines), SERIES_COLOURS):
        part = [
            Line(line.label, line.points, f"var(--series-{index})")
            for index, line in enumerate(lines[start : start + SERIES_COLOURS], start=1)
        ]
        title = panel.title if start == 0 else f"{panel.title} ({start // SERIES_COLOURS + 1})"
        shown_band = band if start == 0 and len(part[0].points) > 1 else {}
        note = f"{panel.note} {BANDS[len(panel.band)]}" if shown_band else panel.note
        charts.append(Chart(title, note, _summary(part), part, _figure(panel, part, shown_band, step_name)))
    return charts


def _summary(lines: list[Line]) -> str:
    """What the chart shows, in words, for those who do not see it."""
    parts = []
    for line in lines:
        (first, start), (last, end) = line.points[0], line.points[-1]
        words = f"{start:.4g} at step {first}" + (f", {end:.4g} at step {last}" if last != first else "")
        parts.append(f"{line.label}: {words}")
    return "; ".join(parts)


def _figure(panel: Panel, lines: list[Line], band: Band, step_name: str) -> dict[str, Any]:
    data = _band_traces(lines[0], band)
    lines_shown = thin_alike(lines) if panel.stacked else [thin(line.points) for line in lines]
    for line, points in zip(lines, lines_shown, strict=True):
        trace = {
            "type": "scatter",
            "name": html.escape(line.label),  # plotly reads some tags in names
            "x": [step for step, _ in points],
            "y": [_rounded(value) for _, value in points],
            "mode": "lines+markers" if len(points) <= MARKERS_UP_TO else "lines",
            "line": {"color": line.colour, "width": 2 if len(points) < THIN_LINE_FROM else 1},
            "marker": {"size": 5 if len(points) > 1 else 9},
            "hovertemplate": "%{y:.2%}" if panel.share else "%{y:.4~g}",
        }
        if panel.stacked:
            trace |= {
                "stackgroup": "all",
                "stackgaps": "infer zero",  # a phase that is not recorded did not take place
                "mode": "lines" if len(points) > 1 else "lines+markers",
            }
            trace["line"] = {"color": line.colour, "width": 1}
        data.append(trace)
    return {"data": data, "layout": _layout(panel, lines, step_name)}


def _band_traces(line: Line, band: Band) -> list[dict[str, Any]]:
    """The area between the bounds around a line, as two invisible lines with a filling between."""
    steps = [step for step, _ in thin(line.points) if step in band]
    common = {"type": "scatter", "x": steps, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    if not steps:
        return []
    low, high = ([_rounded(band[step][side]) for step in steps] for side in (0, 1))
    return [common | {"y": low}, common | {"y": high, "fill": "tonexty", "fillcolor": "var(--band)"}]


def _layout(panel: Panel, lines: list[Line], step_name: str) -> dict[str, Any]:
    values = [value for line in lines for _, value in line.points]
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--axis)",
        "zeroline": False,
        "automargin": True,
        "ticks": "",
    }
    steps = [step for line in lines for step, _ in line.points]
    x_axis = axis | {"title": {"text": step_name, "standoff": 8}, "showgrid": False, "showline": True, "nticks": 7}
    if min(steps) == max(steps):  # plotly would draw fractions of a step around a single point
        x_axis |= {"range": [min(steps) - 1, min(steps) + 1], "tickvals": [min(steps)]}
    elif max(steps) - min(steps) < 8:
        x_axis |= {"dtick": 1}
    y_axis = axis | {"nticks": 6, "separatethousands": True}
    if min(values) >= 0 and (panel.share or panel.stacked or panel.section in ("Completions", "Speed")):
        y_axis["rangemode"] = "tozero"
    if min(values) == max(values) and not panel.band:  # plotly would show ±1 around a learning rate of 1e-5
        y_axis["range"] = sorted([0, 2 * values[0]]) if values[0] else [0, 0.1 if panel.share else 1]
    if panel.share:
        y_axis["tickformat"] = ".0%" if max(values) > 0.05 else ".2~%"
    elif max(map(abs, values)) < 1e-3:
        y_axis["exponentformat"] = "e"
    return {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--axis)", "font": {"color": "var(--text)"}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 44, "r": 12, "t": 8, "b": 40},
        "height": 240,
        "showlegend": False,
        "hovermode": "x unified",
    }


def thin(points: Points, most: int = MAXIMUM_POINTS) -> Points:
    """At most so many: the first, the last, and the lowest and highest of each stretch, so that peaks stay."""
    if len(points) <= most:
        return points
    buckets = max(1, (most - 2) // 2)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        stretch = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def thin_alike(lines: list[Line]) -> list[Points]:
    """At most MAXIMUM_POINTS of each line, all at the steps that `thin` keeps of any, as stacked lines need them."""
    if len({step for line in lines for step, _ in line.points}) <= MAXIMUM_POINTS:
        return [line.points for line in lines]
    kept = {step for line in lines for step, _ in thin(line.points, MAXIMUM_POINTS // len(lines))}
    return [[point for point in line.points if point[0] in kept] for line in lines]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
