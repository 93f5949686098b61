"""Whatever is wrong with a model's files is said in one sentence, and nothing random is trained on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model, tiny_model, tiny_tokenizer, write_examples
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, T5Config, ViTConfig

from milora_lightning import CausalLMModule, SFTDataModule
from milora_lightning.cli.main import main
from milora_lightning.data import Files
from milora_lightning.models.files import ModelNotFoundError, UnusableModelError
from milora_lightning.models.pretrained import load_causal_lm, load_config, load_tokenizer
from milora_lightning.utils.errors import InvalidInputError

WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_bin(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="10KB")
    sorted(folder.glob("model-*"))[0].unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (lambda f: rewrite(f, lambda w: w.pop(WEIGHT)), rf"lack 1 of the 21 weights.*{WEIGHT}"),
    "the head is missing": (lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")), r"lack 1 of.*lm_head.weight"),
    "another shape": (lambda f: rewrite(f, lambda w: w.update({WEIGHT: torch.zeros(3, 3)})), r"do not have the shapes"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), r"'model.safetensors' is damaged or incomplete"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), r"'model.safetensors' is damaged"),
    "truncated .bin": (lambda f: truncate(as_bin(f)), r"cannot be read"),
    "no .bin": (lambda f: as_bin(f).write_bytes(b"x"), r"'pytorch_model.bin' is damaged or incomplete"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no file named model.safetensors"),
    "an absent shard": (without_a_shard, r"model-00001-of-\d+.safetensors"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json.*not a valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json"),
    "unknown": (lambda f: edit_config(f, model_type="zork"), r"transformers \S+ does not know its model type.*zork"),
    "own code": (
        lambda f: edit_config(f, model_type="zork", auto_map={"AutoConfig": "a.B"}),
        r"needs its own code \(trust_remote_code\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused(folder: Path, damage: str) -> None:
    assert load_causal_lm(str(folder)) is not None
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UnusableModelError, match=message):
        load_causal_lm(str(folder))


def test_weights_that_are_tied_need_not_be_there(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tied", "qwen2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_causal_lm(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [(T5Config(), "an encoder-decoder"), (BertConfig(), "an encoder, which"), (ViTConfig(), "not a causal language")],
)
def test_other_kinds_of_models_are_refused(folder: Path, config: T5Config, message: str) -> None:
    config.save_pretrained(folder)
    with pytest.raises(UnusableModelError, match=message):
        load_causal_lm(str(folder))  # before its weights are looked at
    if isinstance(config, BertConfig):
        config.is_decoder = True
        config.save_pretrained(folder)
        assert load_config(str(folder)).is_decoder


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.ckpt", b"", r"is a file.*--ckpt_path"),
        ("model.safetensors", b"", r"is a file: give the folder"),
        ("bad.gguf", b"GGUFxxxx", r"damaged or incomplete, or not a GGUF file"),
        ("BAD.GGUF", b"nothing", r"damaged or incomplete, or not a GGUF file"),
        ("empty.gguf", b"", r"damaged or incomplete, or not a GGUF file"),
        ("empty/", None, r"is an empty folder"),
        ("diffusion/model_index.json", b"{}", r"is a diffusion pipeline"),
        ("peft/adapter_config.json", b'{"base_model_name_or_path": "a/b"}', r"PEFT adapters.*'a/b'.*start_from"),
        ("sharded/.metadata", b"", r"folder of a checkpoint.*--ckpt_path"),
        ("ggufs/a.gguf", b"", r"holds GGUF files.*a\.gguf"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)
        place = path if content is None or path.parent == tmp_path else path.parent
        with pytest.raises(UnusableModelError, match=message):
            load_causal_lm(str(place))
    for name in ("absent", str(tmp_path / "absent.GGUF")):
        with pytest.raises(ModelNotFoundError, match=r"There is no"):
            load_causal_lm(name)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UnusableModelError, match=r"tokenizer of .* has no tokenizer files"):
        load_tokenizer(str(folder))
    ViTConfig().save_pretrained(folder)  # which explains why it has none
    with pytest.raises(UnusableModelError, match=r"not a causal language model \(vit\)"):
        load_tokenizer(str(folder))


def test_a_folder_with_nothing_but_a_tokenizer_is_enough_for_a_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnusableModelError, match=r"cannot be kept in .*file.*set MILORA_CACHE"):
        load_tokenizer(str(tmp_path / "a.gguf"))


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnusableModelError, match="damaged"):
        load_tokenizer(str(tmp_path / "a.gguf"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_command_line_says_so_without_a_traceback(folder: Path) -> None:
    rows = folder.parent / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}))
    source = ["--data.source=milora_lightning.data.Files", f"--data.source.train={rows}"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={folder.parent}"]
    rewrite(folder, lambda weights: weights.pop(WEIGHT))
    with pytest.raises(SystemExit, match=r"error: The files of .* lack 1 of"):
        main(["fit", f"--model.name_or_path={folder}", "--adapter.r=2", *source, *quiet])
    assert not list(folder.parent.rglob("*.ckpt"))
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match=re.escape(f"There is no model '{folder}'")):
        main(["fit", f"--model.name_or_path={folder}", "--adapter.r=2", *source, *quiet])


def test_another_kind_of_model_is_refused_before_data_is_tokenized_for_it(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    rows = str(write_examples(tmp_path / "rows.jsonl", 4))
    data = SFTDataModule(Files(rows, rows), str(base), template="plain")
    T5Config().save_pretrained(base)
    with pytest.raises(InvalidInputError, match="an encoder-decoder"):
        quiet_trainer(tmp_path, max_steps=1).fit(CausalLMModule(str(base)), data)
    assert data.loaded("fit") == []
