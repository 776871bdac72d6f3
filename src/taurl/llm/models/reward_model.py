"""A reward model in training: a causal language model whose last layer gives one score."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from taurl.llm.models.heads import causal_lm
from taurl.llm.models.loading import load_model
from taurl.llm.models.policies import Policy
from taurl.llm.models.reward_folder import RewardNote
from taurl.llm.scoring.reward_scores import check_scores, head_kind, pad_token_id


class RewardModel(Policy):
    """Scores sequences. It loads from any causal language model, or goes on from a reward model.

    The pad token is the model's own, so that its export is pooled as it was trained; a model without one gets the
    tokenizer's. The tokenizer pads with the same.

    Attributes:
        note: what goes into the folder beside the weights.
    """

    adapter_task = "SEQ_CLS"
    note = RewardNote()

    def _load(self, name: str | Path, **options: Any) -> PreTrainedModel:
        return load_model(name, head="sequence", new_head=True, **options)

    def _check(self) -> None:
        if pad_token_id(self.model) is None:
            causal_lm(self.model).config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        pad = pad_token_id(self.model)
        if pad is not None and 0 <= pad < len(self.tokenizer):
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
        head_kind(self.model)
        check_scores(self.model)

    def export(self, directory: Path, *, merge: bool = False, card: str | None = None) -> None:
        """Write a folder that `AutoModelForSequenceClassification` (with an adapter: `peft`) loads."""
        super().export(directory, merge=merge, card=card)
        self.note.model_copy(update={"pad_token_id": pad_token_id(self.model)}).write(directory)


class ProcessRewardModel(RewardModel):
    """Scores every token; read at the end of each step (`AutoModelForTokenClassification`)."""

    adapter_task = "TOKEN_CLS"
    adapter_excludes = ("score", "classifier")  # trained whole, as peft does of itself for sequences

    def _load(self, name: str | Path, **options: Any) -> PreTrainedModel:
        return load_model(name, head="token", new_head=True, **options)
