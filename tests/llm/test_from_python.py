"""What people write in Python around a run: configs, paths, resuming, and the adapter of one run in the next."""

import re

import pytest
from tiny_policy import letter_a, save_tiny_policy, tiny_model, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

import taurl.llm
from taurl import control
from taurl.llm import DPO, GRPO, PPO, SFT, DPOConfig, GRPOConfig, SFTConfig
from taurl.runtime.errors import InputError

PAIRS = [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": f"no {i}"} for i in range(4)]
ANSWERS = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(4)]


@pytest.fixture
def settings(tmp_path):
    return {"out": tmp_path / "run", "steps": 2, "prompts_per_step": 2, "eval_rows": 0, "threads": 1}


@pytest.mark.parametrize("trainer", [DPO, GRPO])
def test_a_config_in_the_place_of_the_rewards_is_named(trainer):
    config = trainer.config_class()
    with pytest.raises(InputError, match=f"a {type(config).__name__} stands in the place of rewards: .* config=…"):
        trainer("no-model", PAIRS, config)


def test_the_config_of_the_other_half_of_the_library_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"config is a taurl\.control\S*\.GRPOConfig, expected a taurl\.llm\S*\.GRPOConfig"
    ):
        GRPO("no-model", PAIRS, config=control.GRPOConfig(env="CartPole-v1"))
    with pytest.raises(InputError, match=r"config is a taurl\.llm\S*\.DPOConfig"):
        GRPO.resume(tmp_path, DPOConfig())


def test_rewards_of_the_config_are_taken_where_none_are_given(folder, settings):
    config = GRPOConfig(**settings, max_tokens=4, group_size=2, rewards=("last_number",))
    trainer = GRPO(folder, [{"prompt": "1?", "answer": "1"}] * 4, None, config)
    assert trainer.rewards.names == ["last_number"]


@pytest.mark.parametrize("kept", [{"lora_rank": 2}, {"kl_coefficient": 0.1}])
def test_weights_that_a_run_keeps_must_be_those_that_it_began_with(settings, tmp_path, kept):
    folder = save_tiny_policy(tmp_path / "model")
    questions = [{"prompt": f"{i}?", "answer": f"{i}"} for i in range(4)]
    config = GRPOConfig(**settings, **kept, max_tokens=4, group_size=2, rewards=("last_number",))
    GRPO(folder, questions, config=config).train()
    assert GRPO.resume(settings["out"], dataset=questions, steps=3).train().run.step == 3
    tiny_model(seed=1).save_pretrained(folder)  # as another run that goes on would
    with pytest.raises(InputError, match=r"the weights that the run keeps as they are, .* are not those"):
        GRPO.resume(settings["out"], dataset=questions, steps=4)


@pytest.mark.parametrize("settings_of_it", [{}, {"cache_reference": False}])
def test_the_reference_of_dpo_must_be_the_one_that_it_began_with(settings, tmp_path, monkeypatch, settings_of_it):
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "cache"))
    policy, other = (save_tiny_policy(tmp_path / name) for name in ("policy", "other"))
    config = DPOConfig(**settings, **settings_of_it)
    DPO(policy, PAIRS, reference=str(other), config=config).train()
    assert DPO.resume(settings["out"], dataset=PAIRS, steps=3).train().run.step == 3
    tiny_model(seed=1).save_pretrained(other)
    with pytest.raises(InputError, match=r"the weights that the run keeps as they are, .* are not those"):
        DPO.resume(settings["out"], dataset=PAIRS, steps=4)


def test_a_reward_of_a_module_in_this_folder_is_found_from_another(folder, settings, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my_taurl_rewards.py").write_text("def one(completions): return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path / "here")
    config = GRPOConfig(
        **settings, max_tokens=4, group_size=2, rewards=("my_taurl_rewards:one", "taurl.llm.rewards:last_number")
    )
    trainer = GRPO(folder, [{"prompt": "1?", "answer": "1"}] * 4, config=config)
    place = tmp_path / "here" / "my_taurl_rewards.py"
    assert trainer.config.rewards == (f"{place}:one", "taurl.llm.rewards:last_number")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "cispo", "clip_low": 0.1}, "clip_low is 0.1, but loss_type cispo does not read it"),
        ({"loss_type": "sapo", "clip_high": 0.1}, "clip_high is 0.1, but loss_type sapo does not read it"),
        ({"kl_place": "reward"}, "kl_place is 'reward', but kl_coefficient is 0"),
    ],
)
def test_settings_that_nothing_reads_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


