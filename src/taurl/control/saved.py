"""Reading a saved policy of whichever kind: `taurl.control.load`."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from taurl.control import action_values, tables
from taurl.control.action_values import ValuePolicy
from taurl.control.policies import Policy
from taurl.control.policy_files import FACTS, policy_folder
from taurl.control.tables import TablePolicy
from taurl.runtime.errors import InputError, one_line

KINDS = {tables.KIND: TablePolicy, action_values.KIND: ValuePolicy}


def load(directory: str | Path) -> Any:
    """The policy that `save` wrote to a folder; of a run directory, that of its `final/`.

    It acts (`predict` for one observation, `act` for a batch), and knows its environment (`facts`). To train on, resume
    the run instead.

    Raises: InputError where there is no policy, or none that can be read.
    """
    folder = policy_folder(directory)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kind: Any = KINDS.get(facts.get("kind"), Policy)
        return kind.load(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the policy there cannot be read ({one_line(error)})") from error
