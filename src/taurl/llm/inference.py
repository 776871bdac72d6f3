"""A model ready to answer: loaded, with its tokenizer and a generator."""

from collections.abc import Callable, Iterator, Sequence

from taurl.llm.generation import Completion, Sampling
from taurl.llm.inference_config import InferenceConfig
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.models.policies import make_generator
from taurl.runtime.machine import (
    choose_device,
    choose_precision,
    keep_freed_memory,
    make_current,
    out_of_memory_names,
    set_threads,
)

BATCH = 256  # completions between two writes: enough to keep the slots busy, few enough to lose


class Model:
    """What the settings of `InferenceConfig` describe."""

    def __init__(self, config: InferenceConfig):
        self.config = config
        keep_freed_memory()
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

    def complete(
        self, prompts: Sequence[Sequence[int]], count: int, progress: Callable[[int], None]
    ) -> Iterator[list[list[Completion]]]:
        """`count` completions of each prompt, in batches of prompts as they are done.

        Args:
            prompts: P lists of token ids.
            progress: called with the number of completions done so far.
        Yields: lists of groups, in the order of the prompts.
        """
        size = max(1, BATCH // count)
        for start in range(0, len(prompts), size):

            def note(done: int, _: int, start: int = start) -> None:
                progress(start * count + done)

            with out_of_memory_names("kv_memory_gb, slots or max_tokens"):
                yield self.generator.generate(
                    prompts[start : start + size],
                    count,
                    self.sampling,
                    key=(self.config.seed, start),  # a step of its own, so that batches do not share their draws
                    progress=note,
                )
