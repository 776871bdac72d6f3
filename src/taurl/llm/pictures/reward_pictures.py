"""Pictures of a reward model's held-out scores: their histogram, and how sure it is against how often it is right."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from taurl.llm.data.preference_rows import Form, JudgedRow
from taurl.llm.pictures.reward_figures import Comparisons, calibration

WIDTH, HEIGHT = 460, 300  # pixels
LEFT, TOP, RIGHT, BOTTOM = 48, 44, 14, 40  # around the axes
COLOURS = ("#2a6fbb", "#d9822b")
BARS = 24


def pictures(
    form: Form, rows: Sequence[JudgedRow], scores: Sequence[Sequence[float]], *, binary: bool = True
) -> dict[str, str]:
    """File name → SVG, of what the form of the data lets one draw.

    Args:
        binary: as in `reward_figures.figures`.
    """
    if any(len(row.completions) > 1 for row in rows):
        pairs = Comparisons.of(rows, scores)
        differences = pairs.better - pairs.worse
        groups = {"chosen": pairs.better, "rejected": pairs.worse}
        sure, right = 1 / (1 + np.exp(-np.abs(differences))), np.where(differences == 0, 0.5, differences > 0)
        axes = "probability of the higher score", "share of pairs where it is the chosen one"
    elif form == "process" or (form == "label" and binary):
        flat = np.array([value for values in scores for value in values])
        judged = [row.step_labels or row.values for row in rows]
        right = np.array([value for values in judged for value in values])
        groups = {"label 1": flat[right > 0.5], "label 0": flat[right <= 0.5]}
        sure, axes = 1 / (1 + np.exp(-flat)), ("predicted probability of label 1", "share with label 1")
    else:
        return {"scores.svg": histogram({"all": np.array([v for values in scores for v in values])}, "Held-out scores")}
    return {
        "scores.svg": histogram(groups, "Held-out scores"),
        "calibration.svg": calibration_curve(sure, right, *axes),
    }


def histogram(groups: dict[str, np.ndarray], title: str) -> str:
    """Bars of each group over common bins, one group in front of the other."""
    every = np.concatenate(list(groups.values()))
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, BARS + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in groups.items()}
    top = max(1, *(int(count.max()) for count in counts.values()))
    parts = _frame(title, "score", "completions", (float(edges[0]), float(edges[-1])), (0.0, float(top)))
    step = (WIDTH - LEFT - RIGHT) / BARS
    for index, (name, count) in enumerate(counts.items()):
        colour = COLOURS[index % len(COLOURS)]
        for bar, value in enumerate(count.tolist()):
            height = value / top * (HEIGHT - TOP - BOTTOM)
            x, y = LEFT + bar * step, HEIGHT - BOTTOM - height
            if value:
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{height:.1f}" fill="{colour}" '
                    'fill-opacity="0.55"/>'
                )
        place = LEFT + 110 * index
        parts.append(f'<rect x="{place}" y="28" width="10" height="10" fill="{colour}" fill-opacity="0.55"/>')
        parts.append(f'<text x="{place + 15}" y="37">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def calibration_curve(probabilities: np.ndarray, outcomes: np.ndarray, across: str, up: str) -> str:
    """How often what was given a probability came true; on the diagonal the model is as sure as it is right."""
    parts = _frame("Calibration on held-out rows", across, up, (0.0, 1.0), (0.0, 1.0))
    x = [LEFT + p * (WIDTH - LEFT - RIGHT) for p in (0.0, 1.0)]
    parts.append(
        f'<line x1="{x[0]}" y1="{HEIGHT - BOTTOM}" x2="{x[1]}" y2="{TOP}" stroke="#999" stroke-dasharray="4 4"/>'
    )
    bins = calibration(probabilities, outcomes)
    points = [
        (LEFT + p * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)) for p, share, _ in bins
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>')
    most = max(count for *_, count in bins)
    for (x_, y_), (p, share, count) in zip(points, bins, strict=True):
        tip = f"{count} of them: probability {p:.2f}, found {share:.2f}"
        radius = 3 + 5 * (count / most) ** 0.5  # area by count
        parts.append(
            f'<circle cx="{x_:.1f}" cy="{y_:.1f}" r="{radius:.1f}" fill="{COLOURS[0]}"><title>{tip}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


def _frame(
    title: str, across: str, up: str, horizontal: tuple[float, float], vertical: tuple[float, float]
) -> list[str]:
    """The picture's beginning: title, axes, and what they mean."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#666"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(up)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = LEFT + share * (right - LEFT), bottom - share * (bottom - TOP)
        at, level = (start + share * (end - start) for start, end in (horizontal, vertical))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_short(at)}</text>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(level)}</text>')
    return parts


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
