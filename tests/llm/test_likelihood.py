"""Log-probabilities on a shared prompt against one plain forward pass a row, values and gradients."""

import pytest
import torch
from test_heads import lora
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    VOCABULARY,
    checkpoint_activations,
    in_double,
    logits_one_by_one,
    prompts_of,
    tiny_model,
)
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    Lfm2Config,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    Phi3Config,
)

from taurl.llm.beginnings import common_beginning
from taurl.llm.models.attention import NAME, WholeProducts
from taurl.llm.models.heads import body, context_length
from taurl.llm.scoring import likelihood
from taurl.llm.scoring.likelihood import checkpoints_activations, completion_logprobs, rows_of, window
from taurl.llm.scoring.prefix_tree import PrefixTree
from taurl.runtime.errors import InputError

PROMPTS = prompts_of([5, 13, 2])
PROMPT_OF = [0, 1, 1, 2, 2, 2]
COMPLETIONS = prompts_of([7, 1, 10, 4, 3, 1], seed=1)


def padded(completions, filler):
    """Tokens and mask [N, L]."""
    shape = len(completions), max(map(len, completions))
    tokens, mask = torch.full(shape, filler), torch.zeros(shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion)] = torch.tensor(completion)
        mask[row, : len(completion)] = True
    return tokens, mask


def one_by_one(model, prompts, prompt_of, completions, temperature):
    """Logprobs and entropies [N, L], each row forwarded alone through the model's own logits."""
    tokens, mask = padded(completions, 0)
    logprobs, entropies = (torch.zeros(tokens.shape, dtype=model.dtype) for _ in range(2))
    sequences = [prompts[prompt] + completion for prompt, completion in zip(prompt_of, completions, strict=True)]
    for row, logits in enumerate(logits_one_by_one(model, sequences)):
        length = len(completions[row])
        log_probabilities = (logits[-length - 1 : -1] / temperature).log_softmax(-1)
        logprobs[row, :length] = log_probabilities[range(length), completions[row]]
        entropies[row, :length] = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return logprobs, entropies, mask


def gradients(model, logprobs, entropies):
    """Gradient to each trained weight of a random weighted sum."""
    weights = torch.randn(2, *logprobs.shape, generator=torch.Generator().manual_seed(2), dtype=logprobs.dtype)
    model.zero_grad()
    (weights[0] * logprobs + weights[1] * entropies).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, tolerance=1e-9):
    """The largest difference, relative to the largest value, stays below the tolerance."""
    assert found.shape == expected.shape
    assert (found - expected).detach().abs().max() < tolerance * expected.detach().abs().max()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    # A key's bias adds the same to all scores of a query and has no gradient but rounding: measure by the largest.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).abs().max())
        assert difference < 1e-9 * max(float(gradient.abs().max()), 1e-3 * largest), name


def compare(model, prompts, prompt_of, completions, temperature=0.7):
    expected = one_by_one(model, prompts, prompt_of, completions, temperature)
    expected_gradients = gradients(model, *expected[:2])
    tokens, mask = padded(completions, filler=77)
    for worth in (0, 100):  # completions as rows of their own; and as a tree, where the model can
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(likelihood, "WORTH_A_TREE", worth)
            found = completion_logprobs(model, prompts, torch.tensor(prompt_of), tokens, mask, temperature=temperature)
        for values, others in zip(found, expected[:2], strict=True):
            assert values.dtype == torch.float64
            assert_close(values, others)
            assert (values[~mask] == 0).all()
        assert_same_gradients(gradients(model, *found), expected_gradients)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_values_and_gradients_equal_those_of_one_plain_pass_a_row(architecture):
    compare(tiny_model(architecture, torch.float64), PROMPTS, PROMPT_OF, COMPLETIONS)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])  # which knows no sdpa
