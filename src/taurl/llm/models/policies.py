"""The policy that is trained: model, tokenizer, adapter, and the reference it started from."""

import copy
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.data.chat import stop_token_ids
from taurl.llm.generation import Generator, SlotSampler, TransformersSampler
from taurl.llm.generation.packed import is_half
from taurl.llm.models.heads import causal_lm, check_head
from taurl.llm.models.hub import quiet_transformers
from taurl.llm.models.loading import load_model, load_tokenizer, origin
from taurl.llm.models.precision import cast_weights
from taurl.llm.models.trainable import freeze_parameters, layer_factors
from taurl.llm.settings import LoraSettings
from taurl.runtime.config import TrainingConfig
from taurl.runtime.errors import InputError
from taurl.runtime.machine import out_of_memory_names
from taurl.runtime.optimization import Optimizer

# A step of decoding reads all weights, for however many sequences. On a CPU arithmetic has caught up with that at a few
# dozen; on a GPU it takes hundreds.
SLOTS, SLOTS_ON_GPU = 64, 256
MERGE = "merge it into the weights first (taurl llm ALGORITHM --resume RUN --merge-adapter, of the run that made it)"


def tokenizer_of(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model given by name or as an object.

    Raises: InputError for an object that does not know its name.
    """
    name = model if isinstance(model, str) else origin(model)
    if not name:
        raise InputError("this model object does not know its name; give its tokenizer as well")
    return load_tokenizer(name)


class Policy:
    """A causal language model ready for reinforcement learning: dropout off, and a LoRA adapter if asked for.

    Args:
        model: a model object (trained in place), or a name for `load_model`.
        tokenizer: by default the model's own.
        settings: which weights are trained; by default all.
        dtype: of the weights; None leaves a model object's as they are.
        keep_reference: keep the starting weights, for a KL term. With a new adapter they are there already; of an
            adapter that the model brings, and of all else that is trained, a copy is made.
    """

    adapter_task = "CAUSAL_LM"  # by peft's names
    adapter_excludes: tuple[str, ...] = ()

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: LoraSettings | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        keep_reference: bool = False,
        gradient_checkpointing: bool = False,
    ):
        name = model if isinstance(model, str) else model.config.name_or_path
        self.tokenizer = tokenizer or tokenizer_of(model)
        settings = settings or LoraSettings()
        self.name, self.in_4bit = name or "", settings.load_in_4bit
        if isinstance(model, str):
            dtype = dtype or torch.float32
            self.model: Any = self._load(model, dtype=dtype, device=device, in_4bit=self.in_4bit)
        elif self.in_4bit:
            raise InputError("load_in_4bit loads a model by its name; this one came as an object, loaded already")
        else:
            self.model = cast_weights(model, dtype, device)
        self.has_adapter = hasattr(self.model, "peft_config")
        self.adapter_is_new = False
        self.new_tokens: tuple[int, ...] = ()
        if settings.lora_rank:
            self._add_lora(settings)
            self.model.peft_config["default"].base_model_name_or_path = base_name(
                name or "", self.model.config.name_or_path
            )
        if getattr(self.model, "is_quantized", False) and not self.has_adapter:
            raise InputError(f"the weights of model {name!r} are quantised and cannot be trained: give lora_rank")
        freeze_parameters(self.model, settings.freeze)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            advice = f"an adapter loads frozen: {MERGE}" if self.has_adapter else "look at freeze"
            raise InputError(f"model {name!r} has no weights to train: all are frozen ({advice})")
        switch_off_dropout(self.model)
        self._check()
        self._reference = None
        if keep_reference and not self.adapter_is_new:
            self._reference = copy.deepcopy(self.model).eval().requires_grad_(False)
            share_weights(self._reference, self.model)  # what is frozen stays as it is
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable()
            self.model.train()  # transformers checkpoints in training mode only; dropout is off either way
            self._require_repeatable()
        else:
            self.model.eval()

    def _load(self, name: str | Path, **options: Any) -> PreTrainedModel:
        """`load_model`, with the head that this kind of policy has."""
        return load_model(name, **options)

    @torch.no_grad()
    def _require_repeatable(self) -> None:
        """Refuse a model that draws numbers in training mode: what it samples would not be what is trained."""
        ids = torch.tensor([[1, 2, 3, 1]], device=self.model.device)
        one, other = (self.model(ids, use_cache=False)[0] for _ in range(2))
        if not torch.equal(one, other):
            raise InputError(
                f"gradient_checkpointing runs model {self.name!r} in training mode, where it is random (a dropout or a "
                "noise that could not be switched off): leave it out, and lower tokens_per_part"
            )

    def _check(self) -> None:
        """Refuse a model whose output would be read wrongly."""
        check_head(self.model)

    def optimizer(self, config: TrainingConfig, *, layer_decay: float = 1.0) -> Optimizer:
        """An optimiser of the weights that are trained."""
        factors = layer_factors(self.model, layer_decay)
        return Optimizer(self.model.named_parameters(), config, factors=factors)

    def _add_lora(self, settings: LoraSettings) -> None:
        from peft import LoraConfig, get_peft_model  # takes a second to import

        if self.has_adapter:
            raise InputError(f"model {self.name!r} has an adapter already, and gets no second one: {MERGE}")
        targets = settings.lora_targets
        pattern = isinstance(targets, str) and re.search(r"[*+?|()\[\]\\^$]", targets)  # peft takes any string for one
        names = [targets] if isinstance(targets, str) else list(targets)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=names[0] if pattern or names == ["all-linear"] else names,
            exclude_modules=list(self.adapter_excludes) or None,
            use_dora=settings.use_dora,
            task_type=self.adapter_task,
        )
        try:
            with quiet_transformers():
                in_float32 = not self._rounds_adapters(settings)
                self.model = get_peft_model(self.model, config, autocast_adapter_dtype=in_float32)
        except ValueError as error:
            raise InputError(f"lora_targets is {targets!r}: {str(error).splitlines()[0]}") from error
        self.has_adapter = self.adapter_is_new = True

    def _rounds_adapters(self, settings: LoraSettings) -> bool:
        """Whether a new adapter is in bfloat16 as the weights are, with float32 masters in the optimiser as they have.

        Not DoRA, whose lengths would stay put for many steps, nor beside quantised weights.
        """
        plain = not settings.use_dora and not getattr(self.model, "is_quantized", False)
        return plain and self.model.dtype == torch.bfloat16

    def train_tokens(self, tokens: Sequence[int]) -> None:
        """Train the embeddings of tokens that are new to the model beside the adapter, which leaves them frozen.

        They are not in the adapter, so the result is written merged.
        """
        self.new_tokens = tuple(tokens)
        layers = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        for weight in {id(layer.weight): layer.weight for layer in layers if layer is not None}.values():
            rows = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)
            rows[list(tokens)] = 1
            weight.requires_grad_(True).register_hook(lambda gradient, rows=rows: gradient * rows)

    def add_adapter(self, name: str) -> None:
        """Put a copy of the policy's own adapter beside it on the frozen trunk, under this name; see `adapter`."""
        own = self.model.active_adapter
        with self._freezing_as_it_is():
            self.model.add_adapter(name, copy.deepcopy(self.model.peft_config[own]))
        mine = dict(self.adapter_parameters(own))
        for path, weight in self.adapter_parameters(name):
            weight.data = mine[".".join(own if part == name else part for part in path.split("."))].detach().clone()
            weight.requires_grad_(True)
        switch_off_dropout(self.model)
        self._activate(own)

    def adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The weights of an adapter, by their names in the model."""
        return [(path, weight) for path, weight in self.model.named_parameters() if name in path.split(".")]

    @contextmanager
    def adapter(self, name: str) -> Iterator[nn.Module]:
        """The model with another of its adapters in place of the policy's own; forward and backward go in here."""
        own = self.model.active_adapter
        self._activate(name)
        try:
            yield self.model
        finally:
            self._activate(own)

    def _activate(self, name: str) -> None:
        with self._freezing_as_it_is():
            self.model.set_adapter(name)

    @contextmanager
    def _freezing_as_it_is(self) -> Iterator[None]:
        """What is trained and what is frozen stays so: peft freezes what is not active, and thaws what is."""
        trained = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        try:
            yield
        finally:
            for weight, is_trained in trained:
                weight.requires_grad_(is_trained)

    def use_reference(self, model: str | PreTrainedModel) -> None:
        """Take another model, by name or as an object, as the reference in place of the starting weights."""
        loaded = (
            load_model(model, dtype=self.model.dtype, device=self.model.device) if isinstance(model, str) else model
        )
        other: Any = cast_weights(loaded, self.model.dtype, self.model.device)
        self._reference = other.eval().requires_grad_(False)
        switch_off_dropout(loaded)
        share_weights(loaded, self.model)

    @property
    def own_reference(self) -> nn.Module | None:
        """The reference, where it is a model of its own."""
        return self._reference

    def reference_weights(self) -> Iterable[Tensor]:
        """Those of a reference that is a model of its own."""
        return () if self._reference is None else self._reference.parameters()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model with its starting weights, or the one taken in its place."""
        if self._reference is not None:
            yield self._reference
        else:
            assert self.adapter_is_new, "made without keep_reference"
            with self._freezing_as_it_is(), self.model.disable_adapter():
                yield self.model

    def exports_adapter(self, *, merge: bool) -> bool:
        """Whether `export` writes an adapter alone, and no whole weights."""
        return self.has_adapter and not (merge or self.new_tokens)

    def export(self, directory: Path, *, merge: bool = False, card: str | None = None) -> None:
        """Write a folder that `transformers` (with an adapter: `peft`) loads.

        It holds weights as safetensors, config, tokenizer with chat template, generation config, and a model card.

        Args:
            merge: write whole weights with the adapter merged into them, as is done where new tokens were trained.
            card: text of its README.md.
        """
        with quiet_transformers(), out_of_memory_names("the model's size, or leave merge_adapter out"):
            model, chosen = self.model, {}
            if self.exports_adapter(merge=merge):
                name = self.model.active_adapter
                chosen = {"selected_adapters": [name]}  # of several the policy's own
            elif self.has_adapter:
                model = self.merged()
            model.save_pretrained(directory, safe_serialization=True, **chosen)
            if chosen and (directory / name).is_dir():  # where peft puts an adapter that has a name
                for path in (directory / name).iterdir():
                    path.replace(directory / path.name)
                (directory / name).rmdir()
            if getattr(model, "generation_config", None) is not None:  # a model that gives scores has none
                model.generation_config.save_pretrained(directory)  # which peft leaves out
            self.tokenizer.save_pretrained(directory)
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")

    def merged(self) -> PreTrainedModel:
        """A copy of the model on the CPU with its adapter merged into the weights, in 32 bits at least.

        In 16 bits much of what a few steps have learned is less than the rounding of a weight.
        """
        if not self.in_4bit:
            copied = copied_to_cpu(self.model)
            return merged_into_base(copied.float() if is_half(self.model.dtype) else copied)
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:  # onto weights that were never rounded to 4 bits
            self.model.save_pretrained(folder, safe_serialization=True)
            base = self._load(self.name, dtype=torch.float32, device="cpu")
            adapted: Any = PeftModel.from_pretrained(base, folder)
            merged = merged_into_base(adapted)
            merged.generation_config = self.model.generation_config  # with the stop tokens that the run has set
            return merged


def merged_into_base(adapted: Any) -> PreTrainedModel:
    """The base model with its adapter merged into it.

    An adapter of the input embeddings was trained beside a head that stayed as it was: a head that shares their weight
    gets one of its own.
    """
    plain: Any = causal_lm(adapted)
    embeddings, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    if hasattr(embeddings, "lora_embedding_A") and head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        plain.config.tie_word_embeddings = False
    return cast(PreTrainedModel, adapted.merge_and_unload())


def copied_to_cpu(model: Any) -> Any:
    """A copy of a model with its weights on the CPU, and none made beside them; a quantised one stays where it is."""
    if getattr(model, "is_quantized", False):
        return copy.deepcopy(model)
    # What deepcopy finds under the id of a tensor it takes for the copy of it.
    copies: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    for weight in model.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(model, copies)


def base_name(name: str, loaded_from: str) -> str:
    """How an adapter names its base: a hub name as it is, so that it holds elsewhere; a folder by its whole path."""
    is_folder = Path(name).expanduser().is_dir()
    return name if ("/" in name and not is_folder) or not loaded_from else str(Path(loaded_from).resolve())


def make_generator(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    slots: int | None,
    kv_memory_gb: float | None = None,
) -> Generator:
    """The slot sampler ("slots", "cuda_graphs"), or `model.generate` ("transformers"), with the model's stop tokens."""
    if slots is None:
        slots = SLOTS_ON_GPU if model.device.type == "cuda" else SLOTS
    stops = stop_token_ids(model, tokenizer)
    if kind == "transformers":
        return TransformersSampler(model, stop_token_ids=stops, tokenizer=tokenizer)
    graphs = kind == "cuda_graphs"
    return SlotSampler(
        model, stop_token_ids=stops, tokenizer=tokenizer, slots=slots, kv_memory_gb=kv_memory_gb, cuda_graphs=graphs
    )


DROPOUTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "residual_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "attn_dropout",
    "attn_dropout_p",
    "resid_pdrop",
    "dropout_p",
    "layerdrop",
)


def switch_off_dropout(model: nn.Module) -> None:
    """Dropout off for good, in modules and in attention: sampled and trained distribution are then the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def share_weights(model: nn.Module, trunk: nn.Module) -> int:
    """Let a model read the frozen weights of another one wherever its own are frozen and equal to them.

    A reward model, or a reference, that is an adapter on the same base as the policy's then costs no second base.

    Returns: how many bytes were given back.
    """
    named = trunk.named_parameters(remove_duplicate=False)  # a tied head by both its names
    frozen = {bare_name(name): weight for name, weight in named if not weight.requires_grad}
    given_back: dict[int, nn.Parameter] = {}  # by address, so that a tied one counts once
    for path, module in model.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            twin = frozen.get(bare_name(f"{path}.{name}"))
            if twin is None or twin is weight or weight.requires_grad:
                continue
            if twin.dtype == weight.dtype and twin.device == weight.device and torch.equal(twin, weight):
                setattr(module, name, twin)
                given_back[weight.data_ptr()] = weight
    return sum(weight.nbytes for weight in given_back.values())


def bare_name(name: str) -> str:
    """A weight's name in the model itself, whatever `peft` has wrapped around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
