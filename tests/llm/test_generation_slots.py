"""The slot sampler against `model.generate`, greedily; how completions end; what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, CONTEXT, checkpoint_activations, in_double, prompts_of, tiny_model
from tiny_policy import letter_a, save_tiny_policy
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GPTNeoConfig, Llama4TextConfig, MambaConfig, PreTrainedTokenizerFast

from taurl.llm import GRPO, GRPOConfig
from taurl.llm.generation import Sampling, SlotSampler, TransformersSampler
from taurl.llm.generation.attention import one_query_attention
from taurl.llm.generation.cache import SlotCache
from taurl.llm.generation.protocol import ends
from taurl.llm.generation.slot_model import SlotModel
from taurl.llm.generation.slots import Batch
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.runtime.errors import InputError, RunError

GREEDY = {"temperature": 0.0}


def generate_alone(model, prompt, max_tokens, stop_token_ids=()):
    """`model.generate` on one prompt: the greedy tokens, and the logits [L, V] that they were taken from."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)


@pytest.fixture
def seen(monkeypatch):
    """Logits by (prompt, completion, position), as the sampler draws from them."""
    logits_of = {}
    draw = Batch._draw

    def spy(batch, drafts, logits, numbers, ahead):
        for draft, row in zip(drafts, logits, strict=True):
            logits_of[draft.prompt, draft.completion, len(draft.tokens) + ahead] = row.clone()
        return draw(batch, drafts, logits, numbers, ahead)

    monkeypatch.setattr(Batch, "_draw", spy)
    return logits_of