@in_double
def test_the_same_where_attention_goes_back_by_whole_products(architecture, monkeypatch):
    model = tiny_model(architecture, torch.float64)
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation = NAME
    taken, backward = [], WholeProducts.backward
    monkeypatch.setattr(WholeProducts, "backward", lambda *given: taken.append(1) or backward(*given))
    compare(model, PROMPTS, PROMPT_OF, COMPLETIONS)
    assert len(taken) >= 2 * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_what_all_prompts_begin_with_goes_through_the_model_once(architecture, monkeypatch):
    model = tiny_model(architecture, torch.float64)
    (beginning,) = prompts_of([33], seed=3)
    for ends in ([5, 13, 2], [4, 4, 4], [0, 7, 1]):  # padded; not padded; one is nothing but the beginning
        prompts = [beginning + end for end in prompts_of(ends)]
        compare(model, prompts, PROMPT_OF, COMPLETIONS)
    tokens, mask = padded(COMPLETIONS, 0)
    monkeypatch.setattr(likelihood, "WORTH_A_TREE", 0)
    forwarded = shapes_forwarded(
        model,
        (prompts, torch.tensor(PROMPT_OF), tokens, mask),
        (prompts[:2], torch.tensor([0, 1, 1, 1, 1, 1]), tokens, mask),  # too little to save
    )
    whole = window(model) < 40 + 10  # padding behind the beginning would lie in the window
    assert forwarded == [*([(3, 40)] if whole else [(1, 32), (3, 8)]), (6, 9), (2, 40), (6, 9)]


def shapes_forwarded(model, *given, **options):
    """The shapes of the passes that these arguments of `completion_logprobs` take."""
    forwarded = []
    watch = body(model).register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for arguments in given:
        completion_logprobs(model, *arguments, **options)
    watch.remove()
    return forwarded


# Both prompts' answers part once at the prompt and once behind a first token that some share.
ALIKE = [[1, 2, 3], [1, 2, 4], [1, 5, 6], [1, 2, 3], [8], [1, 2, 3], [1, 5, 9], [2]]
OF_ALIKE = [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_what_completions_of_a_prompt_begin_with_goes_through_the_model_once(architecture, attention):
    model, (long, short, shorter) = tiny_model(architecture, torch.float64, attention), prompts_of([13, 3, 2])
    for prompts, taken in (([short, shorter], True), ([long, short], window(model) >= 13 + 3)):
        compare(model, prompts, OF_ALIKE, ALIKE)
        forwarded = shapes_forwarded(model, (prompts, torch.tensor(OF_ALIKE), *padded(ALIKE, 0)))
        assert forwarded == [(2, len(prompts[0])), (2, 3) if taken else (8, 2)]


@in_double
def test_a_tree_gives_the_gradients_of_rows_where_tokens_are_left_out(monkeypatch):
    model = tiny_model("llama", torch.float64)
    tokens, mask = padded(ALIKE, 0)
    mask[0, 1] = mask[1, 0] = mask[2, 2] = mask[4] = False
    found = []
    for worth in (0, 100):
        monkeypatch.setattr(likelihood, "WORTH_A_TREE", worth)
        values = completion_logprobs(model, PROMPTS[:2], torch.tensor(OF_ALIKE), tokens, mask)
        found.append((values, gradients(model, *values)))
    for values, others in zip(found[0][0], found[1][0], strict=True):
        assert_close(values, others)
    assert_same_gradients(found[1][1], found[0][1])


@in_double
def test_a_tree_is_taken_where_it_saves_enough(monkeypatch):
    model, prompt, of = tiny_model("llama", torch.float64), [[1, 2]], torch.zeros(4).long()
    apart = prompts_of([5, 5, 5, 5], seed=1)
    alike = [[9, 9, *completion[2:]] for completion in apart]
    rows, tree = [(1, 2), (4, 4)], [(1, 2), (1, 10)]
    assert shapes_forwarded(model, (prompt, of, *padded(apart, 0))) == rows
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0))) == tree
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0)), merge=False) == rows
    monkeypatch.setattr(likelihood, "WIDEST_TREE", 9)
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0))) == rows
    monkeypatch.setattr(likelihood, "WIDEST_TREE", 10)
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0))) == tree
    monkeypatch.setattr(likelihood, "TAKING_ANY_MASK", {"eager"})
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0))) == rows
    monkeypatch.undo()
    checkpoint_activations(model)  # prompt and completion as one
    assert shapes_forwarded(model, (prompt, of, *padded(alike, 0))) == [(4, 6)]


