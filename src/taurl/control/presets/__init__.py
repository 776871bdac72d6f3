"""Tuned settings, one YAML file per algorithm and environment: `presets/ppo/CartPole-v1.yaml`. Imports no torch.

A file with the name of a namespace is for every environment in it that has none of its own: `presets/ppo/ALE.yaml`.
"""

from pathlib import Path


def preset(algorithm: str, env: str | None) -> Path | None:
    """The file for this algorithm and environment, or None where there is none."""
    if env is None:
        return None
    folder = Path(__file__).parent / algorithm
    name = env.rpartition(":")[2]  # of module:id
    names = [name.replace("/", "_"), *name.split("/")[:-1], *(["ALE"] if name.endswith("NoFrameskip-v4") else [])]
    return next((folder / f"{name}.yaml" for name in names if (folder / f"{name}.yaml").exists()), None)
