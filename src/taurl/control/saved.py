"""Reading a saved policy of whichever kind."""

import json
from pathlib import Path
from typing import Any

from taurl.control import action_values, tables
from taurl.control.action_values import ValuePolicy
from taurl.control.policies import FACTS, Policy, policy_folder
from taurl.control.tables import TablePolicy

KINDS = {tables.KIND: TablePolicy, action_values.KIND: ValuePolicy}


def load_policy(directory: str | Path) -> Any:
    """What `save` wrote to a folder; of a run directory, its `final/`."""
    folder = policy_folder(directory)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    kind: Any = KINDS.get(facts.get("kind"), Policy)
    return kind.load(folder)
