import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taurl.llm.data.chat import as_completion, encode_prompt, prompt_problem, prompt_text, stop_token_ids
from taurl.llm.models.loading import load_tokenizer
from taurl.runtime.errors import InputError

SPECIAL = ["<s>", "</s>", "<unk>", "<turn>", "<end>"]
WORDS = ["user", "assistant", "system", "two", "plus", "four", "six", "short", "taurl", "thought"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}"
    "{% endif %}<turn> {{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant{% if think %} thought{% endif %}{% endif %}"
)


def tokenizer_of_words(template=None, begin=False, end=False):
    """One token a word, by hand; with or without a chat template, <s> before and </s> behind every text."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    around = ["<s>"] * begin + ["$A"] + ["</s>"] * end
    backend.post_processor = TemplateProcessing(single=" ".join(around), special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<turn>", "<end>"],
        chat_template=template,
    )


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


USER = [{"role": "user", "content": "two plus four"}]


def test_a_string_is_a_message_of_the_user_where_there_is_a_template():
    tokenizer = tokenizer_of_words(TEMPLATE, begin=True)
    ids = encode_prompt("two plus four", tokenizer)
    assert isinstance(ids, list)
    assert words(tokenizer, ids) == "<turn> user two plus four <end> <turn> assistant"
    assert ids == encode_prompt(USER, tokenizer) == encode_prompt("two plus four", tokenizer, prompt_format="chat")


def test_a_string_is_raw_text_where_there_is_none_or_where_asked():
    plain, templated = tokenizer_of_words(), tokenizer_of_words(TEMPLATE)
    assert words(plain, encode_prompt("two plus four", plain)) == "two plus four"
    assert words(templated, encode_prompt("two plus four", templated, prompt_format="text")) == "two plus four"
    with pytest.raises(InputError, match="has none"):
        encode_prompt("two plus four", plain, prompt_format="chat")
    with pytest.raises(InputError, match="row 3 of the data: messages need a chat template"):
        encode_prompt(USER, plain, where="row 3 of the data")


def test_raw_text_begins_once_and_is_left_open():
    tokenizer = tokenizer_of_words(begin=True, end=True)
    assert words(tokenizer, encode_prompt("two plus", tokenizer)) == "<s> two plus"
    assert words(tokenizer, encode_prompt("<s> two plus", tokenizer)) == "<s> two plus"
    assert words(tokenizer, encode_prompt("two </s> plus </s>", tokenizer)) == "<s> two </s> plus </s>"


def test_the_system_prompt_fills_a_gap_and_replaces_nothing():
    tokenizer = tokenizer_of_words(TEMPLATE)
    ids = encode_prompt("two plus four", tokenizer, system_prompt="short")
    assert words(tokenizer, ids) == "<turn> system short <end> <turn> user two plus four <end> <turn> assistant"
    own = [{"role": "system", "content": "six"}, *USER]
    ids = encode_prompt(own, tokenizer, system_prompt="short")
    assert words(tokenizer, ids) == "<turn> system six <end> <turn> user two plus four <end> <turn> assistant"
    assert len(own) == 2
    with pytest.raises(InputError, match="system_prompt needs a chat template"):
        encode_prompt("two plus four", tokenizer_of_words(), system_prompt="short")


def test_an_answer_that_was_begun_is_continued():
    tokenizer = tokenizer_of_words(TEMPLATE)
    ids = encode_prompt([*USER, {"role": "assistant", "content": "plus"}], tokenizer)
    assert words(tokenizer, ids) == "<turn> user two plus four <end> <turn> assistant plus"


def test_template_arguments_and_template_errors():
    tokenizer = tokenizer_of_words(TEMPLATE)
    assert words(tokenizer, encode_prompt("six", tokenizer, chat_template_kwargs={"think": True})).endswith("thought")
    with pytest.raises(InputError, match="row 1 of the data: the chat template refuses the messages: no such role"):
        encode_prompt([{"role": "critic", "content": "six"}], tokenizer, where="row 1 of the data")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("  ", "empty string"),
        ([], "empty list"),
        (None, r"None \(NoneType\)"),
        (7, r"7 \(int\); expected a string or a list of messages"),
        ({"role": "user", "content": "x"}, r"\(dict\); expected a string or a list"),
        (["x"], r"message 1 is 'x' \(str\)"),
        ([{"role": "user"}], r"message 1 has no 'content' \(it has role\)"),
        ([*USER, {"content": "x"}], r"message 2 has no 'role'"),
        ([{"role": "user", "content": 3}], r"message 1 has 3 \(int\) as 'content'; expected a string"),
    ],
)
def test_malformed_prompts_are_named(prompt, problem):
    with pytest.raises(InputError, match=f"row 8 of the data: .*{problem}") as caught:
        encode_prompt(prompt, tokenizer_of_words(TEMPLATE), where="row 8 of the data")
    assert "\n" not in str(caught.value)
    assert prompt_problem(USER) is None


def test_prompts_as_text_and_completions_in_the_form_of_their_prompt():
    assert prompt_text("two") == prompt_text([{"role": "user", "content": "two"}]) == "two"
    assert prompt_text([{"role": "system", "content": "short"}, *USER]) == "system: short\nuser: two plus four"
    assert as_completion("two", "six") == "six"
    assert as_completion(USER, "six") == [{"role": "assistant", "content": "six"}]


def test_completions_stop_at_every_token_that_ends_them():
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **shape)).to(torch.bfloat16)
    templated, plain = tokenizer_of_words(TEMPLATE), tokenizer_of_words()
    model.generation_config = GenerationConfig(eos_token_id=[9, 2])
    assert stop_token_ids(model, templated) == (1, 2, 4, 9)  # </s>, the two configured, <end> of the template
    model.generation_config = GenerationConfig(eos_token_id=9)
    assert stop_token_ids(model, plain) == (1, 9)
    model.generation_config = GenerationConfig()
    assert stop_token_ids(model, tokenizer_of_words("{% for m in messages %}{{ m.content }} six {% endfor %}")) == (1,)


def test_the_module_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, taurl.llm.data.chat; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.model
def test_the_embedded_template_by_hand():
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    text = tokenizer.decode(encode_prompt("What is 4 + 5?", tokenizer, system_prompt="Be brief."))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 4 + 5?<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = [{"role": "user", "content": "4 + 5?"}, {"role": "assistant", "content": "The sum is "}]
    assert tokenizer.decode(encode_prompt(begun, tokenizer)).endswith("<|im_start|>assistant\nThe sum is ")
    assert stop_token_ids(None, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
