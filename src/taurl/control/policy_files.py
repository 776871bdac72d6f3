"""What every saved policy has: a folder with its tensors, and with facts by which it is made again."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from taurl.control.spaces import described
from taurl.runtime.errors import InputError

WEIGHTS, FACTS = "policy.safetensors", "policy.json"


def facts_of(environments: Any, config: Any, **own: Any) -> dict[str, Any]:
    """What a policy knows of where it was trained, and what else it is made of."""
    return {
        "env": config.env,
        "env_args": config.env_args,
        "vectorization": config.vectorization,
        "observation_space": described(environments.observation_space),
        "action_space": described(environments.action_space),
        **own,
    }


def write_policy(directory: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a policy to a folder, which is made."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_policy(directory: str | Path, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts that `write_policy` wrote; of a run directory those of its `final/`.

    Args:
        kind: which the facts are to name; None where they name none.
    Raises: InputError when there is no policy of this kind.
    """
    folder = policy_folder(directory)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts.get("kind") != kind:
        raise InputError(f"{folder}: the policy there is of another kind; read it with taurl.control.load")
    return load_file(folder / WEIGHTS), facts


def policy_folder(directory: str | Path) -> Path:
    """The folder that a policy was saved to: this one, or `final/` of a run. Raises: InputError when there is none."""
    directory = Path(directory)
    if not directory.exists():
        raise InputError(f"{directory}: there is no such folder; expected a run's, or one that a policy was saved to")
    for folder in (directory, directory / "final"):
        if (folder / FACTS).exists():
            return folder
    unfinished = (directory / "config.yaml").exists()
    way = f"the run has not ended: go on with --resume {directory}" if unfinished else "a run writes it to final/"
    raise InputError(f"{directory}: no policy here: {FACTS} is missing ({way})")
