"""What the benchmarks share: the clock, the verdict, the sections of RESULTS.md."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """As for a script of that folder, or of its llm_speed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "llm_speed")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def laps_with(ends, minutes=1.0):
    from measure import Laps

    laps = Laps({"warm_up": 1, "device": "cpu", "minutes": minutes})
    laps.ends = ends
    return laps


def test_the_first_update_warms_up_unless_it_is_the_only_one():
    assert laps_with([0.0, 5.0, 7.0, 10.0]).seconds() == [2.0, 3.0]
    assert laps_with([0.0, 5.0]).seconds() == [5.0]
    assert laps_with([0.0, 5.0], minutes=0).over


def test_a_stopped_clock_does_not_count():
    laps = laps_with([])
    laps()
    with laps.stopped():
        laps._stopped += 100.0  # as if that had taken long
    laps()
    assert laps.ends[1] - laps.ends[0] < -99


def test_what_is_missed_is_said_and_what_is_reached_is_not():
    from llm_speed.tables import Target, missed, table

    found = {
        "taurl": [{"seconds": [1.0, 2.0, 9.0], "peak_gb": 3.0}],
        "TRL as installed": [{"seconds": [8.0], "peak_gb": 5.0}],
        "TRL, same allocator": [{"seconds": [8.0], "peak_gb": 20.0}],
    }
    target = Target({"TRL as installed": 5, "TRL, same allocator": 3.5})
    assert missed(found, target) == [
        "4.00 times the speed of TRL as installed, 5 asked",
        "0.60 of the memory of TRL as installed, 0.5 asked",
    ]
    assert table(found, target).splitlines()[3] == (
        "| TRL as installed | 8.0 | 1 | 5.0 | 4.00 × | ≥ 5 × | 0.60 × | ≤ 0.5 × |"
    )


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    from shared import write_section

    path = tmp_path / "RESULTS.md"
    for title, text in [("First", "one"), ("Second", "two"), ("First", "new"), ("Second", "last")]:
        write_section(title, text, path)
    assert path.read_text() == "# Results of the benchmarks\n\n## First\n\nnew\n\n## Second\n\nlast\n"


def test_a_held_out_loss_is_that_of_the_labels_alone():
    from measure import held_out_nll

    class Even(torch.nn.Module):
        """Three tokens, alike, but after token 0 token 1 is twice as likely."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 3)
            logits[input_ids == 0] = torch.tensor([0.0, 2.0, 0.0]).log().nan_to_num(neginf=0.0)
            return type("Output", (), {"logits": logits})

    rows = [{"input_ids": [2, 0, 1, 2], "labels": [-100, -100, 1, 2]}]
    expected = -(torch.tensor(2 / 4).log() + torch.tensor(1 / 3).log()) / 2
    assert held_out_nll(Even(), rows) == pytest.approx(float(expected))


def test_parameters_of_a_tied_head_are_counted_once():
    from measure import parameters
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    inside = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 3 * 4  # q, k and v, o, the three of the MLP, three norms
    assert parameters(LlamaForCausalLM(LlamaConfig(**sizes, **heads))) == {
        "body_parameters": inside,
        "head_parameters": 40,
    }


def test_the_interval_is_wilsons():
    from preference import interval

    assert interval(0.5, 100) == "0.500 (0.404 to 0.596)"


def test_the_demos_task_says_what_was_missed_of_peers_that_got_there():
    from demo_task import missed

    found = {
        "taurl": {"curve": [(0, 0.0, 0.2), (10, 50.0, 0.6)]},
        "TRL as installed": {"curve": [(10, 200.0, 0.61)]},  # got there, in 4 times the seconds
        "TRL, same allocator": {"curve": [(10, 60.0, 0.4)]},  # did not: how much slower it is stays open
    }
    assert missed(found, 0.6) == ["4.00 times the speed of TRL as installed, 5 asked"]
    assert missed(found, 0.7) == ["taurl came to 0.600 in 50 s"]


def test_ppos_bounds_hold_for_what_each_row_is_compared_with():
    from ppo import ROWS, missed

    def side(seconds, peak):
        return [{"seconds": [seconds], "peak_gb": peak}]

    found = {"GRPO": side(10.0, 4.0), "GRPO, LoRA": side(5.0, 2.0)}
    for name, measured in zip(ROWS, ((18.0, 9.0), (22.5, 9.0), (99.0, 2.7)), strict=True):
        found[name] = side(*measured)
    assert missed(found) == [
        "PPO, critic, reference, reward model: 2.25 times the seconds of GRPO, 2.2 asked",
        "PPO, LoRA, critic, reference, reward model: 1.35 times the memory of GRPO, LoRA, 1.3 asked",
    ]


def test_rows_slower_than_asked_beside_vllm_are_said():
    from vllm_sampling import missed

    def row(ours, theirs):
        return {"taurl": [{"tokens": [ours], "seconds": [1.0]}], "vLLM": [{"tokens": [theirs], "seconds": [1.0]}]}

    assert missed({"short": row(150, 100), "long": row(200, 100)}) == ["short: 1.50 times vLLM's, 2 asked"]
