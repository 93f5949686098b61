"""What is read of checkpoints: no code, the same whether with weights or without, and what bases and options mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from helpers.models import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from milora_lightning import CheckpointError
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint, only_codes, quantization_of, unquantized
from milora_lightning.checkpoint.io import KEY, ClearCheckpointIO, read, read_without_weights
from milora_lightning.checkpoint.options import differences, find_checkpoint
from milora_lightning.utils.compat.lightning import metadata_file

READERS = {
    "read": read,
    "read_without_weights": read_without_weights,
    "ClearCheckpointIO": lambda path: ClearCheckpointIO().load_checkpoint(path, weights_only=True),
}


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", list(READERS))
def test_code_in_a_checkpoint_is_not_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Code(f"touch {tmp_path}/run")}, path)
    with pytest.raises(CheckpointError, match="it holds Python objects"):
        READERS[name](path)
    assert not (tmp_path / "run").exists()
    TorchCheckpointIO().load_checkpoint(path, weights_only=False)
    assert (tmp_path / "run").exists()  # what it would have done


@pytest.mark.parametrize("reader", [read, read_without_weights])
def test_files_give_their_content_and_anything_else_one_sentence(reader: Callable[[Any], Any], tmp_path: Path) -> None:
    path, content = tmp_path / "a.ckpt", {"state_dict": {"w": torch.arange(3.0)}, "epoch": 2}
    torch.save(content, path)
    found = reader(path)
    assert found["epoch"] == 2
    assert torch.equal(found["state_dict"]["w"], content["state_dict"]["w"])
    torch.save(content, path, _use_new_zipfile_serialization=False)  # an older format, which cannot be mapped
    assert torch.equal(reader(str(path))["state_dict"]["w"], content["state_dict"]["w"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*absent\.ckpt'"):
        reader(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint folder of a sharded run.*a\.ckpt"):
        reader(tmp_path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match="damaged, incomplete, or not a checkpoint"):
        reader(path)
    torch.save([1], path)
    if reader is read_without_weights:
        with pytest.raises(CheckpointError, match="it has no state_dict"):
            reader(path)


def test_of_a_folder_the_part_beside_the_weights_is_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    torch.save({"hyper_parameters": {"r": 4}}, metadata_file(tmp_path))
    assert read_without_weights(tmp_path) == {"hyper_parameters": {"r": 4}}


@pytest.mark.parametrize("name", ["state_dict", "model"])  # of FSDP2's folders, and of FSDP1's
def test_a_folder_of_shards_is_read_in_the_layout_of_a_file(name: str, tmp_path: Path) -> None:
    weight, moment = torch.arange(6.0).view(2, 3), torch.ones(3)
    content = {name: {"w": weight}, "optimizer_0": {"state": {"w": {"exp_avg": moment}}}}
    torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"epoch": 2, KEY: {"format": 1}}, metadata_file(tmp_path))
    found = read(tmp_path)
    assert found["epoch"] == 2
    assert found["state_dict"].keys() == {"w", KEY}
    assert found["state_dict"][KEY] == {"format": 1}
    assert torch.equal(found["state_dict"]["w"], weight)
    ((optimizer),) = found["optimizer_states"]
    assert torch.equal(optimizer["state"]["w"]["exp_avg"], moment)
    assert found.keys() == {"epoch", "state_dict", "optimizer_states"}


BASE = {"0.weight": "(2, 2) torch.float32 1f", "0.bias": "(2,) torch.float32 2e"}
NF4 = {**BASE, "0.weight": "(2, 2) torch.float32 1f as nf4"}


def test_bases_differ_by_their_weights_or_their_quantization() -> None:
    assert quantization_of(NF4) == "nf4"
    assert quantization_of(BASE) is None
    assert unquantized(NF4) == BASE
    assert only_codes(BASE) is None
    assert only_codes({**BASE, "1": "(2,) torch.uint8 3d"}) == only_codes({**BASE, "1": "(2,) torch.int8 3d"}) == "1"
    check_base(BASE, dict(reversed(BASE.items())))
    with pytest.raises(CheckpointError, match="a base with quantization: nf4, and this one has null"):
        check_base(NF4, BASE)
    with pytest.raises(CheckpointError, match="a base with quantization: null, and this one has nf4"):
        check_base(BASE, NF4)
    for other in ({**BASE, "0.bias": "(2,) torch.float32 00"}, {"0.weight": BASE["0.weight"]}, {**BASE, "1": "x"}):
        with pytest.raises(CheckpointError, match=r"another base model: 1 of \d frozen weights"):
            check_base(BASE, other)
    with pytest.raises(CheckpointError, match=r"for example '1' \(absent there, x here\)"):
        check_base(BASE, {**BASE, "1": "x"})
    with pytest.raises(CheckpointError, match=r"for example '1' \(x there, absent here\)"):
        check_base({**BASE, "1": "x"}, BASE)
    changed = {**NF4, "0.bias": "(2,) torch.float32 00"}
    with pytest.raises(
        CheckpointError, match=r"another base model: 2 of 2 frozen weights differ, for example '0\.bias'"
    ):
        check_base(changed, BASE)


def test_a_weight_is_the_same_in_every_dtype_that_holds_its_numbers() -> None:
    """And in no other: codes, rounded numbers and numbers that overflow are described as they are."""

    def described(weight: torch.Tensor, like: dict[str, str] | None = None) -> dict[str, str]:
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(weight, requires_grad=False)
        return fingerprint(module, like=like)

    exact, rounded, codes = torch.tensor([0.5, -2.0]), torch.tensor([0.1, 1e30]), torch.tensor([1, 2])
    in_half, in_whole = described(exact.bfloat16()), described(exact)
    assert in_half != in_whole
    assert described(exact, in_half) == in_half
    assert described(exact.bfloat16(), in_whole) == in_whole
    assert described(rounded, described(rounded.bfloat16())) == described(rounded)
    assert described(codes, in_whole) == described(codes)
    assert described(exact, described(codes)) == in_whole


def test_options_that_mean_the_same_do_not_differ() -> None:
    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        given, saved = ({f"adapter.{name}": value for name, value in each.items()} for each in (one, other))
        return differences(given, saved) == []

    assert same({"r": 8, "lora_alpha": None}, {"r": 8, "lora_alpha": 8.0})
    assert same({"r": 8, "lora_alpha": "2r"}, {"r": 8, "lora_alpha": 16})
    assert not same({"r": 8, "lora_alpha": "2r"}, {"r": 8, "lora_alpha": 8})
    assert not same({"r": 8, "lora_alpha": None}, {"r": 8, "lora_alpha": 16})
    # With patterns, no alpha means each layer's own rank.
    patterns = {"r": 8, "rank_pattern": {"q": 4}}
    assert not same({**patterns, "lora_alpha": None}, {**patterns, "lora_alpha": 8.0})
    assert same({"modules_to_save": []}, {"modules_to_save": None})
    assert differences({"model.a": 1, "model.b": 2}, {"model.a": 3, "model.c": 4}) == [
        "model.a: 1 here, 3 in the checkpoint"
    ]


def test_keywords_mean_a_file_or_say_that_there_is_none(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer = quiet_trainer(tmp_path, callbacks=[saving], enable_checkpointing=True)
    with pytest.raises(FileNotFoundError, match=r"best is known only in the process that trained, and test starts"):
        find_checkpoint(trainer, "best", "test")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint for --ckpt_path last in .*saved.*start a new run"):
        find_checkpoint(trainer, "last", "fit")
    (tmp_path / "saved").mkdir()
    torch.save({}, tmp_path / "saved" / "last.ckpt")
    for subcommand in ("fit", "validate", "test", "predict"):
        assert find_checkpoint(trainer, "last", subcommand) == str(tmp_path / "saved" / "last.ckpt")
