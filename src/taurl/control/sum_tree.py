"""Drawing places in proportion to priorities that change all the time."""

from typing import Any

import numpy as np

from taurl.control.environments import Array

# Children of a node. Two is the textbook's; a step down costs some operations whatever the number, so a wide tree of
# few levels is faster. Of 16 to 1024, 16 and 32 were fastest, at 50,000 and at 1,000,000 places.
FAN = 32


class SumTree:
    """Priorities, float64, with the sums of each 32, of each 32 of those, and so on.

    A sum is computed anew from its parts when one of them changes, so that no rounding adds up.
    """

    def __init__(self, places: int):
        sizes = [-(-places // FAN)]  # nodes of each level
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // FAN))
        self.levels = [np.zeros((size, FAN)) for size in sizes]

    @property
    def priorities(self) -> Array:
        """Of all places, and of some beyond that fill the last node, which have 0."""
        return self.levels[0].reshape(-1)

    @property
    def total(self) -> float:
        return float(self.levels[-1].sum())

    def set(self, places: Array, priorities: Array) -> None:
        """Give places [N] their priorities; a place that is there twice has the last of them."""
        self.priorities[places] = priorities
        for below, level in zip(self.levels, self.levels[1:], strict=False):
            places = places // FAN
            level.reshape(-1)[places] = below[places].sum(1)

    def find(self, masses: Array) -> Array:
        """The places where the running sum of the priorities first exceeds `masses` [N], each in [0, total)."""
        nodes: Any = np.zeros(len(masses), dtype=np.int64)
        rows = np.arange(len(masses))
        for level in reversed(self.levels):
            ends = level[nodes].cumsum(1)
            # By rounding a mass may reach the end of a node: it then belongs to the last child that has a share.
            masses = np.minimum(masses, np.nextafter(ends[:, -1], 0))
            children = (ends <= masses[:, None]).sum(1)
            masses = masses - np.where(children, ends[rows, children - 1], 0.0)
            nodes = nodes * FAN + children
        return np.asarray(nodes)
