"""What is wrong with the data is said before the weights are loaded, which takes long for a large model."""

import pytest
from tiny_policy import save_tiny_policy, tiny_tokenizer

from taurl.llm import DPO, GRPO, PPO, SFT, DPOConfig, GRPOConfig, PPOConfig, Reward, RewardConfig, SFTConfig
from taurl.runtime.errors import InputError

TRAINERS = [
    (GRPO, GRPOConfig, {"rewards": ("last_number",)}),
    (PPO, PPOConfig, {"rewards": ("last_number",)}),
    (SFT, SFTConfig, {}),
    (DPO, DPOConfig, {}),
    (DPO, DPOConfig, {"rewards": ("last_number",)}),
    (Reward, RewardConfig, {}),
]


@pytest.mark.parametrize(("trainer", "config", "given"), TRAINERS)
def test_an_unreadable_row_is_named_though_the_model_has_no_weights(tmp_path, trainer, config, given):
    folder = save_tiny_policy(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?"}\n{"prompt": \n')
    settings = config(out=tmp_path / "run", threads=1, precision="float32", **given)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: "):
        trainer(str(folder), str(tmp_path / "rows.jsonl"), config=settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("trainer", "config", "given"), TRAINERS)
def test_a_token_that_the_model_does_not_know_is_named_with_its_row(tmp_path, trainer, config, given):
    """As where tokens were added to the tokenizer alone."""
    folder = save_tiny_policy(tmp_path / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    answers = {"completion": "2", "chosen": "2", "rejected": "3"}
    if trainer is SFT:
        answers = {"completion": "2"}
    rows = [{"prompt": f"1+{i}?", **answers} for i in range(4)]
    given = {"max_tokens": 8, **given} if given else {}
    place = "prompt" if given else "completion" if trainer is SFT else "chosen"
    rows[2] |= {place: "1+2?<new>"}
    settings = config(out=tmp_path / "run", threads=1, precision="float32", **given)
    with pytest.raises(InputError, match=r"^row 3 of the data: it has token 45, and the model knows 45 tokens"):
        trainer(str(folder), rows, config=settings)