def test_a_tree_merges_what_stands_behind_the_same_tokens():
    tokens, mask = padded([[1, 2, 3], [1, 7, 4], [5], [1, 2, 3], [1, 2, 3, 9]], filler=1)
    mask[3, 0] = False  # not wanted, and yet passed through
    mask[4, 3] = False  # nothing wanted behind it
    tree = PrefixTree.of(3, torch.tensor([0, 0, 0, 2, 0]), tokens, mask)
    assert tree.columns == [[1, 2, 7], [], [1, 2]]
    assert tree.parents == [[-1, 0, 0], [], [-1, 0]]
    assert tree.states == [(0, -1), (0, 0), (0, 1), (0, 0), (0, 2), (0, -1), (2, 0), (2, 1)]
    assert tree.guessed == [1, 2, 3, 7, 4, 5, 2, 3]
    assert tree.guess_of.tolist() == [[0, 1, 2, 0], [0, 3, 4, 0], [5, 0, 0, 0], [0, 6, 7, 0], [0, 1, 2, 0]]
    assert tree.depths().tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert tree.sees()[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert tree.state_places().tolist() == [0, 1, 2, 1, 3, 0, 9, 10]


@in_double
def test_padding_of_a_tree_reaches_no_position_that_the_model_lacks(monkeypatch):
    """One prompt fills the context: the first token behind it is predicted, and none goes through the model."""
    model, prompts = tiny_model("gpt2", torch.float64), prompts_of([CONTEXT, 5])
    given = prompts, torch.tensor([0, 1, 1]), *padded([[3], [4, 5, 6], [4, 5, 7]], 0)
    assert shapes_forwarded(model, given) == [(2, CONTEXT), (2, 2)]
    merged, _ = completion_logprobs(model, *given)
    monkeypatch.setattr(likelihood, "WORTH_A_TREE", 0)
    assert_close(merged, completion_logprobs(model, *given)[0])


def neo():
    """Layers that see the last six columns, which no setting says by the usual name."""
    kinds = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6}
    config = GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, **kinds, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config).double().eval()


def mpt():
    """Scores that fall with the distance in columns."""
    return (
        AutoModelForCausalLM.from_config(MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2))
        .double()
        .eval()
    )


@pytest.mark.parametrize("make", [neo, mpt])
@in_double
def test_models_that_count_distances_in_columns_get_no_padding_between_tokens(make):
    torch.manual_seed(0)
    (beginning,) = prompts_of([33], seed=3)
    for ends in ([5, 13, 2], [4, 4, 4]):
        compare(make(), [beginning + end for end in prompts_of(ends)], PROMPT_OF, COMPLETIONS)


