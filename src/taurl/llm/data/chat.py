"""How a prompt becomes token ids, and where a completion ends.

A prompt is a string or a list of messages {"role", "content"}. Nothing here decodes and encodes again.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from taurl.runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message]
PromptFormat: TypeAlias = Literal["auto", "chat", "text"]
"""What a string prompt is: `auto`, one message of the user where the tokenizer has a chat template and raw text where
it has none; `chat`, always a message; `text`, always raw (what TRL makes of a string). A list of messages always goes
through the template."""

# Templates may know others; a role that is nearly one of these is a slip, which a template would write as it stands.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MARKER = "taurl"  # a word that no template writes, trims or escapes
ANSWER_MARKER = "taurlanswer"
JOINED_ARGUMENTS = re.compile(r"""\barguments['"]?\]?\s*[+~]""")  # in a template that writes strings one after another
THINKING = ("reasoning_content", "reasoning", "thinking")  # names of what a message holds of it


def prompt_problem(prompt: object, name: str = "the prompt") -> str | None:
    """What is wrong with a prompt, in a few words that fit after "row 3: ", or None if it is well formed."""
    if isinstance(prompt, str):
        return None if prompt.strip() else f"{name} is an empty string"
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        return f"{name} is {shown(prompt)}; expected a string or a list of messages"
    if not prompt:
        return f"{name} is an empty list of messages"
    for position, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping):
            return f"message {position} is {shown(message)}; expected {{'role': …, 'content': …}}"
        for key in ("role", "content"):
            if key == "content" and message.get("tool_calls") and message.get(key) is None:
                continue  # a call of a tool needs no words
            if key not in message:
                return f"message {position} has no '{key}' (it has {', '.join(map(str, message)) or 'nothing'})"
            if not isinstance(message[key], str):
                return f"message {position} has {shown(message[key])} as '{key}'; expected a string"
        role = message["role"]
        another = role.startswith(ROLES)  # one of these, or a template's own kind of it: tools, user_2
        if not another and (meant := difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)):
            return f"message {position} has the role {role!r}; did you mean {meant[0]!r}?"
    return None


def says_nothing(completion: object) -> bool:
    """Whether it is a string without words, which a sampler may well have drawn."""
    return isinstance(completion, str) and not completion.strip()


def shown(value: object) -> str:
    """A value and its type, short enough for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:59] + '…'} ({type(value).__name__})"


def prompt_text(prompt: Prompt) -> str:
    """The prompt as text to show and to compare: a single message of the user reads like the string it holds."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return cast(str, prompt[0]["content"])
    words = (message.get("content") or message.get("tool_calls") or "" for message in prompt)
    return "\n".join(f"{message['role']}: {said}" for message, said in zip(prompt, words, strict=True))


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt, as in TRL: text for a string, a message of the assistant for messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    prompt_format: PromptFormat = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    where: str = "prompt",
) -> list[int]:
    """The token ids that a completion of `prompt` continues.

    Messages end with the template's opening of the assistant's turn; if the last message is the assistant's, it is
    continued instead. `system_prompt` is put before a prompt that has no system message; a prompt that has one keeps
    its own. Raw text gets the beginning-of-sequence token where the tokenizer adds one, and never two or an end of
    sequence.

    Args:
        chat_template_kwargs: handed to the chat template (`enable_thinking=False` for some models).
        where: where the prompt stands, for the error message only.
    Raises: InputError for a malformed prompt, or where a chat template is needed and missing or refuses the messages.
    """
    if problem := prompt_problem(prompt):
        raise InputError(f"{where}: {problem}")
    messages = as_messages(prompt, tokenizer, system_prompt=system_prompt, prompt_format=prompt_format)
    if messages is None:
        if system_prompt is not None:
            raise InputError(
                "system_prompt needs a chat template, and these prompts are raw text; put it into the prompts"
            )
        return encode_text(cast(str, prompt), tokenizer)
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages need a chat template, and this tokenizer has none; give strings instead, or a model "
            "that taurl llm sft has trained on messages, which then has one"
        )
    options = dict(chat_template_kwargs or {})
    require_all_read(tokenizer.get_chat_template(tools=options.get("tools")), messages, options, f"{where}: ")
    continued = messages[-1]["role"] == "assistant"
    with template_refusals(f"{where}: "):
        ids = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **options,
        )
    return list(cast(list[int], ids))


def as_messages(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None, prompt_format: PromptFormat
) -> list[dict[str, Any]] | None:
    """The prompt as messages, with the system prompt before them; None where it is raw text."""
    if isinstance(prompt, str):
        if prompt_format == "text" or (prompt_format == "auto" and not tokenizer.chat_template):
            return None
        prompt = [{"role": "user", "content": prompt}]
    return for_template(with_system_prompt(prompt, system_prompt), tokenizer)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[dict[str, Any]]:
    """The messages (new dicts), with the system prompt before them where they have no system message of their own."""
    copies = [dict(message) for message in messages]
    if system_prompt is not None and all(message["role"] != "system" for message in copies):
        copies.insert(0, {"role": "system", "content": system_prompt})
    return copies


