"""Names stay the plain model's where parts are compiled or wrapped, and checkpoints go to and from such models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import quiet_trainer, tiny_model
from helpers.named import Module
from lightning.pytorch import Trainer
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_adapter,
    lora_layers,
)
from milora_lightning.adapters.targets import find_targets
from milora_lightning.checkpoint.adapter import KEY
from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.checkpoint.reading import read_checkpoint


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """Wrapped by torch.compile, and not compiled: names are what is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def whole(model: nn.Module) -> nn.Module:
    return compiled(model)


def blocks(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = compiled(layer)
    return model


def single_layers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.mlp.up_proj = compiled(layer.mlp.up_proj)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    model.config.use_cache = False  # a cache would grow where a layer is computed again
    return model


WAYS = {f.__name__: f for f in (whole, blocks, single_layers, checkpointed)}


def trained(folder: Path, module: Module, steps: int = 2, **fit: object) -> Trainer:
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=[MiLoRAInit(r=4, init="random", seed=1)])
    trainer.fit(module, DataLoader(IDS, batch_size=1), **fit)
    return trainer


def logits(module: Module) -> Tensor:
    with torch.no_grad():
        return module.eval().lm(IDS).logits


@pytest.mark.parametrize("way", list(WAYS))
def test_names_are_the_plain_models(way: str) -> None:
    plain, wrapped = tiny_model(), WAYS[way](tiny_model())
    names = list(find_targets(plain, "all-linear"))
    assert list(find_targets(wrapped, "all-linear")) == names
    assert list(find_targets(wrapped, names[:2])) == names[:2]
    assert list(find_targets(wrapped, r"model\.layers\.1\..*up_proj")) == ["model.layers.1.mlp.up_proj"]
    assert fingerprint(plain, frozen_only=False) == fingerprint(wrapped, frozen_only=False)
    factors = []
    for model in (plain, wrapped):
        inject(model, LoRAConfig(r=4, init="random"))  # whose draws derive from the names
        initialize(model)
        factors.append({name: layer.lora_A.detach() for name, layer in lora_layers(model).items()})
    assert list(factors[0]) == list(factors[1]) == names
    assert all(torch.equal(factors[0][name], factors[1][name]) for name in names)
    assert fingerprint(plain) == fingerprint(wrapped)


@pytest.mark.parametrize("way", list(WAYS))
def test_checkpoints_go_to_the_plain_module_and_back(way: str, tmp_path: Path) -> None:
    wrapped, plain = Module(WAYS[way]), Module()
    trained(tmp_path, wrapped).save_checkpoint(tmp_path / "wrapped.ckpt")
    trained(tmp_path, plain).save_checkpoint(tmp_path / "plain.ckpt")
    torch.testing.assert_close(logits(wrapped), logits(plain))
    states = [read_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("wrapped", "plain")]
    assert states[0].keys() == states[1].keys()
    assert states[0][KEY] == states[1][KEY]
    for source in ("wrapped", "plain"):
        for target in (Module(), Module(WAYS[way])):
            load_adapter(target, tmp_path / f"{source}.ckpt")
            torch.testing.assert_close(logits(target), logits(plain))
            assert all(layer.initialized for layer in lora_layers(target).values())
    resumed = [Module(), Module(WAYS[way])]
    for module, source in zip(resumed, ("wrapped", "plain"), strict=True):
        trained(tmp_path, module, steps=4, ckpt_path=tmp_path / f"{source}.ckpt", weights_only=True)
    torch.testing.assert_close(logits(resumed[0]), logits(resumed[1]))
    assert not torch.allclose(logits(resumed[0]), logits(plain), atol=1e-3)


def test_checkpoints_whose_names_are_a_compiled_modules_are_read(tmp_path: Path) -> None:
    """As they were written when names were taken as they are."""
    module = Module()
    trained(tmp_path, module).save_checkpoint(tmp_path / "plain.ckpt")

    def as_before(name: str) -> str:
        return name.replace("lm.", "lm._orig_mod.")

    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    description = checkpoint["state_dict"].pop(KEY)
    description["adapters"] = [as_before(name) for name in description["adapters"]]
    description["base"] = {as_before(name): value for name, value in description["base"].items()}
    checkpoint["state_dict"] = {as_before(key): value for key, value in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": {**checkpoint["state_dict"], KEY: description}}, tmp_path / "old.ckpt")
    for target in (Module(), Module(whole)):
        load_adapter(target, tmp_path / "old.ckpt")
        torch.testing.assert_close(logits(target), logits(module))


@pytest.mark.parametrize("way", list(WAYS))
def test_exports_open_in_other_tools(way: str, tmp_path: Path) -> None:
    module = Module(WAYS[way])
    trained(tmp_path, module)
    export_peft(module, tmp_path / "peft")
    export_merged(module, tmp_path / "merged")
    with torch.no_grad():
        peft = PeftModel.from_pretrained(tiny_model(), tmp_path / "peft").eval()(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    torch.testing.assert_close(peft, logits(module), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, logits(module), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_computes_with_its_adapter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(compiled(nn.Linear(8, 6)), nn.Linear(6, 4))
    x = torch.randn(5, 8)
    before = model(x)
    adapter = inject(model, LoRAConfig(r=2, target_modules=["0"]))["0"]
    initialize(model)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        adapter.lora_B.add_(0.5)
    torch.testing.assert_close(model(x), model[1](adapter(x)))
    assert (model(x) - before).abs().max() > 0.01


def test_what_trains_beside_the_adapters_keeps_its_name(tmp_path: Path) -> None:
    class Classifier(Module):
        def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
            super().__init__()
            self.lm = None
            self.net = nn.ModuleDict({"body": nn.Linear(8, 8), "head": wrap(nn.Linear(8, 8))})
            self.net["norm"] = wrap(nn.BatchNorm1d(8))

    states = []
    for wrap in (compiled, lambda module: module):
        module = Classifier(wrap)
        MiLoRAInit(r=2, modules_to_save=["head"], target_modules=["body"]).setup(quiet_trainer(tmp_path), module, "fit")
        module.setup("fit")
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert {"net.head.weight", "net.norm.running_mean"} <= states[0].keys()
    module.load_state_dict(states[0])
    torch.testing.assert_close(module.net["head"].weight, states[0]["net.head.weight"])
