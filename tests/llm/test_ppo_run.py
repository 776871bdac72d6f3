"""PPO from Python: what is trained, what is kept, what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_grpo_run import ROWS
from tiny_policy import high_ids, letter_a, save_tiny_policy, tiny_model, tiny_tokenizer, untimed
from transformers import AutoModelForSequenceClassification

from taurl.llm import PPO, PPOConfig, Reward, RewardConfig
from taurl.llm.models.loading import load_model
from taurl.llm.models.reward_folder import RewardNote
from taurl.llm.rewards import reward_model
from taurl.runtime.errors import InputError, RunError

CONFIG = PPOConfig
SETTINGS = {
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 2,
    "max_tokens": 6,
    "eval_rows": 2,
    "critic_learning_rate": 1e-2,
    "truncated": "penalty",  # what the tiny model says hardly ever ends
    "missing_eos_penalty": 0.0,
}


# --- learning


@pytest.mark.parametrize("critic", ["copy", "head"])
def test_it_learns_a_letter_and_the_critic_learns_what_to_expect(config, folder, critic):
    settings = config(steps=30, prompts_per_step=4, group_size=8, learning_rate=1e-2, critic=critic, value_clip=None)
    run = PPO(str(folder), ROWS, letter_a, settings.model_copy(update={"kl_coefficient": 0.01})).train().run
    records = run.records()[1:]
    rewards = [record["reward"] for record in records]
    assert sum(rewards[:3]) / 3 < 0.1
    assert sum(rewards[-3:]) / 3 > 0.5
    assert max(record["value/explained_variance"] for record in records[3:]) > 0.3
    assert records[0]["kl"] == records[0]["kl_per_completion"] == 0 < records[-1]["kl_per_completion"]
    for name in ("completion-by-token.svg", "importance-ratios.svg"):
        assert (run.directory / "artifacts" / name).read_text().startswith("<svg")
    names = {
        "value/loss",
        "kl_coefficient",
        "reward/kl_penalty",
        "entropy",
        "clip_ratio/low_mean",
        "rewards/letter_a/mean",
    }
    assert names <= records[-1].keys()


def test_objects_and_names_for_every_model(config, folder, tmp_path):
    """A reward model's folder as the critic, whose head it brings; an object as the reference."""
    torch.manual_seed(4)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(tmp_path / "rm")
    reference = tiny_model(seed=2)
    trainer = PPO(
        tiny_model(),
        ROWS,
        high_ids,
        config(steps=1),
        tokenizer=tiny_tokenizer(),
        critic=str(tmp_path / "rm"),
        reference=reference,
    )
    head = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(trainer.critic.head.weight.detach(), head, rtol=0, atol=0)
    record = trainer.train().run.records()[-1]
    assert record["kl"] > 0.01  # it starts away from the reference
    assert not torch.equal(trainer.critic.head.weight.detach(), head)
    given = {"model": tiny_model(), "dataset": ROWS, "rewards": high_ids, "tokenizer": tiny_tokenizer()}
    assert trainer.trained_models() == [trainer.policy.model, trainer.critic.model]
    with pytest.raises(InputError, match="its critic did not come from Python"):
        PPO.resume(trainer.run.directory, **given, critic=tiny_model(), reference=reference)


def test_a_critic_of_another_vocabulary_is_refused(config, folder):
    with pytest.raises(InputError, match=r"the critic's model knows 50 tokens and the policy 45: .*by its name"):
        PPO(str(folder), ROWS, high_ids, config(), critic=tiny_model(vocab_size=50))


