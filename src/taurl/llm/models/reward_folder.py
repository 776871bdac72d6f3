"""What a reward model's folder says beside the weights: how conversations were written for it, and its scale."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from taurl.llm.settings import ConversationSettings
from taurl.runtime.config import describe
from taurl.runtime.errors import InputError, reason

NAME = "taurl_reward.json"


class RewardNote(ConversationSettings):
    """Read by `model:FOLDER` and `taurl llm score`; a folder without it has the defaults."""

    mean: float | None = None
    """Of the scores of training completions."""
    deviation: float | None = None
    """Their standard deviation."""
    pad_token_id: int | None = None
    """The token that pooling passes over: an adapter's folder has no config.json that would say it."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The note in a folder. Raises: InputError if it is damaged."""
        path = folder / NAME
        if not path.is_file():
            return cls()
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values)
        except ValidationError as error:
            raise InputError(f"{path}: {describe(error)}") from error
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from error

    @classmethod
    def for_model(cls, model: Any) -> tuple[Path, Self]:
        """The folder of a model given by name or as an object, and the note in it; an empty one where it has no folder.

        Raises: InputError for a name that resolves to nothing, or a damaged note.
        """
        from taurl.llm.models.loading import origin, resolve_model

        name = model if isinstance(model, str) else origin(model)
        folder = Path(resolve_model(name) if isinstance(model, str) else name)
        return folder, cls.of(folder) if name else cls()

    def changed(self, settings: dict[str, Any]) -> Self:
        """With other settings. Raises: InputError for a value that is none."""
        try:
            return type(self)(**(self.model_dump() | settings))
        except ValidationError as error:
            raise InputError(describe(error)) from error

    def write(self, folder: Path) -> None:
        """Put the note into a folder."""
        (folder / NAME).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
