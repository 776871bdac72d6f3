"""Log-probabilities of a data set's answers under a reference, computed once and kept on disk.

They lie in the user's cache, so that runs which differ in their loss or learning rate share them. The key of a file
holds what its numbers follow from, rounding included: weights, tokens, and how rows go through the model together.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from taurl.llm.models.embedded import cache_folder
from taurl.llm.models.heads import causal_lm
from taurl.runtime.errors import RunError
from taurl.runtime.files import write_whole, writing

SECONDS_BETWEEN_SAVES = 20
GROUP = "logprobs"


def model_hash(model: Any) -> str:
    """SHA-256 of a model's weights, as they lie in memory, and of its config; those of its adapters count as well."""
    plain: Any = causal_lm(model)
    found = hashlib.sha256()
    config = plain.config.to_dict()
    config.pop("_name_or_path", None)
    found.update(json.dumps(config, default=str, sort_keys=True).encode())
    if hasattr(model, "peft_config"):
        for adapter, settings in sorted(model.peft_config.items()):
            for key, value in sorted(vars(settings).items()):
                if key not in ("base_model_name_or_path", "revision"):  # where the base lies, whose weights follow
                    found.update(f"{adapter} {key} {sorted(value) if isinstance(value, set) else value}".encode())
        found.update(str(model.active_adapter).encode())
    for name, tensor in sorted(plain.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class ReferenceCache:
    """Log-probabilities [R, K] of all answers of a data set; NaN where they are not known yet.

    Args:
        key: what the numbers follow from, as JSON holds it.
        shape: R, K.
    """

    def __init__(self, key: Any, shape: tuple[int, int], dtype: torch.dtype):
        text = json.dumps(key, default=str, sort_keys=True)
        self.path = cache_folder() / "reference" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        self.values = torch.full(shape, torch.nan, dtype=dtype)
        self._saved = time.monotonic()
        try:
            stored = load(self.path.read_bytes())[GROUP]
        except (OSError, SafetensorError, KeyError):  # none yet, or damaged: computed again
            return
        if stored.shape == self.values.shape and stored.dtype == dtype:
            self.values = stored

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that are not known, each once."""
        each = list(dict.fromkeys(rows))
        unknown: list[bool] = self.values[each].isnan().any(1).tolist()
        return [row for row, is_unknown in zip(each, unknown, strict=True) if is_unknown]

    def put(self, rows: Sequence[int], logprobs: Tensor) -> bool:
        """Take in log-probabilities [n, K]. Now and then all are written, so that little is lost: whether they were."""
        self.values[list(rows)] = logprobs.to("cpu", self.values.dtype)
        due = time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES
        if due:
            self.save()
        return due

    def save(self) -> str | None:
        """Write the file, whole. Returns: why it could not be written; the values are here all the same."""
        self._saved = time.monotonic()
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, save({GROUP: self.values}))
        except RunError as error:
            return str(error)
        return None