def test_the_names_of_the_wing_are_listed():
    assert {"GRPO", "GRPOConfig", "SFT", "Reward"} <= set(dir(taurl.llm))


def test_a_path_is_a_name(folder, settings, tmp_path):
    run = DPO(folder, PAIRS, config=DPOConfig(**settings)).train().run
    following = settings | {"out": tmp_path / "next"}
    assert DPO(run.directory / "final", PAIRS, config=DPOConfig(**following)).config.model == str(
        run.directory / "final"
    )


def test_settings_may_change_by_name_on_resume(folder, settings):
    DPO(str(folder), PAIRS, config=DPOConfig(**settings)).train()
    resumed = DPO.resume(settings["out"], dataset=PAIRS, steps=3)
    assert resumed.train().run.step == 3
    with pytest.raises(InputError, match=r"beta was .* and cannot become"):
        DPO.resume(settings["out"], dataset=PAIRS, beta=0.7)
    with pytest.raises(InputError, match="step"):
        DPO.resume(settings["out"], dataset=PAIRS, steps="many")
    with pytest.raises(TypeError, match="'stepz', which is neither a setting nor one of model, dataset"):
        DPO.resume(settings["out"], dataset=PAIRS, stepz=3)


def test_pairs_are_trained_on_where_the_sampler_does_not_know_the_attention(folder, settings, tmp_path, monkeypatch):
    from taurl.llm.generation import SlotSampler

    def unknown(self, *_, **__):
        raise InputError("unknown attention")

    monkeypatch.setattr(SlotSampler, "__init__", unknown)
    assert DPO(str(folder), PAIRS, config=DPOConfig(**settings)).train().run.step == 2
    sampled = DPOConfig(**settings | {"out": tmp_path / "sampled", "max_tokens": 4})
    with pytest.raises(InputError, match="unknown attention"):
        DPO(str(folder), PAIRS, rewards=lambda completions, **_: [0.0 for _ in completions], config=sampled)


def test_a_stopped_run_says_how_it_goes_on(folder, settings, capsys):
    class Stopped(Exception):
        pass

    def stop(record):
        raise Stopped

    trainer = DPO(str(folder), PAIRS, config=DPOConfig(**settings), callbacks=[stop])
    with pytest.raises(Stopped):
        trainer.train()
    way = f"go on with resume({str(settings['out'])!r}, dataset=…) from Python"
    assert way in capsys.readouterr().err


def test_an_adapter_becomes_part_of_the_weights_and_the_next_run_trains_another(folder, settings, tmp_path):
    adapter = {"lora_rank": 2}
    given = {name: value for name, value in settings.items() if name != "prompts_per_step"}
    SFT(str(folder), ANSWERS, SFTConfig(**given, **adapter)).train()
    final = settings["out"] / "final"
    following = settings | {"out": tmp_path / "next"}
    for changes in (adapter, {}):
        with pytest.raises(InputError, match=re.escape("taurl llm ALGORITHM --resume RUN --merge-adapter")):
            DPO(str(final), PAIRS, config=DPOConfig(**following, **changes))
    SFT.resume(settings["out"], dataset=ANSWERS, merge_adapter=True).train()
    assert not (final / "adapter_config.json").exists()
    assert DPO(str(final), PAIRS, config=DPOConfig(**following, **adapter)).train().run.step == 2


@pytest.mark.parametrize("trainer", [GRPO, PPO, DPO])
def test_a_recurrent_model_is_refused_before_anything_is_sampled(tmp_path, trainer):
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tiny_tokenizer()), hidden_size=8, num_hidden_layers=1))
    config = trainer.config_class(out=tmp_path / "run", steps=1, max_tokens=4, group_size=2, generator="transformers")
    with pytest.raises(InputError, match="MambaForCausalLM has recurrent layers; training expects attention layers"):
        trainer(model, [{"prompt": str(i)} for i in range(9)], [letter_a], config, tokenizer=tiny_tokenizer())
