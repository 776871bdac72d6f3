"""Tuned settings, one YAML file per algorithm and environment: `presets/ppo/CartPole-v1.yaml`. Imports no torch."""

from pathlib import Path


def preset(algorithm: str, env: str | None) -> Path | None:
    """The file for this algorithm and environment, or None where there is none."""
    if env is None:
        return None
    path = Path(__file__).parent / algorithm / f"{env.replace('/', '_')}.yaml"
    return path if path.exists() else None
