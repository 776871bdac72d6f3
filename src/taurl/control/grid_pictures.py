"""A table of action values as a picture, for the environments whose states are the squares of a grid."""

from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.vector import SyncVectorEnv, VectorEnv

from taurl.control.environments import Array
from taurl.control.tables import state_count

SQUARE, MARGIN, HEADING = 72, 8, 48  # pixels
LOW, HIGH = (239, 243, 250), (28, 78, 158)  # colours of the lowest and the highest value
ENDS = {"H": "hole", "C": "cliff", "G": "goal"}  # where an episode ends, or nobody can stand


class Grid(NamedTuple):
    """The squares row by row, a letter each (S start, H hole, C cliff, G goal), and an arrow for each action."""

    rows: tuple[str, ...]
    arrows: str


def grid_of(vector: VectorEnv[Any, Any, Any]) -> Grid | None:
    """The grid of FrozenLake and CliffWalking; None for anything else, and where a wrapper shows other states.

    Args:
        vector: environments of which there can be a table.
    """
    grid = _grid(vector)
    if grid is None:
        return None
    shown = state_count(vector.single_observation_space), state_count(vector.single_action_space)
    return grid if shown == (len("".join(grid.rows)), len(grid.arrows)) else None


def _grid(vector: VectorEnv[Any, Any, Any]) -> Grid | None:
    environment = vector.envs[0].unwrapped if isinstance(vector, SyncVectorEnv) else None
    match environment:
        case FrozenLakeEnv():
            letters = np.asarray(environment.desc).astype(str)
            return Grid(tuple("".join(row) for row in letters), arrows="←↓→↑")
        case CliffWalkingEnv():
            letters = np.where(environment._cliff, "C", "F")
            letters.flat[environment.start_state_index], letters[-1, -1] = "S", "G"
            return Grid(tuple("".join(row) for row in letters), arrows="↑→↓←")
    return None


def value_picture(values: Array, visited: Array, grid: Grid, *, title: str) -> str:
    """An SVG of max_a Q(s, a), with the greedy action, in each square that was visited.

    Args:
        values: float [S, A], states row by row.
        visited: bool [S].
    """
    width = len(grid.rows[0]) * SQUARE + 2 * MARGIN
    height = len(grid.rows) * SQUARE + 2 * MARGIN + HEADING
    letters = "".join(grid.rows)
    stands = visited & np.array([letter not in ENDS for letter in letters])
    best = values.max(-1)
    low, high = (best[stands].min(), best[stands].max()) if stands.any() else (0.0, 0.0)
    shares = (best - low) / ((high - low) or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<g text-anchor="start" fill="#333"><text x="{MARGIN}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{MARGIN}" y="40" font-size="12">max Q(s, a) and the greedy action</text></g>',
    ]
    for state, letter in enumerate(letters):
        row, column = divmod(state, len(grid.rows[0]))
        x, y = MARGIN + column * SQUARE, MARGIN + HEADING + row * SQUARE
        label = ENDS.get(letter, "start" if letter == "S" else "")
        if stands[state]:
            arrow = grid.arrows[int(values[state].argmax())]
            parts.append(_square(x, y, float(shares[state]), arrow, f"{best[state]:.3g}".replace("-", "−"), label))
        else:
            parts.append(_blank(x, y, label, dark=letter in ENDS))
    return "\n".join([*parts, "</svg>"])


def _square(x: int, y: int, share: float, arrow: str, value: str, label: str) -> str:
    colour = ",".join(str(round(a + (b - a) * share)) for a, b in zip(LOW, HIGH, strict=True))
    ink, middle = "#fff" if share > 0.5 else "#111", x + SQUARE // 2
    return (
        f'<g fill="{ink}"><rect x="{x}" y="{y}" width="{SQUARE}" height="{SQUARE}" fill="rgb({colour})" '
        f'stroke="#fff"/><text x="{middle}" y="{y + 15}" font-size="11">{label}</text>'
        f'<text x="{middle}" y="{y + 41}" font-size="24">{arrow}</text>'
        f'<text x="{middle}" y="{y + 62}" font-size="13">{value}</text></g>'
    )


def _blank(x: int, y: int, label: str, *, dark: bool) -> str:
    fill, ink, middle = "#5b6270" if dark else "#e4e4e4", "#fff" if dark else "#444", SQUARE // 2
    return (
        f'<rect x="{x}" y="{y}" width="{SQUARE}" height="{SQUARE}" fill="{fill}" stroke="#fff"/>'
        f'<text x="{x + middle}" y="{y + middle + 5}" font-size="13" fill="{ink}">{label}</text>'
    )
