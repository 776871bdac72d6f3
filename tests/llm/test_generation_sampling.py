"""Sampled completions: keyed draws, and log-probabilities of the distribution that was drawn from."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, in_double, logits_one_by_one, prompts_of, tiny_model
from tiny_policy import tiny_tokenizer
from transformers import GenerationConfig

from taurl.llm.generation import Sampling, SlotSampler, TransformersSampler, graphs
from taurl.llm.generation.graphs import DecodeGraphs, require_recordable
from taurl.llm.generation.slot_model import SlotModel
from taurl.llm.models.policies import make_generator
from taurl.runtime.errors import InputError

RECORDED = Counter()
PROMPTS = prompts_of([3, 17, 8, 1])
STOPS = range(12)  # of 101 tokens: completions end at different times


def assert_same(groups, others, tolerance=1e-9):
    """The same tokens, with log-probabilities that differ by less than the tolerance."""
    flat, other = ([completion for group in side for completion in group] for side in (groups, others))
    assert [completion.tokens for completion in flat] == [completion.tokens for completion in other]
    assert [completion.finish for completion in flat] == [completion.finish for completion in other]
    for one, two in zip(flat, other, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=tolerance, rel=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_slots_and_the_yardstick_draw_the_same(architecture):
    model = tiny_model(architecture, torch.float64)
    sampling = Sampling(24, temperature=0.8)
    slots = SlotSampler(model, stop_token_ids=STOPS, slots=5).generate(PROMPTS, 3, sampling, key=(4, 2))
    yardstick = TransformersSampler(model, stop_token_ids=STOPS).generate(PROMPTS, 3, sampling, key=(4, 2))
    assert_same(slots, yardstick)
    assert len({len(completion.tokens) for group in slots for completion in group}) > 3


@pytest.fixture(scope="module")
def gemma3():
    return tiny_model("gemma3", torch.float64)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
@in_double
def test_slots_and_the_yardstick_truncate_the_same(gemma3, options):
    sampling = Sampling(10, **options)
    assert_same(
        SlotSampler(gemma3, slots=5).generate(PROMPTS, 2, sampling),
        TransformersSampler(gemma3).generate(PROMPTS, 2, sampling),
    )


@in_double
def test_the_number_of_slots_does_not_matter(gemma3):
    one, three, many = (
        SlotSampler(gemma3, stop_token_ids=STOPS, slots=slots).generate(PROMPTS, 4, Sampling(24))
        for slots in (1, 3, 64)
    )
    assert_same(one, three)
    assert_same(one, many)


@in_double
def test_how_often_the_sampler_looks_does_not_matter(gemma3):
    sampler = SlotSampler(gemma3, stop_token_ids=STOPS, slots=3)
    assert sampler.tokens_a_look == 1
    every = sampler.generate(PROMPTS, 4, Sampling(24))
    sampler.tokens_a_look = 7  # as on a GPU: sequences run on for a while after their end
    streamed = {}
    rarely = sampler.generate(
        PROMPTS,
        4,
        Sampling(24),
        on_token=lambda prompt, completion, token: streamed.setdefault((prompt, completion), []).append(token),
    )
    assert_same(every, rarely)
    assert streamed == {(p, c): group[c].tokens for p, group in enumerate(rarely) for c in range(4)}


@pytest.mark.parametrize("slots", [64, 5])
@in_double
def test_completions_that_agree_so_far_go_through_the_model_as_one(gemma3, monkeypatch, slots):
    """At a temperature where many do, and for equal prompts too; the result is that of a row each."""
    rows = []
    decode = SlotModel.decode
    monkeypatch.setattr(SlotModel, "decode", lambda *args: (rows.append(len(args[2])), decode(*args))[1])
    prompts, sampling = [*PROMPTS[:3], PROMPTS[0]], Sampling(12, temperature=0.1)
    sampler = SlotSampler(gemma3, stop_token_ids=STOPS, slots=slots)
    sampler.tokens_a_look = 2  # they could part between two looks: none share
    apart = sampler.generate(prompts, 6, sampling)
    rows_apart = sum(rows)
    rows.clear()
    together = SlotSampler(gemma3, stop_token_ids=STOPS, slots=slots).generate(prompts, 6, sampling)
    assert_same(apart, together)
    assert max(rows) <= slots
    if slots == 64:
        drawn = [(prompts[p], c.tokens) for p, group in enumerate(together) for c in group]
        texts = [[(tuple(p), tuple(t[:n])) for p, t in drawn if len(t) > n] for n in range(1, 12)]
        assert rows == [len(set(several)) for several in texts if several]
        assert len(set(texts[0])) < len(set(texts[4]))  # they do part
    assert sum(rows) < 0.9 * rows_apart


def repeated(graphs, step):
    """In place of a CUDA graph: the same step again, its result where the first one's was."""
    result = step()
    return lambda: (RECORDED.update(["replays"]), result.copy_(step())), result


