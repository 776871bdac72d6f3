"""The command line: `taurl llm grpo …`, `taurl report RUN`. Nothing heavy is imported until it is needed."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from taurl import __version__

# Command → what runs it (module:function, called with the arguments), and its line in the help.
COMMANDS = {
    "llm grpo": ("taurl.commands.llm_training:grpo", "train a language model on reward functions (GRPO)"),
    "llm sft": ("taurl.commands.llm_training:sft", "train a language model on answers (supervised fine-tuning)"),
    "llm dpo": ("taurl.commands.llm_training:dpo", "train a language model on preferences (DPO, KTO, SimPO, …)"),
    "llm ppo": ("taurl.commands.llm_training:ppo", "train a language model on rewards with a critic (RLHF with PPO)"),
    "llm reward": ("taurl.commands.llm_training:reward", "train a reward model on preferences, scores or labels"),
    "llm score": ("taurl.commands.score:main", "score the completions of a file with a reward model"),
    "llm evaluate": ("taurl.commands.evaluate:main", "score a model greedily on a data set"),
    "llm generate": ("taurl.commands.generate:main", "complete the prompts of a file"),
    "llm inspect": ("taurl.commands.inspect:main", "show the rows of a data set as the model sees them"),
    "llm chat": ("taurl.commands.chat:main", "talk to a model"),
    "control q-learning": ("taurl.commands.control:q_learning", "learn a table of action values (Q-learning, SARSA)"),
    "control dqn": ("taurl.commands.control:dqn", "train a network of action values (DQN)"),
    "control reinforce": ("taurl.commands.control:reinforce", "train a policy by REINFORCE"),
    "control a2c": ("taurl.commands.control:a2c", "train a policy by A2C"),
    "control trpo": ("taurl.commands.control:trpo", "train a policy by TRPO"),
    "control ppo": ("taurl.commands.control:ppo", "train a policy by PPO"),
    "control grpo": ("taurl.commands.control:grpo", "train a policy by GRPO, with groups of episodes"),
    "control evaluate": ("taurl.commands.control_play:evaluate", "play episodes with a policy, report their returns"),
    "control play": ("taurl.commands.control_play:play", "watch a policy, in a window or as a video"),
    "report": ("taurl.commands.report:main", "write report.html of a run directory"),
}

HELP = """usage: taurl COMMAND [OPTIONS]

Reinforcement learning from tabular Q-learning to GRPO on language models.

{commands}

  taurl COMMAND --help   the options of a command
  taurl --version        the version
  --debug                with any command: show the traceback of an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0, 2 for wrong input, 1 for a run that failed, 130 or 143 for a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return run(words)
    except KeyboardInterrupt:
        print("taurl: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_gone():
            return 1
        # Errors meant for a person bring their exit code; another one is a defect, which its traceback tells best.
        code = getattr(error, "exit_code", None)
        if debug or code is None:
            traceback.print_exc()
        else:
            print("taurl: " + "; ".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
        return code or 1


def output_is_gone() -> bool:
    """Whether the reader of the output has gone, as `head` does; what is still buffered is then dropped."""
    try:
        sys.stdout.flush()  # again, which tells a broken standard output from another broken pipe
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run(words: list[str]) -> int:
    """Find the command and call it."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(commands=listing(COMMANDS)))
        return 0
    if words[0] == "--version":
        print(f"taurl {__version__}")
        return 0
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            module, function = COMMANDS[name][0].split(":")
            return getattr(importlib.import_module(module), function)(words[length:]) or 0
    return unknown(words)


def unknown(words: list[str]) -> int:
    """A group's own help, or one line about a command that is not there."""
    group = {name: text for name, text in COMMANDS.items() if name.split()[0] == words[0]}
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(f"usage: taurl {words[0]} COMMAND [OPTIONS]\n\n{listing(group)}")
        return 0
    import difflib

    name = " ".join(words[:2] if group else words[:1])
    close = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, n=1) or difflib.get_close_matches(name, COMMANDS)
    hint = f"did you mean `taurl {close[0]}`?" if close else f"known: {', '.join(COMMANDS)}"
    print(f"taurl: unknown command `{name}`; {hint}", file=sys.stderr)
    return 2


def listing(commands: dict[str, tuple[str, str]]) -> str:
    """One line a command."""
    return "\n".join(f"  taurl {name:<18} {text}" for name, (_, text) in commands.items())


if __name__ == "__main__":
    sys.exit(main())
