"""A random Llama of some ten thousand weights, with a tokenizer of single characters and a chat template."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<end>", "<system>", "<user>", "<assistant>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .+?"
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # answers that differ from prompt to prompt
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    config.update(settings)
    return LlamaForCausalLM(config).to(dtype)


def save_tiny_policy(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter_hash() -> str:
    """The hash of a tiny model with an adapter."""
    from peft import LoraConfig, get_peft_model

    from taurl.llm.scoring.reference_logprobs import model_hash

    torch.manual_seed(0)
    return model_hash(get_peft_model(tiny_model(), LoraConfig(r=1, target_modules="all-linear")))


def print_adapter_hash() -> None:
    """For another process, with what tells its seed of hashes."""
    print(hash("a"), adapter_hash())


def write_rows(path: Path, count: int = 12) -> Path:
    """A JSONL file of additions with their answers."""
    lines = (f'{{"prompt": "{i}+{i % 3}?", "answer": "{i + i % 3}"}}\n' for i in range(count))
    path.write_text("".join(lines))
    return path


def high_ids(completion_ids, **kwargs):
    """A reward that differs within nearly every group."""
    return [sum(ids) / len(ids) for ids in completion_ids]


def letter_a(completions, **kwargs):
    """Share of the letter a in each completion, of strings or of messages."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count("a") / max(1, len(text)) for text in texts]


def untimed(records):
    """The records of a run without what the clock and the machine say."""
    times = ("seconds", "time/", "tokens_per_second", "memory/")
    return [{k: v for k, v in record.items() if not any(part in k for part in times)} for record in records]


class KeepFloat64(TorchFunctionMode):
    """transformers computes norms, rotary angles and softmax in float32 even in a float64 model; not in here."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        first = arguments[0] if arguments else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if function is torch.Tensor.float or (function is torch.Tensor.to and torch.float32 in arguments[1:]):
                return first
            if keywords.get("dtype") is torch.float32:
                del keywords["dtype"]
        return function(*arguments, **keywords)
