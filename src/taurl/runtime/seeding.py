"""Random states: set from one seed, and carried by the checkpoint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The global generators' states as plain values and tensors."""
    version, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        # Asking a GPU that is not in use would start a context on it, some hundred megabytes.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the global generators back where `random_states` found them."""
    random.setstate(states["python"])
    version, keys, *rest = states["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):  # there may be fewer than before
            torch.cuda.set_rng_state(state, device)


@contextmanager
def drawn_apart(seed: int) -> Iterator[None]:
    """What is drawn within follows from this seed, and leaves the global generators as they were."""
    before = random_states()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random_states(before)
