"""Several reward functions on one batch: what they are given, what they may return, what is made of it."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.llm.algorithms.sft_config import SFTConfig
from taurl.llm.inference_config import EvaluateConfig
from taurl.llm.rewards import RewardSet
from taurl.runtime.errors import InputError

STATE = SimpleNamespace(global_step=7, max_steps=60)


@pytest.fixture
def make():
    """RewardSet that is closed after the test."""
    sets = []

    def build(*arguments, **options):
        sets.append(RewardSet(*arguments, **options))
        return sets[-1]

    yield build
    for one in sets:
        one.close()


def score(reward_set, completions=("a", "bb", "ccc"), **columns):
    return reward_set(
        prompts=[f"prompt {index}" for index in range(len(completions))],
        completions=list(completions),
        completion_ids=[list(range(len(text))) for text in completions],
        columns=columns,
        trainer_state=STATE,
    )


def refusal(reward_set, *arguments, **columns):
    with pytest.raises(InputError) as caught:
        score(reward_set, *arguments, **columns)
    assert "\n" not in str(caught.value)
    return caught.value


def length(completions):
    return [float(len(text)) for text in completions]


def shouted(completions, **kwargs):
    return [None if len(text) == 1 else 1.0 for text in completions]


def test_values_weights_and_rows_to_which_nothing_applies(make):
    def last_only(completions):
        return [None] * (len(completions) - 1) + [-4]

    both = make([shouted, last_only], weights=[2, 0.5])
    scores = score(both)
    np.testing.assert_array_equal(scores.values, [[np.nan, np.nan], [1, np.nan], [1, -4]])
    np.testing.assert_array_equal(scores.total, [np.nan, 2, 0])
    assert scores.values.dtype == scores.total.dtype == np.float64
    assert both.names == ["shouted", "last_only"]
    assert both.weights == [2.0, 0.5]


def test_a_function_of_weight_0_makes_no_row_count(make):
    scores = score(make([shouted, length], weights=[1, 0]))
    np.testing.assert_array_equal(scores.total, [np.nan, 1, 1])  # as without it
    np.testing.assert_array_equal(scores.values[:, 1], [1, 2, 3])


def test_an_empty_batch_has_empty_scores(make):
    scores = score(make([length, shouted]), completions=())
    assert scores.values.shape == (0, 2)
    assert scores.total.shape == (0,)


def test_a_trl_reward_function_is_given_everything(make):
    seen = {}

    def trl_style(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(kwargs, answer=answer, prompts=prompts, ids=completion_ids, step=trainer_state.global_step)
        log_extra("extracted", [text.upper() for text in completions])
        log_metric("accuracy", 1.0)
        log_metric("accuracy", 0.5)
        return length(completions)

    scores = score(make([trl_style]), answer=[1, 2, 3], level=["x", "y", "z"])
    assert seen == {
        "answer": [1, 2, 3],
        "level": ["x", "y", "z"],
        "prompts": ["prompt 0", "prompt 1", "prompt 2"],
        "ids": [[0], [0, 1], [0, 1, 2]],
        "step": 7,
    }
    assert scores.metrics == {"accuracy": 0.75}
    assert scores.extra == {"extracted": ["A", "BB", "CCC"]}


def test_a_function_gets_only_what_it_names(make):
    def plain(completions, answer, level="none", absent="default"):
        given = (level == ["x"] * 3) + (absent == "default")
        return [float(text == right) + given for text, right in zip(completions, answer, strict=True)]

    assert score(make([plain]), answer=["a", "b", "ccc"], level=["x"] * 3).total.tolist() == [3, 2, 3]


def test_async_functions_run_together_and_keep_their_loop_between_calls(make):
    """Each waits until the other has begun: one after the other neither would end."""
    loops, both = [], asyncio.Barrier(2)

    async def slow(completions):
        loops.append(asyncio.get_running_loop())
        await both.wait()
        await asyncio.sleep(0.1)
        return length(completions)

    class Judge:
        async def __call__(self, completions, **kwargs):
            await both.wait()
            return [0] * len(completions)

    together = make([slow, length, Judge()], timeout=60)
    scores = score(together)
    assert scores.values.tolist() == [[1, 1, 0], [2, 2, 0], [3, 3, 0]]
    assert scores.seconds["slow"] >= 0.09
    score(together)
    assert loops[0] is loops[1]


def test_async_functions_run_while_the_caller_has_a_loop(make):
    async def gentle(completions):
        await asyncio.sleep(0)
        return length(completions)

    reward_set = make([gentle])

    async def notebook_cell():
        return score(reward_set)

    assert asyncio.run(notebook_cell()).total.tolist() == [1, 2, 3]


def test_an_async_function_that_is_too_slow_is_stopped_and_named(make):
    cancelled = []

    async def stuck(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def quick(completions):
        return length(completions)

    error = refusal(make([quick, stuck], timeout=0.1))
    assert "'stuck' took longer than timeout=0.1 seconds" in str(error)
    assert cancelled == [True]


def test_a_timeout_that_no_function_would_keep_is_refused(make):
    with pytest.raises(
        InputError, match=r"reward_timeout is 5 s, but none of the reward functions is async.*reward_process"
    ):
        make([length], timeout=5)


@pytest.mark.parametrize("config", [GRPOConfig, SFTConfig, EvaluateConfig])
def test_settings_of_rewards_that_do_not_fit_are_refused_wherever_they_stand(config):
    with pytest.raises(ValueError, match="reward_process needs a reward_timeout"):
        config(reward_process=True)
    with pytest.raises(ValueError, match="2 reward_weights for 1 rewards"):
        config(rewards=("last_number",), reward_weights=(1.0, 2.0))


def test_a_timeout_of_the_functions_own_is_not_ours(make):
    async def gives_up(completions):
        raise TimeoutError("no answer from the judge")

    assert "'gives_up' raised TimeoutError: no answer from the judge" in str(refusal(make([gives_up], timeout=5)))


def test_an_exception_names_the_function_its_line_and_the_row(make):
    def picky(completions, answer):
        return [1 / (answer[index] - 2) for index in range(len(completions))]

    error = refusal(make([length, picky]), answer=[1, 2, 3])
    line = picky.__code__.co_firstlineno + 1
    assert f"'picky' raised ZeroDivisionError: division by zero at {__file__}:{line}" in str(error)
    assert "row 1 of the batch of 3, prompt 'prompt 1', completion 'bb'" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_an_exception_of_an_async_function_names_the_row_too(make):
    async def picky(completions, answer):
        await asyncio.sleep(0)
        return [1 / (right - 2) for right in answer]

    error = str(refusal(make([length, picky]), answer=[1, 2, 3]))
    assert "'picky' raised ZeroDivisionError: division by zero" in error
    assert "row 1 of the batch of 3, prompt 'prompt 1', completion 'bb'" in error


def test_an_exception_of_the_whole_batch_names_no_row(make):
    def batchwise(completions):
        if len(completions) > 1:
            raise ValueError("too\nmany")
        return [1.0]

    error = refusal(make([batchwise]))
    assert "'batchwise' raised ValueError: too many" in str(error)
    assert "row" not in str(error)


class ClientConnectionError(Exception):
    """As one of aiohttp's."""


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), ClientConnectionError("no answer"), MemoryError("full")]
)
def test_a_connection_that_fails_is_not_asked_again_for_each_row(make, error):
    calls = []

    def judge(completions, **columns):
        calls.append(len(completions))
        raise error

    with pytest.raises(InputError, match=f"'judge' raised {type(error).__name__}: {error}") as caught:
        score(make([judge]))
    assert calls == [3]
    assert "row" not in str(caught.value)