def test_a_named_critic_may_be_padded_to_another_size(config, folder, tmp_path):
    """As models of one family are; it must know every token that the policy's tokenizer has."""
    for size in (50, 40):
        tiny_model(vocab_size=size).save_pretrained(tmp_path / str(size))
        tiny_tokenizer().save_pretrained(tmp_path / str(size))
    trainer = PPO(str(folder), ROWS, high_ids, config(steps=1, critic=str(tmp_path / "50")))
    assert trainer.critic.model.get_input_embeddings().num_embeddings == 50
    trainer.train()
    with pytest.raises(InputError, match="the critic's model knows 40 tokens and the policy 45"):
        PPO(str(folder), ROWS, high_ids, config(out=None, critic=str(tmp_path / "40")))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("reference", "the reference is the very object that is trained"),
        ("critic", "the critic is the very object that is trained"),
        ("rewards", "the model of a reward function is trained itself"),
        ("critic and reference", "critic and reference are one object"),
    ],
)
def test_an_object_that_has_two_roles_is_refused(config, role, message, rank):
    class Judge:
        model = None

        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    model, judge = tiny_model(), Judge()
    shared = tiny_model() if role == "critic and reference" else model
    judge.model = shared if role == "rewards" else None
    others = {name: shared for name in ("critic", "reference") if name in role}
    settings = config(lora_rank=rank)
    with pytest.raises(InputError, match=message):
        PPO(model, ROWS, judge, settings, tokenizer=tiny_tokenizer(), **others)


