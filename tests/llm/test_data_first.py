"""What is wrong with the data is said before the weights are loaded, which takes long for a large model."""

import pytest
from tiny_policy import save_tiny_policy

from taurl.llm import DPO, GRPO, PPO, SFT, DPOConfig, GRPOConfig, PPOConfig, Reward, RewardConfig, SFTConfig
from taurl.runtime.errors import InputError


@pytest.mark.parametrize(
    ("trainer", "config", "given"),
    [
        (GRPO, GRPOConfig, {"rewards": ("last_number",)}),
        (PPO, PPOConfig, {"rewards": ("last_number",)}),
        (SFT, SFTConfig, {}),
        (DPO, DPOConfig, {}),
        (DPO, DPOConfig, {"rewards": ("last_number",)}),
        (Reward, RewardConfig, {}),
    ],
)
def test_an_unreadable_row_is_named_though_the_model_has_no_weights(tmp_path, trainer, config, given):
    folder = save_tiny_policy(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?"}\n{"prompt": \n')
    settings = config(out=tmp_path / "run", threads=1, precision="float32", **given)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: "):
        trainer(str(folder), str(tmp_path / "rows.jsonl"), config=settings)
    assert not (tmp_path / "run").exists()