def test_the_row_is_shown_in_a_short_line(make):
    def fails(completions):
        raise KeyError("x")

    message = {"role": "assistant", "content": "word\n" * 100}
    with pytest.raises(InputError) as caught:
        make([fails])(
            prompts=[[{"role": "system", "content": "s"}, {"role": "user", "content": "What is\n2 + 2?"}]],
            completions=[[message]],
            completion_ids=None,
            columns={},
            trainer_state=STATE,
        )
    text = str(caught.value)
    assert "prompt 'What is 2 + 2?', completion 'word word" in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, math.nan, 0.0], "returned nan, expected a finite number"),
        ([1.0, -math.inf, 0.0], "returned -inf, expected a finite number"),
        (np.array([0.0, np.inf, 0.0]), "returned inf, expected a finite number"),
        ([1.0, "high", 0.0], "returned 'high', expected a number or None"),
        ([1.0, [1.0], 0.0], "returned [1.0], expected a number or None"),
        ([1.0, 1j, 0.0], "returned 1j, expected a number or None"),
    ],
)
def test_a_value_that_is_no_finite_number_names_its_row(make, returned, words):
    def odd(completions):
        return returned

    message = str(refusal(make([odd])))
    assert f"reward function 'odd' {words}" in message
    assert "row 1 of the batch of 3, prompt 'prompt 1', completion 'bb'" in message


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        (1.0, "returned a float, expected a list of 3"),
        (None, "returned a NoneType, expected a list of 3"),
        ("abc", "returned a str, expected a list of 3"),
        ({"a": 1}, "returned a dict, expected a list of 3"),
    ],
)
def test_something_else_than_one_value_a_row_is_refused(make, returned, words):
    def odd(completions):
        return returned

    assert f"reward function 'odd' {words}" in str(refusal(make([odd])))