def test_a_reference_that_reads_other_tokens_is_refused(config, folder, tmp_path):
    with pytest.raises(InputError, match="the reference knows 20 tokens and the model 45"):
        PPO(str(folder), ROWS, high_ids, config(out=None), reference=tiny_model(vocab_size=20))
    tiny_model(vocab_size=20).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="the reference knows 20 tokens and the model 45"):
        PPO(str(folder), ROWS, high_ids, config(out=None), reference=str(tmp_path / "small"))
    save_tiny_policy(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"reference '.*other' has another tokenizer than the model"):
        PPO(str(folder), ROWS, high_ids, config(out=None), reference=str(tmp_path / "other"))


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_another_model_that_sees_less_far_is_refused(config, folder, tmp_path, role):
    tiny_model(max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    for other in (tiny_model(max_position_embeddings=64), str(tmp_path / "short")):
        with pytest.raises(InputError, match=f"the {role} sees 64 tokens at most, the model 128: give one"):
            PPO(str(folder), ROWS, high_ids, config(out=None), **{role: other})


def test_in_the_value_warm_up_the_policy_stays(config, folder):
    start = load_file(folder / "model.safetensors")
    for critic in ("copy", "head"):
        out = config().out.parent / critic
        trainer = PPO(str(folder), ROWS, high_ids, config(steps=3, value_warmup_steps=2, critic=critic, out=out))
        for record in trainer.steps():
            state = trainer.policy.model.state_dict()
            stays = all(torch.equal(state[name], tensor) for name, tensor in start.items())
            assert stays == (record["step"] <= 2)
            assert bool(trainer.critic.head.weight.any())
            assert (record["learning_rate"] == 0) == stays
            assert record["value/grad_norm"] > 0


def test_the_heads_gradient_is_of_one_size_in_the_warm_up_and_after_it(config, folder):
    found = []
    for steps in (0, 1):
        out = config().out.parent / str(steps)
        changes = {"steps": 1, "epochs": 1, "critic": "head", "value_warmup_steps": steps, "max_grad_norm": 1e9}
        trainer = PPO(str(folder), ROWS, high_ids, config(**changes, out=out)).train()
        found.append(trainer.critic_optimizer.tensors()["exp_avg/head.weight"])
    torch.testing.assert_close(found[0], found[1])


def test_a_step_ends_early_where_the_policy_has_moved_far(config, folder):
    changes = {"steps": 1, "epochs": 6, "learning_rate": 3e-2}
    records = {}
    for target in (None, 0.02):
        out = config().out.parent / str(target)
        records[target] = PPO(str(folder), ROWS, high_ids, config(**changes, target_kl=target, out=out)).train()
    free, stopped = (trainer.run.records()[-1] for trainer in records.values())
    assert free["epochs"] == 6
    assert 1 < stopped["epochs"] < 6
    assert stopped["approx_kl"] < free["approx_kl"]


def test_a_reference_that_nothing_is_held_to_is_refused(config, folder):
    with pytest.raises(InputError, match="a reference is given, but kl_coefficient is 0"):
        PPO(str(folder), ROWS, high_ids, config(kl_coefficient=0.0), reference=tiny_model())


@pytest.mark.slow
def test_the_controller_holds_the_divergence_near_its_target(config, folder):
    """From a price far too low: the reward pulls away at once, and the price follows until it pulls back."""
    changes = {"steps": 60, "group_size": 8, "learning_rate": 1e-2, "eval_rows": 0, "epochs": 1}
    settings = config(**changes, kl_coefficient=0.02, kl_target=2.0, kl_gain=2.0)
    records = PPO(str(folder), ROWS, letter_a, settings).train().run.records()
    last = [record["kl_per_completion"] for record in records[-20:]]
    assert 1.0 < sum(last) / len(last) < 3.5
    assert records[0]["kl_coefficient"] == 0.02 != records[-1]["kl_coefficient"]


def test_scores_are_normalised_by_all_that_came_before(config, folder):
    """The moments of a run's scores, and what the tokens then earn."""
    scores = []

    def kept(completion_ids, **kwargs):
        found = high_ids(completion_ids)
        scores.extend(found)
        return found

    changes = {"normalize_rewards": True, "reward_clip": 1.0, "kl_coefficient": 0.0, "eval_rows": 0}
    trainer = PPO(str(folder), ROWS, kept, config(**changes))
    seen = []
    real = trainer._estimate
    trainer._estimate = lambda *given: seen.append(real(*given)) or seen[-1]
    trainer.train()
    every = torch.tensor(scores, dtype=torch.float64)
    torch.testing.assert_close(trainer.controls.scores.mean, every.mean())
    torch.testing.assert_close(trainer.controls.scores.variance, every.var(correction=0))
    expected = ((every[-8:] - every.mean()) / every.std(correction=0)).clamp(-1, 1)
    torch.testing.assert_close(seen[-1][0].rewards.sum(1).double(), expected, rtol=1e-5, atol=1e-5)


# --- resuming


@pytest.mark.parametrize(
    "changes", [{}, {"critic": "head", "lora_rank": 2}, {"lora_rank": 2, "minibatches": 2}, {"precision": "bfloat16"}]
)
def test_it_resumes_exactly(config, folder, tmp_path, changes):
    """Weights of policy and critic, price, moments of the scores, and everything logged."""
    settings = config(steps=5, save_every=2, kl_target=0.1, normalize_rewards=True, **changes)
    whole = PPO(str(folder), ROWS, high_ids, settings).train()
    first = PPO(str(folder), ROWS, high_ids, settings.model_copy(update={"out": tmp_path / "cut"}))
    steps = first.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    resumed = PPO.resume(tmp_path / "cut", rewards=high_ids, dataset=ROWS).train()
    assert untimed(resumed.run.records()) == untimed(whole.run.records())
    assert resumed.controls.tensors() == whole.controls.tensors()
    for name in ("optimizer", "critic"):
        file = f"checkpoints/step-000005/{name}.safetensors"
        assert (resumed.run.directory / file).read_bytes() == (whole.run.directory / file).read_bytes()


# --- one trunk


def bytes_of(*modules):
    """Memory of all parameters, those that are shared counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(storages.values())


def test_under_lora_one_trunk_carries_actor_critic_and_reference(config, folder):
    settings = config(lora_rank=1, lora_targets=("q_proj",), learning_rate=3e-2, steps=2)
    trainer = PPO(str(folder), ROWS, high_ids, settings)
    alone = bytes_of(load_model(str(folder), dtype=torch.float32))
    critic, policy = trainer.critic, trainer.policy
    assert trainer.trained_models() == [policy.model]
    assert bytes_of(policy.model, critic.model, critic.head) < 1.05 * alone
    trainer.train()
    state = policy.model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = [n for n in state if n.replace(".base_layer", "").endswith(name) and "lora_" not in n]
        assert own
        assert all(torch.equal(state[n], tensor) for n in own)
    for adapter in ("default", "critic"):
        weights = [w for name, w in policy.adapter_parameters(adapter) if "lora_B" in name]  # 0 at first
        assert weights
        assert any(bool(w.any()) for w in weights)
    ids = torch.tensor([[3, 32, 43, 33, 1, 4]])
    with torch.no_grad():
        with policy.adapter("critic") as model:
            values = model(ids).logits
        own = policy.model(ids).logits
        assert not torch.allclose(values, own)
        loaded = load_model(str(trainer.run.directory / "final"), dtype=torch.float32)
        torch.testing.assert_close(loaded(ids).logits, own, rtol=0, atol=1e-6)
    assert not list((trainer.run.directory / "final").glob("critic*"))


@pytest.fixture
def reward_adapter(folder, tmp_path):
    """A reward model's folder as LoRA training leaves it: an adapter on the policy's base, and a head."""
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = LoraConfig(r=1, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_reward_model_critic_and_reference_that_are_adapters_read_the_policys_frozen_weights(
    config, folder, reward_adapter
):
    """Four whole models as they are loaded, each with a base of its own; afterwards there is one base."""
    reference = get_peft_model(tiny_model(), LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    settings = config(lora_rank=1, lora_targets=("q_proj",), learning_rate=3e-2, steps=2)
    trainer = PPO(
        str(folder), ROWS, f"model:{reward_adapter}", settings, critic=str(reward_adapter), reference=reference
    )
    critic, (judge,) = trainer.critic, trainer.rewards.models
    alone = bytes_of(load_model(str(folder), dtype=torch.float32))
    head = bytes_of(load_model(str(folder), dtype=torch.float32).lm_head)
    assert bytes_of(trainer.policy.model, critic.model, critic.head, judge, reference) < 1.1 * alone + head
    score = load_file(reward_adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    torch.testing.assert_close(critic.head.weight.detach(), score, rtol=0, atol=0)
    started = {name: weight.detach().clone() for name, weight in critic.named_parameters()}
    ids = torch.tensor([[3, 32, 43, 33, 1, 4]])
    with torch.no_grad():
        judged = judge(ids).logits
        torch.testing.assert_close(critic.model(ids).logits, judged)
    trainer.train()
    with torch.no_grad():
        torch.testing.assert_close(judge(ids).logits, judged, rtol=0, atol=0)
    for name, weight in critic.named_parameters():
        assert "lora_" in name or name.startswith("head.")
        assert not torch.equal(weight, started[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_judge_takes_the_policys_dtype_where_they_share_a_base_and_that_is_said(
    config, folder, reward_adapter, capfd, precision
):
    settings = config(lora_rank=1, lora_targets=("q_proj",), precision=precision, eval_rows=0, steps=1)
    trainer = PPO(str(folder), ROWS, f'model:{reward_adapter}(precision="float32")', settings)
    (judge,) = trainer.rewards.models
    assert judge.dtype == trainer.policy.model.dtype
    assert bytes_of(trainer.policy.model, judge) - bytes_of(trainer.policy.model) < bytes_of(judge) / 4
    trainer.train()
    assert "the reward model reads" in " ".join(capfd.readouterr().err.split())


def test_a_judge_of_less_precision_shares_nothing_and_that_is_said(config, folder, reward_adapter, capfd):
    settings = config(lora_rank=1, lora_targets=("q_proj",), out=None)
    PPO(str(folder), ROWS, f'model:{reward_adapter}(precision="bfloat16")', settings)
    said = " ".join(capfd.readouterr().err.split())
    assert "the reward model shares nothing with the policy: its weights are bfloat16, the policy's float32" in said


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_adapters_head_is_the_critics(config, folder, reward_adapter, task, rank):
    file = reward_adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": task}))
    trainer = PPO(str(folder), ROWS, high_ids, config(lora_rank=rank), critic=str(reward_adapter))
    score = load_file(reward_adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    torch.testing.assert_close(trainer.critic.head.weight.detach(), score, rtol=0, atol=0)


def test_a_whole_policy_merges_a_critics_adapter(config, folder, reward_adapter):
    trainer = PPO(str(folder), ROWS, high_ids, config(steps=1), critic=str(reward_adapter))
    names = [name for name, _ in trainer.critic.named_parameters()]
    assert not any("lora_" in name for name in names)
    assert len(names) == 2 + len(list(trainer.policy.model.model.named_parameters()))
    trainer.train()


def test_gradient_checkpointing_changes_nothing_but_rounding(config, folder, tmp_path):
    for rank in (0, 2):
        records = []
        for on in (False, True):
            settings = config(out=tmp_path / f"{rank}{on}", gradient_checkpointing=on, lora_rank=rank, epochs=1)
            records.append(untimed(PPO(str(folder), ROWS, high_ids, settings).train().run.records()))
        for without, with_it in zip(*records, strict=True):
            for name, value in without.items():
                assert with_it[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"critic": "none", "truncated": "bootstrap"},
            "truncated is bootstrap, but without a critic there is no value",
        ),
        ({"kl_place": "loss"}, "kl_estimator is k1, whose gradient as a loss is 0"),
        ({"kl_target": 1.0, "kl_coefficient": 0.0}, "kl_target needs a kl_coefficient above 0"),
        ({"whiten": "group", "group_size": 1}, "whiten is group, but group_size is 1"),
        ({"environment": "a:b", "rewards": ("last_number",)}, "an environment gives prompts and rewards itself"),
        ({"critic": "none", "truncated": "mask", "value_warmup_steps": 1}, "value_warmup_steps needs a critic"),
        ({"critic": "none", "truncated": "mask"}, "trace_decay is 0.95, but without a critic"),
        ({"environment": "a:b", "eval_dataset": "rows.jsonl"}, "an environment gives prompts and rewards itself"),
        ({"minibatches": 5}, "minibatches 5 exceed prompts_per_step 4"),
    ],
)
def test_settings_that_do_not_fit_together(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 2}, "max_turns is 2, but there is no environment"),
        ({"truncated": "mask", "missing_eos_penalty": 2.0}, "missing_eos_penalty is 2.0, but truncated is mask"),
        ({"value_coefficient": 0.5}, "value_coefficient is 0.5, but the critic is no head"),
        ({"kl_coefficient": 0.0, "kl_estimator": "k2"}, "kl_estimator is 'k2', but kl_coefficient is 0"),
        ({"kl_gain": 1.0}, "kl_gain is 1.0, but without a kl_target"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(config, folder, changes, message):
    with pytest.raises(InputError, match=message):
        PPO(str(folder), ROWS, high_ids, config(**changes))


def test_settings_of_data_are_refused_beside_an_environment(config, folder):
    with pytest.raises(InputError, match=r"columns is .*, but an environment gives prompts and rewards itself"):
        PPO(str(folder), config=config(columns={"question": "prompt"}), environment=lambda seed: None)


def test_rewards_that_never_apply_change_nothing_and_stop_nothing(config, folder):
    trainer = PPO(str(folder), ROWS, lambda completions, **_: [None] * len(completions), config(steps=1))
    parts = {"policy": trainer.policy.model, "trunk": trainer.critic.model, "head": trainer.critic.head}
    before = {(part, name): t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}
    assert trainer.train().run.records()[-1]["loss"] == 0
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[part, name]), (part, name)


def test_where_nothing_was_measured_the_price_stays(config, folder):
    settings = config(steps=2, kl_target=1.0)
    trainer = PPO(str(folder), ROWS, lambda completions, **_: [None] * len(completions), settings).train()
    assert trainer.controls.coefficient == settings.kl_coefficient


def test_in_the_value_warm_up_the_price_stays(config, folder):
    """And in the step after it, whose completions come from the starting weights, unless the reference is another."""
    settings = config(steps=4, kl_target=1.0, value_warmup_steps=2)
    trainer = PPO(str(folder), ROWS, high_ids, settings).train()
    prices = [record["kl_coefficient"] for record in trainer.run.records() if "kl_coefficient" in record]
    assert prices == [settings.kl_coefficient] * 4
    assert trainer.controls.coefficient != settings.kl_coefficient  # of the fifth step
    settings = config(steps=2, kl_target=1.0, value_warmup_steps=1, out=settings.out.parent / "moves")
    trainer = PPO(str(folder), ROWS, high_ids, settings, reference=tiny_model(seed=1))
    found = [record["kl_coefficient"] for record in trainer.steps()]
    assert found == [settings.kl_coefficient] * 2
    assert trainer.controls.coefficient != settings.kl_coefficient  # of the third step


def test_an_update_of_the_critic_that_is_not_taken_is_counted_and_said(config, folder, capfd):
    trainer = PPO(str(folder), ROWS, high_ids, config(steps=1, epochs=1, eval_rows=0, out=None))
    with torch.no_grad():
        trainer.critic.head.weight.fill_(1e30)  # finite values, whose squares are not
    (record,) = trainer.steps()
    assert record["value/updates_skipped"] == 1
    assert "1 of the critic's updates not taken" in " ".join(capfd.readouterr().err.split())


def test_a_step_that_fails_leaves_policy_critic_and_scale_as_the_last_whole_step_did(config, folder, monkeypatch):
    settings = {"normalize_rewards": True, "kl_coefficient": 0.0, "stop_after_non_finite": 1, "eval_rows": 0}
    trainer = PPO(str(folder), ROWS, high_ids, config(steps=3, save_every=3, **settings))
    steps = trainer.steps()
    for _ in range(2):
        next(steps)
    whole = {name: state.tensors() for name, state in trainer.state.items()}
    whole = {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in whole.items()}
    loss = trainer._policy_loss
    monkeypatch.setattr(trainer, "_policy_loss", lambda *arguments: loss(*arguments) * torch.nan)
    with pytest.raises(RunError, match="gradient norm nan: not finite"):
        next(steps)
    saved = PPO.resume(trainer.run.directory, dataset=ROWS, rewards=high_ids)
    assert saved.run.step == 2
    for name, state in saved.state.items():
        assert state.tensors().keys() == whole[name].keys()
        for key, tensor in state.tensors().items():
            assert torch.equal(tensor, whole[name][key]), (name, key)


def test_a_reward_beyond_float32_is_refused_before_anything_is_learned(config, folder):
    with pytest.raises(InputError, match=r"a reward of size 1e\+39 is beyond torch.float32: set reward_clip"):
        PPO(str(folder), ROWS, lambda completions, **_: [1e39] * len(completions), config(steps=1)).train()


def test_a_reward_model_may_be_an_object(config, folder, tmp_path):
    torch.manual_seed(4)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    judge.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    found = [
        PPO(str(folder), ROWS, [given], config(steps=1, out=tmp_path / name)).train().run.records()[-1]
        for name, given in {"object": judge, "folder": f"model:{tmp_path / 'rm'}"}.items()
    ]
    assert untimed([found[0]]) == untimed([found[1]])


def test_what_a_cut_off_completion_earns_by_default_is_kept_for_the_resume(config, folder):
    cut_off = {"truncated": None, "missing_eos_penalty": 0.5, "max_tokens": 2, "stop": ()}
    run = PPO(str(folder), ROWS, letter_a, config(steps=1, eval_rows=0, **cut_off)).train().run
    assert json.loads((run.directory / "environment.json").read_text())["truncated"] == "penalty"
    resumed = PPO.resume(run.directory, dataset=ROWS, rewards=letter_a, steps=2).train()
    assert resumed.config.truncated == "penalty"
    assert resumed.run.records()[-1]["value/mean"] < 0  # the first step taught that all lose by being cut off


@pytest.mark.parametrize("truncated", ["bootstrap", "mask"])
def test_where_every_completion_is_cut_off_that_is_said(config, folder, capfd, truncated):
    """No score counts then, and nothing but the price of the divergence is learned."""
    changes = {"truncated": truncated, "missing_eos_penalty": 1.0, "max_tokens": 2, "eval_rows": 0, "stop": ()}
    PPO(str(folder), ROWS, high_ids, config(**changes)).train()
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("every completion was cut off at max_tokens 2, so no score counts") == 1


def saved_judge(directory, seed):
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).save_pretrained(directory)


def test_a_run_resumes_with_no_other_reward_model(config, tmp_path):
    judge = save_tiny_policy(tmp_path / "judge")
    saved_judge(judge, 1)
    settings = config(steps=1, rewards=(f"model:{judge}",), eval_rows=0)
    model = save_tiny_policy(tmp_path / "model")
    PPO(str(model), ROWS, config=settings).train()
    assert PPO.resume(settings.out, dataset=ROWS, steps=2).train().run.step == 2
    tiny_model(seed=1).save_pretrained(judge)
    saved_judge(judge, 2)
    with pytest.raises(InputError, match="of its reference or of a reward model, are not those that it began with"):
        PPO.resume(settings.out, dataset=ROWS, steps=3)


def test_a_critic_that_starts_from_a_reward_model_has_the_scale_of_normalised_rewards(config, folder, tmp_path):
    judge = save_tiny_policy(tmp_path / "judge")
    saved_judge(judge, 1)
    RewardNote(mean=2.0, deviation=4.0).write(judge)
    heads = [
        PPO(str(folder), ROWS, high_ids, config(critic=str(judge), normalize_rewards=on, out=None)).critic.head
        for on in (False, True)
    ]
    hidden = torch.randn(3, 5, heads[0].weight.shape[1])
    torch.testing.assert_close(heads[1](hidden), (heads[0](hidden) - 2.0) / 4.0)


def test_a_critic_that_cannot_start_on_that_scale_says_so(config, folder, tmp_path, capfd):
    judge = save_tiny_policy(tmp_path / "judge")
    saved_judge(judge, 1)
    for normalized, critic in ((False, str(judge)), (True, "copy"), (True, str(folder)), (True, str(judge))):
        said = " ".join(capfd.readouterr().err.split())
        assert "the scale of the critic's scores is not known" not in said
        PPO(str(folder), ROWS, high_ids, config(critic=critic, normalize_rewards=normalized, out=None))
    assert "the scale of the critic's scores is not known" in " ".join(capfd.readouterr().err.split())


def test_an_adapter_given_as_an_object_reads_as_its_own_folder_says(reward_adapter):
    """Not as its base's, which its config names."""
    RewardNote(mean=2.0, deviation=4.0, system_prompt="Be brief.").write(reward_adapter)
    judge = load_model(str(reward_adapter), dtype=torch.float32, head="sequence")
    asked = {"prompts": [[{"role": "user", "content": "1+1?"}]], "completions": ["2"]}
    by_object, by_name = (
        reward_model(judge if given else str(reward_adapter), normalize=True) for given in (True, False)
    )
    assert by_object(**asked) == by_name(**asked)
    assert by_object.conversations.system_prompt == "Be brief."


def test_the_scale_of_an_adapter_is_that_of_its_own_folder(config, folder, tmp_path):
    pairs = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)]
    settings = RewardConfig(out=tmp_path / "rm", steps=1, lora_rank=2, threads=1, precision="float32", eval_rows=2)
    Reward(str(folder), pairs, settings).train()
    judge = tmp_path / "rm" / "final"
    note = RewardNote.of(judge)
    heads = [
        PPO(str(folder), ROWS, high_ids, config(critic=str(judge), normalize_rewards=on, out=None)).critic.head
        for on in (False, True)
    ]
    hidden = torch.randn(3, 5, heads[0].weight.shape[1])
    torch.testing.assert_close(heads[1](hidden), (heads[0](hidden) - note.mean) / note.deviation)


@pytest.mark.parametrize("critic", ["copy", "none"])
def test_frozen_adapter_weights_stay_frozen_when_adapters_are_switched(config, folder, critic):
    changes = {} if critic == "copy" else {"trace_decay": 1.0}
    settings = config(steps=2, lora_rank=2, freeze=("*layers.0*",), critic=critic, eval_rows=0, **changes)
    trainer = PPO(str(folder), ROWS, high_ids, settings)
    frozen = {n for n, w in trainer.policy.model.named_parameters() if not w.requires_grad}
    assert any("lora_" in name for name in frozen)
    trainer.train()
    found = dict(trainer.policy.model.named_parameters())
    assert {name for name, weight in found.items() if not weight.requires_grad} == frozen
    assert all(found[name].grad is None for name in frozen)
