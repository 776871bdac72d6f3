"""A model ready to answer: loaded, with its tokenizer and a generator."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from taurl.llm.data.chat import as_completion
from taurl.llm.data.tasks import PromptReader, Prompts
from taurl.llm.evaluation import decode
from taurl.llm.generation import Completion, Sampling
from taurl.llm.inference_config import GenerateConfig, InferenceConfig
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.models.policies import make_generator
from taurl.runtime.errors import InputError
from taurl.runtime.machine import (
    choose_device,
    choose_precision,
    make_current,
    out_of_memory_names,
    set_threads,
)

# Completions between two writes: enough to keep the slots busy to the end, few enough to lose.
BATCH, BATCH_ON_GPU = 256, 2048


class Model:
    """What the settings of `InferenceConfig` describe."""

    def __init__(self, config: InferenceConfig):
        self.config = config
        set_threads(config.threads)
        device = choose_device(config.device)
        make_current(device)
        self.tokenizer = load_tokenizer(config.model)
        with out_of_memory_names("the model's size, or precision to bfloat16"):
            self.model = load_model(config.model, dtype=choose_precision(config.precision, device), device=device)
        with out_of_memory_names("kv_memory_gb or slots"):
            self.generator = make_generator(
                config.generator, self.model, self.tokenizer, config.slots, config.kv_memory_gb
            )
        self.sampling = Sampling(
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=config.stop,
        )

    def complete(self, prompts: Sequence[Sequence[int]], count: int = 1) -> Iterator[list[list[Completion]]]:
        """`count` completions of each prompt, in batches of prompts as they are done, under a progress bar.

        Args:
            prompts: P lists of token ids.
        Yields: lists of groups, in the order of the prompts.
        """
        size = max(1, (BATCH_ON_GPU if self.model.device.type == "cuda" else BATCH) // count)
        # Standard output stays the caller's, who prints what is yielded.
        with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
            task = bar.add_task("answering", total=len(prompts) * count)
            for start in range(0, len(prompts), size):

                def note(done: int, _: int, start: int = start) -> None:
                    bar.update(task, completed=start * count + done)

                with out_of_memory_names("kv_memory_gb, slots or max_tokens"):
                    groups = self.generator.generate(
                        prompts[start : start + size],
                        count,
                        self.sampling,
                        key=(self.config.seed, start),  # a step of its own, so that batches do not share their draws
                        progress=note,
                    )
                yield groups

    def answers(self, prompts: Prompts, count: int) -> Iterator[dict[str, Any]]:
        """The rows of the prompts, `count` times each, with their `completion` and how it came to its `finish`."""
        rows = iter(prompts.rows)
        for groups in self.complete(prompts.ids, count):
            for group, row in zip(groups, rows, strict=False):
                for completion in group:
                    text = decode(self.tokenizer, completion.tokens)
                    yield {**row, "completion": as_completion(row["prompt"], text), "finish": completion.finish}


def generate(rows: object, config: GenerateConfig) -> Iterator[dict[str, Any]]:
    """Complete prompts, as `taurl llm generate` does.

    Args:
        rows: a list of mappings with `prompt` (a string, or a list of messages), a `datasets.Dataset`, or a name or
            file as in `dataset`.
        config: the settings; `prompts` and `out` are for the command line and are not read here.
    Returns: an iterator over the rows, each `count` times, with two columns more: `completion`, a string or a list of
        messages as its prompt is, and `finish`, "stop" or, where max_tokens cut it off, "length". Some 256
        completions (on a GPU 2,048) are sampled at a time, when the first of them is asked for.
    Raises: InputError, before anything is sampled, for a row that cannot be read.
    """
    model = Model(config)
    prompts = PromptReader.of(config, model.tokenizer, model.model).read(rows)
    for name in ("completion", "finish"):
        if any(name in row for row in prompts.rows):
            raise InputError(f"the data has a column {name} already: rename it with columns ({name}=another_name)")
    return model.answers(prompts, config.count)
