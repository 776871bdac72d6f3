"""A model ready to answer: loaded, with its tokenizer and a generator."""

from typing import Any

from taurl.llm.generation import Sampling
from taurl.llm.inference_config import DataConfig, InferenceConfig
from taurl.llm.models import load_model, load_tokenizer
from taurl.llm.policies import make_generator
from taurl.llm.tasks import PromptReader
from taurl.runtime.machine import choose_device, choose_precision, keep_freed_memory, set_threads


class Model:
    """What the settings of `InferenceConfig` describe."""

    def __init__(self, config: InferenceConfig):
        self.config = config
        keep_freed_memory()
        set_threads(config.threads)
        device = choose_device(config.device)
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_model(config.model, dtype=choose_precision(config.precision, device), device=device)
        self.generator = make_generator(config.generator, self.model, self.tokenizer, config.slots)
        self.sampling = Sampling(
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=config.stop,
        )

    def reader(self, arguments: dict[str, Any] | None = None) -> PromptReader:
        """Reads rows and encodes prompts as the settings say."""
        config = self.config
        return PromptReader(
            tokenizer=self.tokenizer,
            context=self.model.config.get_text_config().max_position_embeddings,
            max_tokens=config.max_tokens,
            arguments=arguments or {},
            columns=config.columns if isinstance(config, DataConfig) else {},
            answer_after=config.answer_after if isinstance(config, DataConfig) else None,
            system_prompt=config.system_prompt,
            prompt_format=config.prompt_format,
            chat_template_kwargs=config.chat_template_kwargs,
        )
