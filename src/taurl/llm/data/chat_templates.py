"""Chat templates by name or file, the tokens they need, and the stop tokens that go with the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.data.chat import after_answer, plain_ids, special_ids, stop_token_ids
from taurl.llm.models.embedded import NAME
from taurl.llm.models.loading import load_tokenizer
from taurl.runtime.errors import InputError, one_line, reason

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
CHATML = "chatml"
TOKEN = re.compile(r"<[|｜][^<>]+[|｜]>|</s>|<end_of_turn>")  # as templates write what ends a turn
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEXT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def set_chat_template(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> list[int]:
    """Give the tokenizer a chat template, and where ChatML's tokens are new, tokenizer and model those.

    Args:
        name: `chatml`, a file (Jinja, as chat_template.jinja in a model's folder), or a model in a local folder (or
            the embedded one), whose template is taken.
        model: None where there is only a tokenizer to look at.
    Returns: ids of the tokens that are new, none in most cases.
    Raises: InputError for another name, or a file that is no template.
    """
    if name == CHATML:
        tokenizer.chat_template = CHATML_TEXT
        return _add_tokens(CHATML_TOKENS, tokenizer, model)
    path = Path(name).expanduser()
    if path.is_file():
        tokenizer.chat_template = _template_file(path)
    elif path.is_dir() or name.lower() == NAME:
        tokenizer.chat_template = load_tokenizer(name).chat_template
        if not tokenizer.chat_template:
            raise InputError(f"chat_template is {name!r}: this model has none")
    else:
        raise InputError(f"chat_template is {name!r}; expected {CHATML}, a template file or a model's folder")
    end = TOKEN.match(after_answer(tokenizer))
    if end and plain_ids(end[0], tokenizer)[0] not in special_ids(tokenizer):
        raise InputError(
            f"chat_template {name}: it ends a turn with {end[0]}, which is no token of this model, so that nothing "
            f"would end one; give a template of the model's family, or {CHATML}, whose tokens are added"
        )
    return []


def _template_file(path: Path) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8")
        # The tag `generation` is an extension of transformers; without it the rest is what jinja checks here.
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template {path}: cannot be read: {reason(error)}") from error
    except TemplateSyntaxError as error:
        raise InputError(f"chat_template {path}:{error.lineno}: not a Jinja template: {error.message}") from error
    return text


def _without_generation(text: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)


def _add_tokens(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> list[int]:
    """Make these special tokens of the tokenizer, and make room for the new ones among them in the model."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    new = [int(cast(int, tokenizer.convert_tokens_to_ids(token))) for token in tokens if token not in known]
    if new and model is not None:
        make_room(new, tokenizer, model)
    return new


def make_room(new: Sequence[int], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give the model embeddings of the tokenizer's new tokens.

    A new token's embedding is the mean of all others, and so is its row of the output layer: its logit is then the mean
    logit, and the token is no more probable than an average one. A row near 0, the usual start, has a logit near 0,
    which is above all others in a model whose logits are negative, and the token would be sampled everywhere
    (Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models).
    """
    old = sorted(set(tokenizer.get_vocab().values()) - set(new))
    plain: Any = model
    if max(new) >= plain.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):  # its random rows are overwritten below; draw them from nowhere
            plain.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            for values in (layer.weight, getattr(layer, "bias", None)) if layer is not None else ():
                if values is not None:
                    values[list(new)] = values[old].double().mean(dim=0).to(values.dtype)


def write_stop_tokens(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer (`stop_token_ids`), which are also written to the model's generation_config.

    So that whoever loads the model from its folder stops where it was taught to.
    """
    stops = stop_token_ids(cast(PreTrainedModel, model), tokenizer)
    settings = getattr(model, "generation_config", None)
    if settings is not None and stops:
        settings.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
        _mend(settings)
    return stops


def _mend(settings: GenerationConfig) -> None:
    """Make settings ones that transformers will write: it loads others, and refuses to save them once they changed.

    Published are temperatures without a word on sampling, which is meant then, and beside greedy decoding, which they
    do not concern. Raises: InputError for what is wrong otherwise.
    """
    try:
        settings.validate(strict=True)
        return
    except ValueError:
        if settings.do_sample is None:
            settings.do_sample = True
        elif not settings.do_sample:
            for name in OF_SAMPLING:
                setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise InputError(
            f"the model's generation_config cannot be written again: {one_line(error)}; mend it"
        ) from error
