"""Settings from the command line: a config's fields are its options (tyro), on top of a YAML file's values."""

import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import tyro
import yaml
from pydantic import BaseModel, ValidationError

from taurl.runtime.config import describe, read_yaml, validated
from taurl.runtime.errors import InputError
from taurl.runtime.other_names import names_here

Config = TypeVar("Config", bound=BaseModel)

RESUMING = "\n    --resume RUN goes on with the run in that directory."

DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML takes 1e-2 for a text

registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _pairs(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Dictionaries as `name=value name=value`, the values read as YAML scalars."""
    if get_origin(info.type) is not dict:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE …]",
        instance_from_str=lambda words: dict(map(pair, words)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    )


def pair(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise ValueError(f"{word!r} is not NAME=VALUE")
    try:
        return name, float(value) if NUMBER.fullmatch(value) else yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return name, value  # a word that YAML has another use for, or a date that there is not


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of the words."""
    left, value, rest = list(words), None, []
    while left:
        word = left.pop(0)
        if word == name:
            if value is not None:
                raise InputError(f"{name} is there twice: give it once")
            if not left or not left[0] or left[0].startswith("--"):
                raise InputError(f"{name} needs a value")
            value = left.pop(0)
        elif word.startswith(f"{name}="):
            left.insert(0, word.partition("=")[2])
            left.insert(0, name)
        else:
            rest.append(word)
    return value, rest


def parse(
    config: type[Config], words: Sequence[str], *, prog: str, default: Config | None = None, more: str = ""
) -> Config:
    """The config that the options describe, on top of `--config FILE` or of `default`.

    Args:
        more: further lines of the help, about what the command takes beside its settings.

    Raises: InputError in one line for options that do not fit; SystemExit(0) after --help.
    """
    refuse_bare(words, config)
    refuse_other_names(words, config)
    words = with_flags(words, config)
    file, words = take_option(words, "--config")
    refuse_twice(words, config)
    if file is not None:
        below = default.model_dump() if default is not None else {}
        default = validated(config, below | read_yaml(Path(file)), source=file)
    for field in config.model_fields.values():  # tyro would keep the line breaks of the source
        field.description = " ".join((field.description or "").split())
    said = "\n\n    --config FILE reads settings from YAML; options given beside it win." + more
    help_text = inspect.cleandoc((config.__doc__ or "").rstrip() + said)
    errors = io.StringIO()
    try:
        # tyro draws its errors as boxes as wide as the terminal; a wide one keeps their lines whole.
        with contextlib.redirect_stderr(errors), wide_unless_help(words):
            return tyro.cli(
                config,
                args=list(words),
                prog=prog,
                description=help_text,
                default=default if default is not None else config(),
                registry=registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{one_line(stop, errors.getvalue())}; see {prog} --help") from stop


@contextlib.contextmanager
def wide_unless_help(words: Sequence[str]) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def one_line(stop: BaseException, box: str) -> str:
    """What a rejection says: the validation error behind it, or else the text of tyro's box without its frame."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValidationError):
            return describe(cause)
        cause = cause.__context__
    kept = []
    # The first line is the title. The frame is of lines, or of blanks and dashes where the output is not UTF-8.
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip("│╰╯─- ") and line[1:].rstrip("│ ")
        if "helptext" in text:  # what follows repeats the help
            break
        if text and not text.startswith(" " * 9):
            kept.append(text.strip())
    return plainer(" ".join(kept)) or "the options do not fit"


def plainer(text: str) -> str:
    """tyro's words for a value of the wrong kind, as a person would say it."""
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is no whole number, such as 100000", text)
    neither = re.search(r"no type matching \{?None\}?\|(\w+) could be instantiated from \['(.*?)'\]", text)
    if neither:
        text = f"{text[: neither.start()]}{neither[2]!r} is neither None nor of type {neither[1]}"
    return text


def refuse_other_names(words: Sequence[str], config: type[BaseModel]) -> None:
    """Raises: InputError for what another library calls one of the settings, naming it."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        known = config.model_fields
        if word.startswith("--") and name not in known and (here := names_here(name, known)):
            meant = " and ".join("--" + setting.replace("_", "-") for setting in here)
            raise InputError(f"unknown option {word}; did you mean {meant}?")


def with_flags(words: Sequence[str], config: type[BaseModel]) -> list[str]:
    """The words with `--flag True` and `--flag False` as what tyro has for them, `--flag` and `--no-flag`."""
    flags = (name for name, field in config.model_fields.items() if field.annotation is bool)
    switches = {"--" + name.replace("_", "-") for name in flags}
    found: list[str] = []
    left = list(words)
    while left:
        word, equals, value = left.pop(0).partition("=")
        if (flag := word.replace("_", "-")) not in switches:
            found.append(word + equals + value)
            continue
        if not equals and left and left[0].lower() in ("true", "false"):
            value = left.pop(0)
        found.append(flag.replace("--", "--no-", 1) if value.lower() == "false" else flag)
        if value.lower() not in ("", "true", "false"):
            raise InputError(f"{word} is {value!r}, expected True or False")
    return found


def refuse_twice(words: Sequence[str], config: type[BaseModel]) -> None:
    """Raises: InputError for an option of several values that is there twice: tyro would drop what the first one says.

    Of others the last one counts, as it does everywhere, so that what a script says can be said otherwise behind it.
    """
    fields = config.model_fields.items()
    several = {name for name, field in fields if isinstance(field.get_default(call_default_factory=True), tuple | dict)}
    names = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    if twice := next((name for name in names if name in several and names.count(name) > 1), None):
        raise InputError(f"--{twice.replace('_', '-')} is there twice: give it once, its values one after the other")


def refuse_bare(words: Sequence[str], config: type[BaseModel]) -> None:
    """Raises: InputError when the words begin with one that is no option, naming the option it may be meant for."""
    if words and not words[0].startswith("-"):
        is_data = words[0].endswith(DATA_ENDINGS) or words[0].startswith("reasoning-gym:")
        likely = ("env", *(("dataset", "prompts") if is_data else ()), "model")
        meant = next((f"; did you mean --{name} {words[0]}?" for name in likely if name in config.model_fields), "")
        raise InputError(f"{words[0]!r} stands where an option was expected{meant}")
