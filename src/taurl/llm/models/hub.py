"""How models and data sets deal with the Hugging Face hub: ask once, fail fast, fall back to what is cached."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from taurl.runtime.errors import one_line

PROBE_TIMEOUT = 10.0  # seconds; the libraries below retry an unreachable hub for half a minute, per file


def hub_problem(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub does not offer the repository `name`, in a few words, or None if it does. Asks once."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=PROBE_TIMEOUT)
    except HFValidationError:
        return "this is not a possible hub name (owner/name)"
    except GatedRepoError:
        return "its owner asks for consent first: accept on its hub page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has no such repository, or it is private (`hf auth login`)"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # the HTTP client's own classes changed between versions of huggingface_hub
        return f"the hub cannot be reached: {one_line(error)}"
    return None


@contextmanager
def hub_cache_only() -> Iterator[None]:
    """Inside, the Hugging Face libraries read what they have cached and try no connection."""
    import datasets.config
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no loading bars and reports errors only; both are as before afterwards."""
    from transformers.utils import logging as notes

    verbosity, bar = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity(logging.ERROR)
    notes.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft's use of it
            yield
    finally:
        notes.set_verbosity(verbosity)
        if bar:
            notes.enable_progress_bar()  # type: ignore[no-untyped-call]