def test_a_row_that_is_dropped_is_found(make):
    def drops(completions):
        return [1.0 for text in completions if text != "ccc"]

    message = str(refusal(make([drops])))
    assert "returned 2 values for 3 completions; row 2 of the batch of 3" in message


@pytest.mark.parametrize(
    "values",
    [
        [True, 2, 0.5],
        [np.float32(1), np.int64(2), np.float64(0.5)],
        [np.bool_(True), np.array(2), torch.tensor(0.5)],
        np.array([1.0, 2.0, 0.5]),
        torch.tensor([1.0, 2.0, 0.5]),
        (value for value in (1, 2, 0.5)),
    ],
)
def test_numbers_of_other_libraries_are_numbers(make, values):
    assert score(make([lambda completions: values])).total.tolist() == [1, 2, 0.5]


def test_log_extra_by_a_name_that_samples_have_is_refused(make):
    def logs(completions, log_extra):
        log_extra("prompt", completions)
        return length(completions)

    error = str(refusal(make([logs])))
    assert (
        error == "reward function 'logs' calls log_extra('prompt', …): a sample has that already; give it another name"
    )


def test_two_functions_that_log_the_same_column_are_refused(make):
    def first(completions, log_extra):
        log_extra("reason", completions)
        return length(completions)

    def second(completions, log_extra):
        log_extra("reason", completions)
        return length(completions)

    error = str(refusal(make([first, second])))
    assert error == (
        "reward function 'second' calls log_extra('reason', …), and so does another: give one of them another name"
    )


@pytest.mark.parametrize("name", ["step", "seconds", "memory/peak_gb", "time/step", "eval/reward"])
def test_log_metric_by_a_name_of_the_step_is_refused(make, name):
    def logs(completions, log_metric):
        log_metric(name, 1.0)
        return length(completions)

    error = str(refusal(make([logs])))
    assert f"'logs' calls log_metric('{name}', …): a step's record has that; give it another name" in error


def test_log_extra_with_another_count_is_refused(make):
    def logs(completions, log_extra):
        log_extra("parsed", ["only one"])
        return length(completions)

    assert "log_extra('parsed', …) was given 1 values for 3 rows" in str(refusal(make([logs])))


def test_a_missing_column_is_named_before_anything_is_called(make):
    called = []

    def first(completions):
        called.append(True)
        return length(completions)

    def needs(completions, answer, level="optional"): ...

    both = make([first, needs])
    both.check_columns(["answer"])
    message = str(refusal(both, answers=[1, 2, 3], question=["?"] * 3))
    assert message == (
        "reward function 'needs' needs the column 'answer', which the rows lack (did you mean 'answers'?); "
        "available: answers, question"
    )
    assert called == []


def test_a_column_that_is_not_handed_on_is_said_to_need_another_name(make):
    def compares(completions, completion): ...

    message = str(refusal(make([compares]), answer=[1, 2, 3]))
    assert (
        "needs the column 'completion', which the rows lack (a column of that name is not handed on: rename" in message
    )


def test_names_are_distinct(make):
    def length_2(completions): ...

    assert make([length, length_2, length, "last_number", length]).names == [
        "length",
        "length_2",
        "length_3",
        "last_number",
        "length_4",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([length, shouted], [1.0]), {}, r"1 reward weights for 2 functions \(length, shouted\)"),
        (([length], [math.nan]), {}, "weight of reward function 'length' is nan"),
        (([],), {}, "no reward function given"),
        (([length],), {"timeout": 0}, "timeout of the reward functions is 0"),
    ],
)
def test_impossible_settings_are_refused(arguments, options, words):
    with pytest.raises(InputError, match=words):
        RewardSet(*arguments, **options)