def for_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Copies of messages, the arguments of their calls in the one of two forms that the chat template takes.

    Most templates write an object as JSON themselves, and would escape a string once more; some (DeepSeek's) join
    strings, and take no object. Data sets have either, as servers' APIs do.
    """
    joined = JOINED_ARGUMENTS.search(str(tokenizer.chat_template)) is not None
    copies = [dict(message) for message in messages]
    for copy in copies:
        if isinstance(calls := copy.get("tool_calls"), list | tuple):
            copy["tool_calls"] = [_with_arguments(call, joined) for call in calls]
    return copies


def _with_arguments(call: Any, joined: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], joined)}
    arguments = call.get("arguments")
    if joined and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) and not joined else None
    except ValueError:  # free text, which a template writes as it is
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, Mapping) else call


def require_all_read(
    template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], where: str = ""
) -> None:
    """Refuse tools, calls of them, and thinking that a chat template would pass over without a word.

    Raises: InputError, beginning with `where`.
    """
    given = {"tools": bool(options.get("tools"))}
    given |= {name: any(message.get(name) for message in messages) for name in ("tool_calls", *THINKING)}
    for name in filter(given.__getitem__, given):
        known = THINKING if name in THINKING else (name,)  # transformers takes one kind of thinking for another
        if not any(each in template for each in known):
            raise InputError(
                f"{where}the row has {name}, which the model's chat template does not read, so that the model would "
                "not see it: give a chat template that does, or leave it out of the data"
            )


def require_known(ids: Sequence[int], known: int | None, where: str = "") -> None:
    """Raises: InputError, beginning with `where`, for a token beyond those known to the model (None: not looked at)."""
    if known is not None and ids and max(ids) >= known:
        raise InputError(
            f"{where}it has token {max(ids)}, and the model knows {known} tokens: is the tokenizer that of another "
            "model, or were tokens added to it alone?"
        )


@contextmanager
def template_refusals(before: str = "") -> Iterator[None]:
    """Inside, what a chat template raises becomes an InputError; `before` stands before its words."""
    try:
        yield
    except Exception as error:  # a template raises what it likes, jinja2's errors most often
        raise InputError(f"{before}the chat template refuses the messages: {' '.join(str(error).split())}") from error


def following_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    last_token: int,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids that continue a conversation after an answer: end of turn, new messages, the next turn's opening.

    They go behind the ids that are there. Rendering the whole conversation again could rewrite its earlier turns
    (templates drop thinking blocks), and what was sampled would not be what is trained.

    Args:
        messages: what the answer was met with, at least one.
        last_token: the answer's last; where it ends the turn already, the end is not said twice.
    Raises: InputError where the template is missing or refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("several turns need a chat template, and this tokenizer has none")
    answered = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": ANSWER_MARKER}]
    whole = for_template([*answered, *messages], tokenizer)
    with template_refusals():
        text = cast(
            str,
            tokenizer.apply_chat_template(
                whole, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
            ),
        )
    tail = text[text.find(ANSWER_MARKER) + len(ANSWER_MARKER) :]
    ids = plain_ids(tail, tokenizer)
    return ids[1:] if ids[:1] == [last_token] else ids


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Raw text as token ids, left open: begun as the tokenizer begins a text, never twice, and not ended."""
    ids = plain_ids(text, tokenizer)
    begin = [tokenizer.bos_token_id]
    # Of what the tokenizer puts around a text only its beginning is wanted: a text that was closed has no continuation.
    if tokenizer(text)["input_ids"][:1] == begin and ids[:1] != begin:
        return begin + ids
    return ids


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion, ascending.

    Those of generation_config, the tokenizer's own, and the one that ends the assistant's turn, which is read off the
    chat template since a model may come with a generation_config that forgets it.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {configured} if isinstance(configured, int) else set(configured or ())
    return tuple(sorted(found | turn_ends(tokenizer)))


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end of sequence, and the token that ends the assistant's turn, as far as the tokenizer tells."""
    tail = after_answer(tokenizer)
    ids = plain_ids(tail, tokenizer) if tail else []
    ends = {ids[0]} if ids and ids[0] in special_ids(tokenizer) else set()
    return frozenset(ends | {cast(int, end) for end in [tokenizer.eos_token_id] if end is not None})


def after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind an answer, without white space around it; empty where it writes none."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": MARKER}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turn, tokenize=False))
    except Exception:  # a template for another shape of conversation
        return ""
    return text[text.rfind(MARKER) + len(MARKER) :].strip()


def end_of_answer(
    ids: Sequence[int], stops: Collection[int], tokenizer: PreTrainedTokenizerBase, start: int = 0
) -> int | None:
    """The place behind the stop token that ends ids[start:], white space apart; None where none does.

    Of several in a row it is the first: some templates write the end of sequence behind the end of the last turn.
    """
    found = None
    for place in reversed(range(start, len(ids))):
        if ids[place] in stops:
            found = place + 1
        elif not is_blank(ids[place], tokenizer):
            break
    return found


def is_blank(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is white space."""
    return not str(tokenizer.decode([token])).strip()


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text as token ids, with nothing put around it."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that stand for no text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
