"""From what a user writes to a reward function: `package.module:function`, `my_file.py:function`, a shipped name."""

import ast
import difflib
import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from taurl.llm.rewards.model import PREFIX, as_factory
from taurl.runtime.config import did_you_mean
from taurl.runtime.errors import InputError, one_line

SHIPPED_MODULE = "taurl.llm.rewards"
SPEC = re.compile(r"(?:(?P<where>.+?):)?(?P<name>[A-Za-z_]\w*)(?P<call>\(.*\))?", re.DOTALL)
FORMS = "expected package.module:function, path/to/file.py:function or one of"


@dataclass(frozen=True)
class Spec:
    """Where a reward function is found. Plain values: another process can load the same function from it."""

    where: str
    """A module name, or the absolute path of a `.py` file."""
    name: str
    settings: dict[str, Any] | None
    """Keyword arguments for a factory, where the spec ends in parentheses."""


def parse(spec: str) -> Spec:
    """Split a written spec.

    Args:
        spec: `package.module:function`, `path/to/file.py:function`, a shipped name such as `last_number`, or any of
            these with settings in parentheses (`overlong_penalty(max_tokens=64, buffer=16)`: the function is called
            with them and must return the reward function; literals only, nothing is evaluated).
    Raises: InputError if it has none of these forms.
    """
    if spec.strip().startswith(PREFIX):
        spec = as_factory(spec)
    match = SPEC.fullmatch(spec.strip())
    if match is None:
        raise InputError(f"reward function {spec!r} not understood: {FORMS} {', '.join(shipped_names())}")
    where, name, call = match.group("where", "name", "call")
    if where is None:
        where = SHIPPED_MODULE
        if name not in shipped_names():
            raise InputError(
                f"no reward function {name!r} ships with taurl{_closest(name, shipped_names())}; "
                f"one of your own needs its place: my_file.py:{name} or my_package.my_module:{name}"
            )
    elif where.endswith(".py"):
        where = str(Path(where).expanduser().absolute())
    return Spec(where, name, None if call is None else _literal_settings(name, call))


def load(spec: Spec | Callable[..., Any]) -> Callable[..., Any]:
    """The reward function itself, or a callable as it is.

    Raises: InputError where nothing usable is found, or the user's file fails when it is executed.
    """
    if not isinstance(spec, Spec):
        return _checked(spec, callable_name(spec), f"reward function {callable_name(spec)!r}")
    found = _found(spec.where, spec.name, "reward function")
    label = f"reward function {spec.name!r} in {spec.where}"
    if spec.settings is None:
        return _checked(found, spec.name, label)
    known = parameters_of(found)  # None too where there is nothing to call: the call will tell
    if known and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for name in spec.settings:
            if name not in known:
                raise InputError(f"{label} has no setting {name}{did_you_mean(name, known)}")
    try:
        made = found(**spec.settings)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{label} cannot be made with {spec.settings}: {explain(error)}") from error
    return _checked(made, spec.name, f"what {spec.name}(…) of {spec.where} returned")


def load_callable(spec: str, what: str) -> Callable[..., Any]:
    """What `package.module:name` or `path/to/file.py:name` names, where it is no reward function.

    Args:
        what: it is to be, for the errors.
    Raises: InputError where nothing usable is found.
    """
    match = SPEC.fullmatch(spec.strip())
    if match is None or match["where"] is None or match["call"] is not None:
        raise InputError(f"{what} {spec!r} not understood: expected package.module:name or path/to/file.py:name")
    where = match["where"]
    where = str(Path(where).expanduser().absolute()) if where.endswith(".py") else where
    found: Callable[..., Any] = _found(where, match["name"], what)
    if not callable(found):
        raise InputError(f"{what} {match['name']!r} in {where} is a {type(found).__name__}, expected something to call")
    return found


def _found(where: str, name: str, what: str) -> Any:
    """What a module, or a `.py` file, has by this name."""
    module = _file_module(Path(where), what) if where.endswith(".py") else _module(where, what)
    if getattr(module, name, None) is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(f"no {what} {name!r} in {where}{_closest(name, names)}")
    return getattr(module, name)


def callable_name(function: Any) -> str:
    """A name for the metrics of a function, of a partial (that of its function) or of an object (that of its class)."""
    name = getattr(getattr(function, "func", function), "__name__", None) or type(function).__name__
    return name.strip("<>")


def shipped_names() -> tuple[str, ...]:
    names: tuple[str, ...] = importlib.import_module(SHIPPED_MODULE).SHIPPED
    return names


def explain(error: BaseException) -> str:
    """The type and message of an exception as one line of readable length."""
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))


def line_in(error: BaseException, file: str) -> int | None:
    """The line of `file` that an exception came through last (or that does not parse); None if it did not."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def _literal_settings(name: str, call: str) -> dict[str, Any]:
    try:
        tree = ast.parse(name + call, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"settings of reward function {name!r} not understood: {call}; expected literal keyword arguments, "
            "for example (max_tokens=64, buffer=16)"
        ) from error


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function by name; None of one written in C that tells nothing about them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _checked(function: Any, name: str, label: str) -> Callable[..., Any]:
    if not callable(function):
        raise InputError(f"{label} is a {type(function).__name__}, expected a function")
    parameters = parameters_of(function)
    if parameters is not None and not any(
        p.kind is p.VAR_KEYWORD or p.name in ("completions", "completion_ids") for p in parameters.values()
    ):
        settings = ", ".join(f"{name}=…" for name in parameters)
        raise InputError(
            f"{label} accepts no `completions`, so it is not a reward function; "
            f"if it makes one, give its settings: {name}({settings})"
        )
    accepted: Callable[..., Any] = function
    return accepted


def _module(name: str, what: str) -> ModuleType:
    try:
        importable(Path.cwd())
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            advice = "install it, or give the file: path/to/file.py:name"
            raise InputError(f"no module {error.name!r} for the {what} from {name!r}; {advice}") from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"importing {name} failed at {frame.filename}:{frame.lineno}: {explain(error)}") from error


def _file_module(path: Path, what: str) -> ModuleType:
    """Execute a user's file as a module; once for several functions of it, again when the file has changed.

    It may import what lies beside it, as a script may.
    """
    if not path.is_file():
        raise InputError(f"{what}: file {path} not found")
    digest = hashlib.sha256(f"{path}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"taurl_reward_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up here while it is executed
    try:
        importable(path.parent)
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)  # leaves no __pycache__ beside it
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{what}: file {path} failed at line {line_in(error, str(path))}: {explain(error)}") from error
    return module


def importable(folder: Path) -> None:
    """Let modules of a folder be imported from now on, behind those installed: a function may import when called."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _closest(name: str, names: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f" (did you mean {' or '.join(close)}?)"
    return f" (there is {', '.join(sorted(names)) or 'no function'})"