def test_gradients_of_shared_rows_are_the_same_at_every_call():
    """Enough numbers that threads share the work, in float32, where the order of a sum shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        values = torch.randn(3, 64 * 1024, requires_grad=True)
        rows = torch.arange(3).repeat(20)
        weights = torch.randn(60, 64 * 1024)
        found = [torch.autograd.grad((rows_of(values, rows) * weights).sum(), values)[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    exact = torch.stack([weights[rows == row].double().sum(0) for row in range(3)])
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-4, atol=1e-4)


def test_how_prompts_begin():
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_beginning([[1, 2], [1, 2, 3]]) == 1
    assert common_beginning([[1, 2], [1, 2]]) == common_beginning([[1, 2]]) == 1
    assert common_beginning([[1], [1, 2]]) == common_beginning([[3, 1], [4, 1]]) == 0


@in_double
def test_layers_that_keep_no_keys_and_values_get_prompt_and_completion_as_one():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    kinds = {"num_hidden_layers": 3, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}
    convolving = AutoModelForCausalLM.from_config(Lfm2Config(**sizes, **kinds)).double().eval()
    compare(convolving, PROMPTS, PROMPT_OF, COMPLETIONS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@in_double
def test_prompts_of_one_length_need_no_padding(architecture):
    compare(tiny_model(architecture, torch.float64), prompts_of([9, 9]), [0, 0, 1], COMPLETIONS[:3], 1.0)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "longrope"])
@pytest.mark.parametrize("checkpointed", [False, True])
@in_double
def test_padding_reaches_no_position_that_the_model_lacks(architecture, checkpointed):
    """Each row fits into the context; the longest prompt and the longest completion together do not."""
    model = longrope() if architecture == "longrope" else tiny_model(architecture, torch.float64)
    assert context_length(model) == CONTEXT
    if checkpointed:
        checkpoint_activations(model)
    compare(model, prompts_of([CONTEXT - 28, 20]), [0, 1], prompts_of([20, CONTEXT - 28], seed=1))


def longrope():
    """A Phi-3 whose rotary factors change for a whole batch where one position lies beyond the first range."""
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT}
    rotary |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        **sizes,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * CONTEXT,
        original_max_position_embeddings=CONTEXT,
        rope_parameters=rotary,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    return AutoModelForCausalLM.from_config(config).double().eval()


@in_double
def test_completions_of_one_token_need_the_prompts_only():
    compare(tiny_model("mistral", torch.float64), PROMPTS, [0, 1, 2, 2], [[4], [5], [6], [7]])


@in_double
def test_prompts_in_any_order_and_one_that_nothing_continues():
    compare(tiny_model("qwen3", torch.float64), PROMPTS, [2, 0, 2, 0], COMPLETIONS[:4])


@in_double
def test_a_head_with_a_bias_under_a_scale():
    model = tiny_model("cohere", torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(101, dtype=torch.float64))
    compare(model, PROMPTS, PROMPT_OF, COMPLETIONS)


@in_double
def test_under_an_adapter_only_the_adapter_has_a_gradient():
    model = lora(tiny_model("llama", torch.float64), target_modules="all-linear").double()
    compare(model, PROMPTS, PROMPT_OF, COMPLETIONS)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.grad is not None)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@in_double
def test_gradient_checkpointing_leaves_values_and_gradients_unchanged(architecture):
    model = tiny_model(architecture, torch.float64)
    checkpoint_activations(model)
    assert checkpoints_activations(model)
    compare(model, PROMPTS, PROMPT_OF, COMPLETIONS)
    model.eval()
    assert not checkpoints_activations(model)  # nothing is dropped in evaluation mode: the prompt is shared again
    compare(model, PROMPTS, PROMPT_OF, COMPLETIONS)


@in_double
def test_only_masked_tokens_count():
    model = tiny_model("llama", torch.float64)
    tokens, mask = padded(COMPLETIONS, 0)
    whole = completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF), tokens, mask)
    holes = mask.clone()
    holes[0, 2] = holes[2, 5:] = holes[3] = False
    found = completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF), tokens, holes)
    for values, others in zip(found, whole, strict=True):
        assert_close(values, others * holes)
    nothing, _ = completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF), tokens, torch.zeros_like(mask))
    assert (nothing == 0).all()
    nothing.sum().backward()


def test_bfloat16_gives_float32_near_the_float32_models():
    tokens, mask = padded(COMPLETIONS, 0)
    half = tiny_model("llama", torch.bfloat16)
    exact = tiny_model("llama").to(torch.bfloat16).float()
    found, expected = (
        completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF), tokens, mask)[0] for model in (half, exact)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MambaConfig(vocab_size=101, hidden_size=8, num_hidden_layers=1), "MambaForCausalLM has recurrent layers"),
        (
            OpenAIGPTConfig(vocab_size=101, n_embd=8, n_head=2, n_layer=1),
            "OpenAIGPTLMHeadModel kept 0 of 13 tokens in its cache",
        ),
    ],
)
def test_a_model_that_keeps_no_keys_and_values_is_refused(config, found):
    model = AutoModelForCausalLM.from_config(config)
    tokens, mask = padded(COMPLETIONS, 0)
    with pytest.raises(InputError, match=found) as caught:
        completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF), tokens, mask)
    assert "\n" not in str(caught.value)
