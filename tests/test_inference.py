"""What load_for_inference gives answers as the trained module does, wherever it comes from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.chats import ids_of
from helpers.checkpoints import train as train_briefly
from helpers.models import tiny_model, tiny_tokenizer
from helpers.modules import data
from helpers.trained import fit, train
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning import (
    CausalLMModule,
    adapters_disabled,
    load_for_inference,
    lora_layers,
)
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.checkpoint.io import KEY
from milora_lightning.inference import _end_as_trained, device_named, kind_of

QUESTION = [{"role": "user", "content": "What is 1 plus 2?"}]
TEMPLATES = ["alpaca", "chat"]


@pytest.fixture(scope="module", params=TEMPLATES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a checkpoint and both exports."""
    return train(tmp_path_factory.mktemp(request.param), request.param)


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    ids = torch.tensor([ids_of(tokenizer, QUESTION, add_generation_prompt=True)])
    with torch.no_grad():
        return model(input_ids=ids).logits


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = torch.tensor([ids_of(tokenizer, QUESTION, add_generation_prompt=True)])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", ["a.ckpt", "peft", "merged"])
def test_every_kind_computes_what_was_trained(trained: Path, kind: str, merge: bool) -> None:
    module = CausalLMModule.load_from_checkpoint(trained / "a.ckpt", map_location="cpu").eval()
    model, tokenizer = load_for_inference(trained / kind, merge=merge, device="cpu")
    assert not model.training
    assert bool(lora_layers(model)) == (not merge and kind != "merged")
    own = module.prompt_format.applied_to(module.tokenizer)
    want = logits(module.model, own)
    torch.testing.assert_close(logits(model, tokenizer), want, rtol=1e-4, atol=1e-5)
    assert answer(model, tokenizer) == module.generate("What is 1 plus 2?")
    assert model.generation_config.eos_token_id[-1] == tokenizer.convert_tokens_to_ids(module.prompt_format.end_of_turn)
    base, base_tokenizer = load_for_inference(trained / "base", device="cpu")
    assert not torch.allclose(logits(base, own), want, atol=1e-2)  # negative control
    if lora_layers(model):
        with adapters_disabled(model):
            assert torch.equal(logits(model, own), logits(base, own))
    assert base_tokenizer.chat_template == module.tokenizer.chat_template


def test_a_checkpoint_of_full_training_is_taken_too(tmp_path: Path) -> None:
    path = fit(tmp_path, "alpaca", adapters=False)
    module = CausalLMModule.load_from_checkpoint(path, map_location="cpu").eval()
    model, tokenizer = load_for_inference(path, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(model, tokenizer), logits(module.model, tokenizer))
    assert not torch.allclose(logits(model, tokenizer), logits(base, tokenizer), atol=1e-2)