@pytest.mark.parametrize("slots", [3, 7])
@in_double
def test_steps_of_rounded_shapes_that_are_repeated_draw_the_same(gemma3, monkeypatch, slots):
    """All of the graphs but CUDA's own part: rows and columns that fill up, results that are written over."""
    RECORDED.clear()
    monkeypatch.setattr(DecodeGraphs, "_record", repeated)
    monkeypatch.setattr(graphs, "FEWEST_COLUMNS", 8)
    sampler = SlotSampler(gemma3, stop_token_ids=STOPS, slots=slots)
    plain = sampler.generate(PROMPTS, 4, Sampling(24))
    sampler.records, sampler.tokens_a_look = True, 3
    assert_same(plain, sampler.generate(PROMPTS, 4, Sampling(24)))
    assert RECORDED["replays"] > 10


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_local_experts": 4}, "LlamaForCausalLM has experts, which its tokens choose"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rotary factors of kind dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rotary factors of kind longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, None),
    ],
)
def test_steps_that_their_numbers_choose_are_not_recorded(monkeypatch, settings, found):
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"CUDA graphs: the model is on cpu, not on a GPU; use the generator 'slots'"):
        make_generator("cuda_graphs", model, tiny_tokenizer(), 4)
    for name, value in settings.items():
        setattr(model.config, name, value)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    slot_model = SimpleNamespace(config=model.config, model=model)
    if found is None:
        require_recordable(slot_model)
    else:
        with pytest.raises(InputError, match=found):
            require_recordable(slot_model)


@in_double
def test_what_is_sampled_beside_a_prompt_does_not_matter_but_its_place_does(gemma3):
    sampler = SlotSampler(gemma3, stop_token_ids=STOPS, slots=3)
    first, second, third, fourth = PROMPTS
    beside_two = sampler.generate([first, second, third], 3, Sampling(20))
    beside_others = sampler.generate([fourth, second, fourth, first], 3, Sampling(20))
    alone = sampler.generate([second], 3, Sampling(20))
    smaller_group = sampler.generate([first, second], 2, Sampling(20))
    shorter = sampler.generate([first, second], 3, Sampling(5))
    assert_same([beside_two[1]], [beside_others[1]])
    assert_same([beside_two[1][:2]], [smaller_group[1]])
    assert [c.tokens[:5] for c in beside_two[1]] == [c.tokens for c in shorter[1]]
    assert [c.tokens for c in beside_two[1]] != [c.tokens for c in alone[0]]


def test_the_same_key_repeats_bit_for_bit():
    model = tiny_model("llama")
    sampler = SlotSampler(model, stop_token_ids=STOPS, slots=4)
    first = sampler.generate(PROMPTS, 3, Sampling(20), key=(1, 2))
    assert sampler.generate(PROMPTS, 3, Sampling(20), key=(1, 2)) == first
    again = SlotSampler(tiny_model("llama"), stop_token_ids=STOPS, slots=4)
    assert again.generate(PROMPTS, 3, Sampling(20), key=(1, 2)) == first


def test_another_seed_step_prompt_or_completion_draws_something_else():
    sampler = SlotSampler(tiny_model("llama"))
    prompts = [PROMPTS[0], PROMPTS[0]]  # the same prompt at two places
    found = [
        tuple(completion.tokens)
        for key in ((0, 0), (1, 0), (0, 1))
        for group in sampler.generate(prompts, 2, Sampling(12), key=key)
        for completion in group
    ]
    assert len(set(found)) == 12


def expected_logprob(logits, token, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probability of a token by a plain loop: sort, keep, renormalise."""
    scores = [logit / temperature for logit in logits]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    staying = order[: top_k or None]
    total = sum(math.exp(scores[index]) for index in staying)
    reached, nucleus = 0.0, []
    for index in staying:
        if reached < top_p:
            nucleus.append(index)
            reached += math.exp(scores[index]) / total
    nucleus = [index for index in nucleus if math.exp(scores[index] - scores[order[0]]) >= min_p]
    assert token in nucleus
    return scores[token] - math.log(sum(math.exp(scores[index]) for index in nucleus))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.4, "top_k": 7},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
@in_double
def test_logprobs_are_those_of_a_forward_pass_over_the_whole_text(gemma3, options):
    groups = SlotSampler(gemma3, stop_token_ids=STOPS, slots=3).generate(PROMPTS, 2, Sampling(12, **options))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logits = logits_one_by_one(gemma3, [prompt + completion.tokens])[0][len(prompt) - 1 :].tolist()
            for position, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
                assert logprob == pytest.approx(expected_logprob(logits[position], token, **options), abs=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_logprobs_of_every_architecture_are_those_of_a_plain_forward_pass(architecture):
    model = tiny_model(architecture, torch.float64)
    groups = SlotSampler(model, slots=3).generate(PROMPTS, 2, Sampling(20, temperature=0.8))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logits = logits_one_by_one(model, [prompt + completion.tokens])[0][len(prompt) - 1 : -1]
            plain = (logits / 0.8).log_softmax(-1)[range(20), completion.tokens]
            assert completion.logprobs == pytest.approx(plain.tolist(), abs=1e-9)


def test_the_yardstick_puts_the_models_own_generation_config_aside():
    model = tiny_model("llama")
    sampler = TransformersSampler(model)
    expected = sampler.generate(PROMPTS, 2, Sampling(20))
    own = GenerationConfig(repetition_penalty=5.0, eos_token_id=list(range(101)), min_new_tokens=3)
    model.generation_config = own
    assert sampler.generate(PROMPTS, 2, Sampling(20)) == expected
    assert model.generation_config is own
