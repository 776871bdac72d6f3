"""Settings of the commands that use a policy without training it. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from taurl.runtime.config import Settings


class EvaluateConfig(Settings):
    """Play whole episodes with the policy of a run and report their returns."""

    episodes: int = Field(100, ge=1)
    """How many."""
    sampled: bool = False
    """Draw actions instead of taking the most likely ones."""
    seed: int = Field(10_000, ge=0)
    """Of the environments."""


class PlayConfig(Settings):
    """Watch the policy of a run: in a window, or as a video."""

    video: Path | None = None
    """Write the episodes to this .mp4 or .gif file."""
    render: Literal["human"] | None = None
    """Show them in a window."""
    episodes: int = Field(1, ge=1)
    """How many."""
    sampled: bool = False
    """Draw actions instead of taking the most likely ones."""
    seed: int = Field(10_000, ge=0)
    """Of the environment."""