@pytest.mark.filterwarnings("ignore:This processor has no instructions")
@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_a_processor_changes_only_dtypes_that_were_left_to_it(
    dtype: Any, held: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny_model(dtype=torch.bfloat16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    path = train_briefly(tmp_path, CausalLMModule(str(base), dtype=dtype), data(tmp_path, base))

    def dtypes() -> set[torch.dtype]:
        model, _ = load_for_inference(path, device="cpu")
        assert lora_layers(model)
        return {layer.base_layer.weight.dtype for layer in lora_layers(model).values()} | {model.dtype}

    monkeypatch.setattr("milora_lightning.models.processor.has_fast_products", lambda _: True)
    assert dtypes() == {torch.bfloat16}
    monkeypatch.setattr("milora_lightning.models.processor.has_fast_products", lambda dtype: dtype == torch.float32)
    assert dtypes() == {held}


def test_a_moved_base_is_named(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained / "base", tmp_path / "moved")
    here = logits(*load_for_inference(trained / "peft", device="cpu", name_or_path=str(moved)))
    torch.testing.assert_close(
        here, logits(*load_for_inference(trained / "a.ckpt", device="cpu")), rtol=1e-4, atol=1e-5
    )
    folder = shutil.copytree(trained / "peft", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    with pytest.raises(FileNotFoundError, match=r"'/gone' does not exist.*--name_or_path"):
        load_for_inference(folder)


@pytest.mark.parametrize("template", ["alpaca", "plain", "own.jinja"])
def test_a_template_may_be_given(template: str, trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    Path("own.jinja").write_text(own.replace("Q: ", "{{ 'A: ' if m['role'] == 'assistant' else 'Q: ' }}"))
    _, tokenizer = load_for_inference(trained / "a.ckpt", device="cpu", template=template)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ends = {"alpaca": "### Response:\n", "plain": "What is 1 plus 2?\n", "own.jinja": "Q: What is 1 plus 2?\nA: "}
    assert text.endswith(ends[template])
    with pytest.raises(ValueError, match="There is no template 'none'"):
        load_for_inference(trained / "a.ckpt", template="none")


def test_what_cannot_be_loaded_is_named(trained: Path, tmp_path: Path) -> None:
    for path, message in (
        (trained, "is a folder of checkpoints: give one of them, .*a.ckpt"),
        (tmp_path / "none.ckpt", "There is no checkpoint"),
        (tmp_path / "none", "There is no model"),
        (trained / "train.jsonl", "cannot be read as a checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_for_inference(path)
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="checkpoint of a module of your own"):
        load_for_inference(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="is a whole model"):
        load_for_inference(trained / "base", name_or_path="embedded")


def test_a_quantized_base_is_not_merged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milora_lightning.export.merging.holds_its_weight", lambda layer: False)
    with pytest.raises(ValueError, match="leave merge out"):
        load_for_inference(trained / "a.ckpt", merge=True)


def test_a_module_answers_texts(trained: Path) -> None:
    """Alone and in a list, as its batches of tokens are answered; and says it where it is not known how to ask."""
    module = CausalLMModule.load_from_checkpoint(trained / "a.ckpt", map_location="cpu").eval()
    texts = ["What is 1 plus 2?", "What is 4 plus 5? 1 plus 2?"]
    tokenizer = module.prompt_format.applied_to(module.tokenizer)
    want = []
    for text in texts:
        ids = torch.tensor([ids_of(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)])
        want += module.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert module.generate(texts) == want
    assert [module.generate(text) for text in texts] == want
    assert any(isinstance(layer, LoRALinear) for layer in module.modules())
    module.prompt_format, module.tokenizer = None, tiny_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        module.generate("Hi")


def test_the_folder_of_a_sharded_run_is_loaded(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "a.ckpt", weights_only=True)
    state = content.pop("state_dict")
    content = {name: value for name, value in content.items() if name != "optimizer_states"}
    torch.save({**content, KEY: state.pop(KEY)}, tmp_path / "meta.pt")
    writer = FileSystemWriter(tmp_path, single_file_per_rank=True)
    dcp.save({"state_dict": state}, storage_writer=writer, no_dist=True)
    assert kind_of(str(tmp_path)) == "checkpoint"
    here, there = (logits(*load_for_inference(path, device="cpu")) for path in (tmp_path, trained / "a.ckpt"))
    assert torch.equal(here, there)


def test_paths_tell_what_they_are(tmp_path: Path) -> None:
    for name, kind in (("a.ckpt", "checkpoint"), ("A.CKPT", "checkpoint"), ("m.gguf", "model"), ("M.GGUF", "model")):
        (tmp_path / name).touch()
        assert kind_of(str(tmp_path / name)) == kind
    (tmp_path / "model").mkdir()
    assert kind_of(str(tmp_path / "model")) == "model"
    for age, name in enumerate(("new.ckpt", "old.ckpt")):
        (tmp_path / "model" / name).touch()
        os.utime(tmp_path / "model" / name, (1000 - age, 1000 - age))
    with pytest.raises(ValueError, match=r"folder of checkpoints: give one of them, such as .*new\.ckpt"):
        kind_of(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").touch()
    assert kind_of(str(tmp_path / "model")) == "model"  # beside which checkpoints may lie
    for absent in ("cuda:9", "gpu"):
        with pytest.raises(ValueError, match="There is no device"):
            device_named(absent)


@pytest.mark.parametrize("padding", [None, 5, 0])
def test_answers_end_as_in_training_and_are_padded_as_the_tokenizer_says(padding: int | None) -> None:
    tokenizer: Any = SimpleNamespace(
        eos_token_id=7, pad_token_id=padding, chat_template=None, convert_tokens_to_ids={"<end>": 9}.get
    )
    for own in (None, 3, 0):
        model: Any = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=4, pad_token_id=own))
        _end_as_trained(model, tokenizer, SimpleNamespace(end_of_turn="<end>"))  # type: ignore[arg-type]
        assert model.generation_config.eos_token_id == [4, 7, 9]
        assert model.generation_config.pad_token_id == next(token for token in (own, padding, 4) if token is not None)
