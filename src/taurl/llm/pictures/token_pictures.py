"""A completion with figures of its tokens as colours, and the importance ratios of a step, as pictures."""

from collections.abc import Mapping, Sequence
from unicodedata import east_asian_width
from xml.sax.saxutils import escape

import torch
from torch import Tensor

WIDTH, MARGIN, LINE, HEADING = 880, 12, 26, 44  # pixels
CHARACTER, PADDING = 7.3, 5  # of 12-pixel monospace, and around a token
LOW, MIDDLE, HIGH = (198, 66, 56), (247, 247, 247), (33, 102, 172)  # below zero, zero, above
MOST_TOKENS = 160
CONTROL = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"})

BINS, BAR, HEIGHT = 41, 18, 160  # of the histogram; an odd number, so that ratio 1 is in the middle of a bin
WIDEST = 2.0  # the outermost bins hold what is beyond this factor


def token_picture(texts: Sequence[str], figures: Mapping[str, Sequence[float]], *, title: str) -> str:
    """An SVG with the tokens once for each figure, red below zero and blue above, by the figure's largest size.

    Args:
        texts: [T] the tokens as text; beyond `MOST_TOKENS` they are left out.
        figures: by name, [T] each.
    """
    left_out = max(0, len(texts) - MOST_TOKENS)
    texts = [text.translate(CONTROL) or "∅" for text in texts[:MOST_TOKENS]]
    places, lines = layout(texts)
    height = HEADING + len(figures) * (HEADING + lines * LINE)
    more = f", {left_out} more tokens not shown" if left_out else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="ui-monospace, monospace" font-size="12">',
        f"<title>{escape(_printable(title))}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{MARGIN}" y="26" font-size="15" fill="#222">{escape(_printable(title))}{more}</text>',
    ]
    for number, (name, values) in enumerate(figures.items()):
        top = HEADING + number * (HEADING + lines * LINE)
        values = list(values)[:MOST_TOKENS]
        scale = max(map(abs, values), default=0.0) or 1.0
        label = f"{name}, from {min(values, default=0):.3g} to {max(values, default=0):.3g}".replace("-", "−")
        parts.append(f'<text x="{MARGIN}" y="{top + 26}" font-size="13" fill="#222">{escape(label)}</text>')
        for text, (x, line), value in zip(texts, places, values, strict=True):
            parts.append(_token(text, x, top + HEADING - 8 + line * LINE, value / scale))
    return "\n".join([*parts, "</svg>"])


def layout(texts: Sequence[str]) -> tuple[list[tuple[float, int]], int]:
    """Where each token goes, (x, line), and how many lines that takes."""
    places: list[tuple[float, int]] = []
    x, line = float(MARGIN), 0
    for text in texts:
        if x + token_width(text) > WIDTH - MARGIN and x > MARGIN:
            x, line = float(MARGIN), line + 1
        places.append((x, line))
        x += token_width(text) + 2
    return places, line + 1


def token_width(text: str) -> float:
    columns = sum(2 if east_asian_width(character) in "WF" else 1 for character in text)
    return columns * CHARACTER + 2 * PADDING


def _token(text: str, x: float, y: float, share: float) -> str:
    end = HIGH if share > 0 else LOW
    mixed = (round(a + (b - a) * abs(share)) for a, b in zip(MIDDLE, end, strict=True))
    ink = "#fff" if abs(share) > 0.6 else "#111"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{token_width(text):.1f}" height="{LINE - 4}" rx="3" '
        f'fill="rgb({",".join(map(str, mixed))})"/>'
        f'<text x="{x + PADDING:.1f}" y="{y + 15:.1f}" fill="{ink}">{escape(_printable(text))}</text>'
    )


def _printable(text: str) -> str:
    """Without the control characters that XML refuses."""
    return "".join(c if c.isprintable() else "�" for c in text)


def ratio_picture(ratios: Tensor, step: int) -> str:
    """An SVG histogram of importance ratios [M], on a logarithmic axis, of one step's last epoch."""
    exponents = ratios.double().log2().nan_to_num(0.0).cpu()
    edge = torch.log2(torch.tensor(WIDEST)).item()
    counts = torch.histc(exponents.clamp(-edge, edge), BINS, -edge, edge)
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    highest = max(shares) or 1.0
    width, height = BINS * BAR + 2 * MARGIN, HEIGHT + HEADING + 40
    low, high = (float(f(ratios)) if len(ratios) else 1.0 for f in (torch.min, torch.max))
    title = f"step {step}: importance ratios of {len(ratios)} tokens, {low:.3g} to {high:.3g}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" text-anchor="middle">',
        f"<title>{title}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{MARGIN}" y="26" font-size="15" fill="#222" text-anchor="start">{title}</text>',
    ]
    base = HEADING + HEIGHT
    for number, share in enumerate(shares):
        x, size = MARGIN + number * BAR + 1, HEIGHT * share / highest
        place = f'x="{x}" y="{base - size:.1f}" width="{BAR - 2}" height="{size:.1f}"'
        parts.append(f'<rect {place} fill="#2166ac"/>')
    for exponent in (-1.0, -0.5, 0.0, 0.5, 1.0):
        centre = MARGIN + BINS * BAR * (exponent / edge + 1) / 2
        anchor = {-edge: "start", edge: "end"}.get(exponent, "middle")  # none may stick out
        parts.append(
            f'<text x="{centre:.0f}" y="{base + 18}" fill="#444" text-anchor="{anchor}">{2**exponent:.2f}</text>'
        )
    parts.append(f'<text x="{width // 2}" y="{base + 34}" fill="#444">current / old, tallest bar {highest:.1%}</text>')
    return "\n".join([*parts, "</svg>"])
