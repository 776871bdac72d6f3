"""Rows for both sides, as token ids where the trainers take them, so that neither's reading of a chat counts."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
MISSING = "GSM8K is not at {}: give the folder that holds train.jsonl and test.jsonl with --data"

Row = dict[str, Any]


def read(folder: Path, name: str, count: int) -> list[Row]:
    """The first rows of a file of GSM8K. Raises: SystemExit, one line, if it is not there."""
    path = folder / name
    if not path.is_file():
        raise SystemExit(MISSING.format(folder))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def completion_row(tokenizer: Any, question: str, answer: str) -> Row:
    """Prompt and completion as the chat template writes them; the labels of the prompt are −100."""
    prompt, ids = conversation(tokenizer, question, answer)
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def conversation(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, up to where the assistant begins to speak, and of what it says to its turn's end."""
    before = tokenizer.apply_chat_template(user(question), tokenize=False, add_generation_prompt=True)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, answer)]
    return encoded[0], [*encoded[1], tokenizer.eos_token_id]


def pair_row(tokenizer: Any, pair: Row) -> Row:
    """A pair as conversations, and as token ids."""
    said = {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
    prompt, chosen = conversation(tokenizer, pair["prompt"], pair["chosen"])
    _, rejected = conversation(tokenizer, pair["prompt"], pair["rejected"])
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {"prompt": user(pair["prompt"]), **said, **ids}


def words(pair: Row) -> Row:
    """The columns that taurl reads."""
    return {name: pair[name] for name in ("prompt", "chosen", "rejected")}


def pair_ids(pair: Row) -> Row:
    """The columns that TRL's DPOTrainer makes of them."""
    return {name: pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def whole_ids(pair: Row) -> Row:
    """The columns that TRL's RewardTrainer makes of them."""
    return {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}