def adapted(architecture):
    """A tiny model with a LoRA adapter that changes it."""
    model = get_peft_model(
        tiny_model(architecture), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def stops_at_different_times(rows):
    """Two tokens that end some of the rows, at different places."""
    firsts = {}
    for token in sorted({token for row in rows for token in row}):
        places = [row.index(token) for row in rows if token in row]
        if min(places) > 0:
            firsts[token] = len(set(places)), -len(places)
    return sorted(firsts, key=firsts.get)[-2:]


@pytest.mark.parametrize("attention", [None, "eager", "LoRA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_and_logits_equal_those_of_generate(architecture, attention, seen, monkeypatch):
    model = adapted(architecture) if attention == "LoRA" else tiny_model(architecture, attention=attention)
    prompts = prompts_of([3, 40, 7, 20, 1, 9])
    alone = [generate_alone(model, prompt, 30) for prompt in prompts]
    stops = stops_at_different_times([tokens for tokens, _ in alone])
    moves = []
    copy_rows = SlotCache.copy_rows
    monkeypatch.setattr(SlotCache, "copy_rows", lambda *args: (moves.append(args[0] is args[1]), copy_rows(*args)))

    groups = SlotSampler(model, stop_token_ids=stops, slots=3).generate(prompts, 2, Sampling(30, **GREEDY))

    for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        tokens, logits = alone[index]
        length = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
        expected, expected_logits = tokens[:length], logits[:length]
        if architecture == "llama":  # how `generate` itself ends
            assert generate_alone(model, prompt, 30, stops)[0] == expected
        assert len(group) == 2
        for place, completion in enumerate(group):
            assert completion.tokens == expected
            assert completion.logprobs == [0.0] * len(expected)
            assert completion.finish == ("stop" if expected[-1] in stops else "length")
            logits = torch.stack([seen[index, place, position] for position in range(len(expected))])
            torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    lengths = {len(group[0].tokens) for group in groups}
    assert len(lengths) > 2
    assert any(moves), "no row moved into a free one: the test lost its point"


@pytest.fixture(scope="module")
def smollm2():
    model = load_model("smollm2-135m-instruct", dtype=torch.float32)
    return model, load_tokenizer("smollm2-135m-instruct")


def chat_prompts(tokenizer):
    questions = [
        "What is 2 + 3?",
        "Name three colours of the rainbow, one a line.",
        "Hi!",
        "Write one short sentence about the sea and the people who live beside it.",
    ]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


@pytest.mark.model
def test_greedy_smollm2_equals_generate(smollm2):
    model, tokenizer = smollm2
    prompts = chat_prompts(tokenizer)
    stops = [tokenizer.eos_token_id]
    groups = SlotSampler(model, stop_token_ids=stops, slots=3).generate(prompts, 1, Sampling(16, **GREEDY))
    assert [group[0].tokens for group in groups] == [generate_alone(model, prompt, 16, stops)[0] for prompt in prompts]


@pytest.mark.model
@pytest.mark.parametrize("sampler", [SlotSampler, TransformersSampler])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(smollm2, sampler):
    model, tokenizer = smollm2
    prompt = chat_prompts(tokenizer)[3]
    free = SlotSampler(model).generate([prompt], 1, Sampling(8, **GREEDY))[0][0].tokens
    texts = [tokenizer.decode([token]) for token in free]
    stop = texts[3][-2:] + texts[4][:2]  # neither token holds it alone
    assert all(stop not in text for text in texts)
    length = next(n for n in range(1, 9) if stop in tokenizer.decode(free[:n]))

    generator = sampler(model, tokenizer=tokenizer)
    found = generator.generate([prompt], 1, Sampling(8, stop=("never said", stop), **GREEDY))[0][0]

    assert length == 5
    assert found.tokens == free[:length]
    assert found.finish == "stop"


@pytest.fixture
def llama():
    return tiny_model("llama")


def test_stop_strings_need_a_tokenizer(llama):
    with pytest.raises(InputError, match="stop strings need the sampler's `tokenizer`"):
        SlotSampler(llama).generate([[1, 2]], 1, Sampling(4, stop=("x",)))


def test_a_stop_string_ends_right_behind_a_character_of_several_tokens():
    """Where the decoder makes nothing but signs of error of bytes that begin within a character."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for before in ("", "é", "€", "🎉", "a🎉"):
        tokens = [256 if byte == ord("a") else byte for byte in f"{before}\n".encode()]
        assert ends(tokens, (), ("\n",), tokenizer), before
        assert not ends(tokens[:-1] or [256], (), ("\n",), tokenizer)


@pytest.mark.parametrize("sampler", [SlotSampler, TransformersSampler])
def test_finish_says_why_a_completion_ended(llama, sampler):
    prompt = prompts_of([7])[0]
    tokens, _ = generate_alone(llama, prompt, 6)
    assert tokens[5] not in tokens[:5], "another prompt, please"

    def ending(max_tokens, stop):
        generator = sampler(llama, stop_token_ids=[stop])
        completion = generator.generate([prompt], 1, Sampling(max_tokens, **GREEDY))[0][0]
        assert len(completion.logprobs) == len(completion.tokens)
        return completion.tokens, completion.finish

    assert ending(6, tokens[5]) == (tokens, "stop")  # at the limit, but it did end by itself
    assert ending(5, tokens[5]) == (tokens[:5], "length")
    assert ending(1, tokens[5]) == (tokens[:1], "length")
    assert ending(1, tokens[0]) == (tokens[:1], "stop")


def test_nothing_to_sample_is_nothing_sampled(llama):
    assert SlotSampler(llama).generate([], 4, Sampling(3)) == []
    assert SlotSampler(llama).generate([[1], [2]], 0, Sampling(3)) == [[], []]


@pytest.mark.parametrize("sampler", [SlotSampler, TransformersSampler])
def test_prompts_that_do_not_fit_are_named(llama, sampler):
    generator = sampler(llama)
    assert len(generator.generate([[7] * (CONTEXT - 4)], 1, Sampling(4, **GREEDY))[0][0].tokens) == 4
    with pytest.raises(InputError, match=rf"prompt 1 has {CONTEXT - 3} tokens; with max_tokens 4 .* of {CONTEXT}"):
        generator.generate([[1], [7] * (CONTEXT - 3)], 1, Sampling(4))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generator.generate([[1], []], 1, Sampling(4))


@pytest.mark.parametrize(("sampler", "options"), [(SlotSampler, {"slots": 3}), (TransformersSampler, {})])
def test_tokens_stream_in_order_and_progress_counts_completions(llama, sampler, options):
    streamed, reported = {}, []
    prompts = prompts_of([4, 9, 2])
    groups = sampler(llama, stop_token_ids=range(10), **options).generate(
        prompts,
        2,
        Sampling(12),
        on_token=lambda prompt, completion, token: streamed.setdefault((prompt, completion), []).append(token),
        progress=lambda done, count: reported.append((done, count)),
    )
    expected = {(p, c): completion.tokens for p, group in enumerate(groups) for c, completion in enumerate(group)}
    assert streamed == expected
    assert len({len(tokens) for tokens in expected.values()}) > 1
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert reported[-1] == (6, 6)
    assert {count for _, count in reported} == {6}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("sampler", [SlotSampler, TransformersSampler])
def test_a_model_in_training_mode_samples_as_in_evaluation_mode_and_stays_in_it(architecture, sampler):
    model = tiny_model(architecture)
    prompts = prompts_of([4, 9])
    expected = sampler(model).generate(prompts, 2, Sampling(8))
    checkpoint_activations(model)  # drops the cache in training mode
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding)).eval()
    assert sampler(model).generate(prompts, 2, Sampling(8)) == expected
    assert model.training
    assert not frozen.training


SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MambaConfig(**SMALL), "MambaForCausalLM has layers of"),
        (
            GPTNeoConfig(**SMALL | {"num_hidden_layers": 2}, num_heads=2, attention_types=[[["local"], 2]]),
            "GPTNeoForCausalLM has layers of its own kind",
        ),
        (
            Llama4TextConfig(
                **SMALL | {"num_hidden_layers": 4},
                intermediate_size=8,
                intermediate_size_mlp=8,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=4,
                num_local_experts=1,
            ),
            "Llama4ForCausalLM has layers of kind chunked_attention",
        ),
    ],
)
def test_models_with_layers_that_the_sampler_does_not_know_are_refused(config, found):
    with pytest.raises(InputError, match="use the generator 'transformers'") as caught:
        SlotSampler(AutoModelForCausalLM.from_config(config))
    assert found in one_line(caught)


def test_an_attention_that_takes_no_mask_of_ours_is_refused(llama):
    llama.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError, match="attn_implementation='flash_attention_2', not 'sdpa' or 'eager'") as caught:
        SlotSampler(llama)
    one_line(caught)


def test_the_memory_for_keys_and_values_bounds_the_slots(llama, monkeypatch):
    token = 2 * 2 * 2 * 8 * 4  # layers × (keys and values) × key heads × head size × bytes
    four = 4 * 64 * token / 1e9  # rows come in multiples of 32 columns
    sampler = SlotSampler(llama, slots=16, kv_memory_gb=four)
    assert [sampler.slots_for(tokens) for tokens in (33, 64, 65, 96, 1)] == [4, 4, 2, 2, 8]
    assert SlotSampler(llama, slots=16, kv_memory_gb=1.0).slots_for(64) == 16
    largest = []
    decode = SlotModel.decode
    monkeypatch.setattr(SlotModel, "decode", lambda *args: (largest.append(len(args[2])), decode(*args))[1])
    groups = sampler.generate(prompts_of([20, 40]), 3, Sampling(20))
    assert [len(group) for group in groups] == [3, 3]
    assert max(largest) == 4
    with pytest.raises(InputError, match=r"one sequence of 121 tokens .* needs 3.28e-05 GB .* kv_memory_gb is 2e-05"):
        SlotSampler(llama, kv_memory_gb=2e-5).generate([[1] * 101], 1, Sampling(20))


def test_the_default_memory_for_keys_and_values_is_a_quarter_of_what_is_free(llama, monkeypatch):
    monkeypatch.setattr("taurl.llm.generation.slots.free_memory_gb", lambda device: 8.0)
    assert SlotSampler(llama).kv_memory_gb == 2.0


def test_a_resumed_run_keeps_the_memory_that_was_chosen(tmp_path, monkeypatch):
    """The number of slots, and with it the rounding of what is sampled, follows from it."""
    rows = [{"prompt": f"{number}+1?"} for number in range(6)]
    config = GRPOConfig(out=tmp_path / "run", steps=1, prompts_per_step=1, group_size=2, max_tokens=2, eval_rows=0)
    folder = str(save_tiny_policy(tmp_path / "tiny"))
    monkeypatch.setattr("taurl.llm.generation.slots.free_memory_gb", lambda device: 8.0)
    run = GRPO(folder, rows, letter_a, config).train().run
    monkeypatch.setattr("taurl.llm.generation.slots.free_memory_gb", lambda device: 4.0)
    resumed = GRPO.resume(run.directory, dataset=rows, rewards=letter_a)
    assert resumed.generator.kv_memory_gb == 2.0
    given = GRPO.resume(
        run.directory, run.config.model_copy(update={"kv_memory_gb": 0.5}), dataset=rows, rewards=letter_a
    )
    assert given.generator.kv_memory_gb == 0.5


def test_prompts_are_prefilled_beside_others_of_their_length_and_equal_ones_once(llama, monkeypatch):
    prompts = prompts_of([100, 3, 90, 4, 95, 5])
    prompts += [prompts[1], prompts[0]]
    alone = [SlotSampler(llama).generate([prompt], 2, Sampling(6, **GREEDY))[0] for prompt in prompts]
    batches = []
    prefill = SlotModel.prefill
    sampler = SlotSampler(llama, slots=16)
    monkeypatch.setattr(
        SlotModel, "prefill", lambda model, ids, beginning: (batches.append(ids), prefill(model, ids, beginning))[1]
    )
    groups = sampler.generate(prompts, 2, Sampling(6, **GREEDY))
    assert [sorted(map(len, batch)) for batch in batches] == [[3, 4, 5], [90, 95, 100]]
    assert [[c.tokens for c in group] for group in groups] == [[c.tokens for c in group] for group in alone]
    drawn = sampler.generate([prompts[0]] * 2, 2, Sampling(20))
    assert len({tuple(completion.tokens) for group in drawn for completion in group}) == 4


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@in_double
def test_what_prompts_begin_with_is_prefilled_once(architecture, monkeypatch):
    """However many prefills a call takes. Prompts that no slot is free for yet are prefilled beside the others."""
    model = tiny_model(architecture, torch.float64)
    (beginning,) = prompts_of([40], seed=3)
    prompts, passes = [beginning + end for end in prompts_of([5, 9, 1, 4, 7])] + [beginning], []
    prefill, forward = SlotModel.prefill, SlotModel._forward
    seen = {}

    def watched(slots, ids, start=None):
        cache, logits = prefill(slots, ids, start)
        seen.update({tuple(prompt): (cache, row, logits[row]) for row, prompt in enumerate(ids)})
        return cache, logits

    sampler = SlotSampler(model, slots=4)
    monkeypatch.setattr(SlotModel, "prefill", watched)
    monkeypatch.setattr(SlotModel, "_forward", lambda *args: (passes.append(tuple(args[2].shape)), forward(*args))[1])
    sampler.generate(prompts, 2, Sampling(6))
    assert [shape for shape in passes if shape[1] > 1] == [(1, 39), (2, 2), (4, 10)]
    with torch.inference_mode(), sampler.slot_model.sampling():
        for prompt in prompts:
            cache, row, logits = seen[tuple(prompt)]
            alone, expected = prefill(sampler.slot_model, [prompt])
            torch.testing.assert_close(logits, expected[0], rtol=1e-9, atol=1e-9)
            for layer, other in zip(cache.slot_layers, alone.slot_layers, strict=True):
                torch.testing.assert_close(layer.keys[row, :, : len(prompt)], other.keys[0], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(layer.values[row, :, : len(prompt)], other.values[0], rtol=1e-9, atol=1e-9)


def test_prefilled_prompts_take_no_more_than_their_share_of_the_memory(llama, monkeypatch):
    """Also where nearly all of them is a common beginning, which does not go through the model again."""
    monkeypatch.setattr("taurl.llm.generation.slots.PREFILL_TOKENS", 64)
    (beginning,) = prompts_of([60], seed=3)
    prompts = [beginning + end for end in prompts_of([2] * 16, seed=4)]
    rows, prefill, sampler = [], SlotModel.prefill, SlotSampler(llama, slots=8)
    monkeypatch.setattr(
        SlotModel, "prefill", lambda model, ids, start=None: (rows.append(len(ids)), prefill(model, ids, start))[1]
    )
    batch = None

    def kept(*given):
        nonlocal batch
        batch = Batch(*given)
        return batch

    monkeypatch.setattr("taurl.llm.generation.slots.Batch", kept)
    sampler.generate(prompts, 1, Sampling(6, **GREEDY))
    assert rows == [1] + [2] * 8  # a quarter of what eight slots of 68 tokens hold
    assert batch.prefilled is None
    assert batch.beginning is None


@pytest.mark.parametrize("generator", [SlotSampler, TransformersSampler])
def test_a_token_that_the_model_does_not_know_is_named(llama, generator):
    with pytest.raises(InputError, match="prompt 1 holds token 101, and the model knows 101 tokens"):
        generator(llama).generate([[1], [2, 101]], 1, Sampling(2))


def test_no_slots_are_refused(llama):
    with pytest.raises(InputError, match="slots is 0, expected at least 1"):
        SlotSampler(llama, slots=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_named(llama, temperature):
    sampler = SlotSampler(llama)
    llama.model.norm.weight.data[3] = torch.nan
    with pytest.raises(RunError, match="logits are not finite"):
        sampler.generate([[1, 2]], 1, Sampling(4, temperature=temperature))


def test_a_mask_that_differs_by_head_is_kept():
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 4, 5, 8)
    mask = torch.where(torch.rand(2, 4, 1, 5) < 0.3, -torch.inf, 0.0)
    module = torch.nn.Module().eval()
    found, _ = one_query_attention(module, query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)
