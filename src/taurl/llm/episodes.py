"""Conversations with an environment: several turns, one growing row of token ids, rewards where they were earned."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from taurl.llm.data.chat import Message, following_ids, prompt_problem
from taurl.llm.evaluation import decode
from taurl.llm.generation import Completion, Generator, Sampling
from taurl.llm.rewards.specs import explain, line_in
from taurl.runtime.errors import InputError, located

# Each turn draws with a key of its own, far from those of the steps.
STEPS_BETWEEN_TURNS = 2**40


class Environment(Protocol):
    """What the policy talks to. One instance is one episode."""

    def reset(self) -> Sequence[Message]:
        """The messages that the conversation begins with; the last is not the assistant's."""
        ...

    def step(self, completion: str) -> tuple[Sequence[Message], float, bool]:
        """Answer the policy's turn.

        Args:
            completion: what the policy said, without special tokens.
        Returns: the messages that follow (none where the episode is over), the turn's reward, and whether it is over.
        """
        ...


MakeEnvironment = Callable[[int], Environment]


@dataclass
class Episode:
    """One conversation.

    Attributes:
        messages: those that it began with.
        prompt: their token ids.
        tokens: everything after the prompt: the policy's turns, and what the environment's messages became.
        logprobs: of the policy's tokens as they were drawn, 0 for the others.
        chosen: which tokens are the policy's.
        rewards: at each token; a turn's reward stands at the turn's last token.
        turns: how many the policy had.
        cut_turns: how many of them max_tokens cut off.
        over: whether the environment ended it. An episode that ran out of turns or context is truncated; what the
            environment answered last stands at its end all the same, as far as the context reaches.
    """

    environment: Environment
    messages: list[dict[str, Any]]
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: int = 0
    cut_turns: int = 0
    over: bool = False

    @property
    def completion(self) -> Completion:
        """The episode as one completion of its prompt, with the environment's tokens marked."""
        return Completion(self.tokens, self.logprobs, "stop" if self.over else "length", self.chosen)

    def turn_ends(self) -> list[bool]:
        """Which tokens are the last of a turn of the policy."""
        return [own and not after for own, after in zip(self.chosen, [*self.chosen[1:], False], strict=True)]

    def append(self, tokens: Sequence[int], logprobs: Sequence[float], *, chosen: bool) -> None:
        """Put tokens behind those that are there."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.chosen += [chosen] * len(tokens)
        self.rewards += [0.0] * len(tokens)


class Stage:
    """Plays episodes of an environment with a policy.

    Args:
        make: makes an environment from a seed; equal seeds give equal episodes of equal turns.
        encode: messages → token ids of the prompt.
        max_turns: of the policy.
        context: the most tokens that the policy sees; None for no bound.
    """

    def __init__(
        self,
        make: MakeEnvironment,
        encode: Callable[[Sequence[Message]], list[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int,
        context: int | None,
        chat_template_kwargs: dict[str, Any],
    ):
        self.make, self.encode, self.tokenizer = make, encode, tokenizer
        self.max_turns, self.context, self.template = max_turns, context, chat_template_kwargs

    def play(
        self, seeds: Sequence[int], generator: Generator, sampling: Sampling, *, key: tuple[int, int] = (0, 0)
    ) -> list[Episode]:
        """One episode a seed, all of them turn by turn together.

        Raises: InputError where the environment fails or does not answer as it should, with seed and turn.
        """
        episodes = [self._begin(seed, sampling.max_tokens) for seed in seeds]
        going = list(zip(seeds, episodes, strict=True))
        for turn in range(self.max_turns):
            contexts = [episode.prompt + episode.tokens for _, episode in going]
            turn_key = key[0], key[1] + turn * STEPS_BETWEEN_TURNS
            groups = generator.generate(contexts, 1, sampling, key=turn_key) if going else []
            for (seed, episode), (completion,) in zip(going, groups, strict=True):
                self._take(episode, completion, seed)
            going = [(seed, episode) for seed, episode in going if not episode.over and self._room(episode, sampling)]
        return episodes

    def _begin(self, seed: int, max_tokens: int) -> Episode:
        try:
            environment = self.make(seed)
            messages = environment.reset()
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"environment with seed {seed}: reset raised {explain_own(error, self.make)}") from error
        where = f"environment with seed {seed}: reset"
        messages = checked_messages(messages, f"{where}:")
        with located(where):
            prompt = self.encode(messages)
        if self.context is not None and len(prompt) + max_tokens > self.context:
            raise InputError(
                f"{where} gave {len(prompt)} tokens; with max_tokens {max_tokens} they exceed the {self.context} "
                "that the model sees: shorten them, or lower max_tokens"
            )
        return Episode(environment, messages, prompt)

    def _take(self, episode: Episode, completion: Completion, seed: int) -> None:
        """Append the policy's turn, its reward, and the environment's answer."""
        episode.append(completion.tokens, completion.logprobs, chosen=True)
        episode.turns += 1
        episode.cut_turns += completion.finish == "length"
        where = f"environment with seed {seed}, turn {episode.turns}: step"
        text = decode(self.tokenizer, completion.tokens)
        try:
            answer = episode.environment.step(text)
        except Exception as error:
            raise InputError(f"{where} raised {explain_own(error, episode.environment)}") from error
        try:
            messages, reward, over = answer
        except (TypeError, ValueError) as error:
            found = f"{len(answer)} values" if isinstance(answer, tuple) else f"a {type(answer).__name__}"
            three = "the messages that follow, a reward, and whether the episode is over"
            raise InputError(f"{where} gave {found}, expected three: {three}") from error
        episode.rewards[-1] += finite_number(reward, where)
        episode.over = bool(over)
        if episode.over:
            return
        messages = checked_messages(messages, f"{where}: the episode is not over, and")
        with located(where):
            reply = following_ids(messages, self.tokenizer, completion.tokens[-1], chat_template_kwargs=self.template)
        if self.context is not None:
            reply = reply[: max(0, self.context - len(episode.prompt) - len(episode.tokens))]
        episode.append(reply, [0.0] * len(reply), chosen=False)

    def _room(self, episode: Episode, sampling: Sampling) -> bool:
        """Whether another turn fits into the policy's context."""
        length = len(episode.prompt) + len(episode.tokens) + sampling.max_tokens
        return self.context is None or length <= self.context


def explain_own(error: Exception, whose: Any) -> str:
    """An exception as one line, with the line of the user's file that it came through last."""
    module = sys.modules.get(getattr(whose, "__module__", ""))
    file = getattr(module, "__file__", None)
    line = file and line_in(error, file)
    return explain(error) + (f" ({file}:{line})" if line else "")


def checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """What an environment said, as messages. Raises: InputError, beginning with `where`, if it is none."""
    problem = f"it said {messages!r}" if isinstance(messages, str) else prompt_problem(messages, "what it said")
    if problem:
        raise InputError(f"{where} {problem}; expected a list of messages, each {{'role': …, 'content': …}}")
    return [dict(message) for message in messages]


def finite_number(reward: Any, where: str) -> float:
    """A reward as a float: a number of Python, NumPy or torch. Raises: InputError for anything else."""
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} gave the reward {reward!r}, expected a finite number")
    return number
