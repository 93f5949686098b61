"""What test_sharding.py checks on two processes without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig, PreTrainedModel

from helpers import fused
from helpers.models import tiny_model
from helpers.starting import token_batches
from milora_lightning import LoRAConfig, collect_statistics, initialize, inject, lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.split import Part, Style, split_parameters
from milora_lightning.models import generation
from milora_lightning.models.checkpointing import checkpoint_layers
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.sharding import shard
from milora_lightning.models.tensor_parallel import parallelize
from milora_lightning.parallel.dtensor import full_tensor, is_sharded
from milora_lightning.parallel.gathering import TENSOR, free_gathered

IDS = torch.arange(20).view(2, 10) + 5


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """Collect the sizes of the all-gathers within the context."""
    sizes: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    gather = getattr(dist, name)

    def count(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.numel())
        return gather(output, *args, **kwargs)

    with patch.object(dist, name, count):
        yield sizes


def adapted_model() -> PreTrainedModel:
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=4))
    return model


def moved(model: nn.Module) -> None:
    """Give all adapters an update."""
    for layer in lora_layers(model).values():
        layer.lora_B.data.mul_(1.5)


def answers(model: PreTrainedModel) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=1)
    return generation.generate_greedily(model.eval(), IDS, torch.ones_like(IDS), config)


def step(model: PreTrainedModel) -> int:
    """Return how many all-gathers a forward and a backward pass take."""
    with counted_gathers() as sizes:
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return len(sizes)


def generation_run() -> dict[str, Any]:
    """Generate with weights gathered once, and at each call; between two training steps."""
    whole, model = adapted_model(), adapted_model()
    shard(model, init_device_mesh("cpu", (2,)))
    for each in (whole, model):
        initialize(each)
        moved(each)
    found: dict[str, Any] = {"alone": answers(whole)}
    found["step before"] = step(model)
    with counted_gathers() as once:
        found["once"] = answers(model)
    found["sharded again"] = all(is_sharded(layer.base_layer) for layer in lora_layers(model).values())
    found["step after"] = step(model)
    with patch.object(generation, "weights_gathered", lambda module: nullcontext()), counted_gathers() as each_call:
        found["each call"] = answers(model)
    return {**found, "gathers once": len(once), "gathers each call": len(each_call)}


def memory_run() -> dict[str, Any]:
    """Return the bytes of gathered weights, and of saved tensors in their shapes, between forward and backward."""
    model = adapted_model()
    shard(model, init_device_mesh("cpu", (2,)))
    initialize(model)
    gathered: dict[str, torch.Tensor] = {}
    saved: list[torch.Tensor] = []

    def keep(name: str) -> Any:
        return lambda layer, args: gathered.update({name: layer.base_layer.weight})

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    for name, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(keep(name))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    last = {name: weight for name, weight in gathered.items() if "layers.1" in name}
    kept = {weight.untyped_storage().data_ptr() for weight in last.values()}
    shapes = {weight.shape for weight in gathered.values()}
    copies = [t for t in saved if t.shape in shapes and t.untyped_storage().data_ptr() not in kept]

    def size(weights: Any) -> int:
        return sum(weight.untyped_storage().nbytes() for weight in weights)

    found = {"others": size(gathered[name] for name in gathered.keys() - last), "last": size(last.values())}
    found["copies"] = size(copies)
    loss.backward()
    return {**found, "layers": len(gathered), "after": size(gathered.values())}


def compiled_run() -> dict[str, Any]:
    """Train compiled and plain layers that recompute their activations: gradients, and how many tensors are saved."""
    found: dict[str, Any] = {}
    for name in ("plain", "compiled"):
        model = adapted_model()
        checkpoint_layers(model, "full")
        if name == "compiled":
            compiler = partial(torch.compile, backend="eager")  # captured, without machine code, which takes long
            with patch.object(torch, "compile", lambda forward, options, compiler=compiler: compiler(forward)):
                compile_layers(model)
        shard(model, init_device_mesh("cpu", (2,)))
        initialize(model)
        moved(model)
        saved: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor):
            loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients = [full_tensor(p.grad).flatten() for p in model.parameters() if p.grad is not None]
        found |= {name: torch.cat(gradients), f"{name} saves": len(saved)}
    return found


def split_run(style: Style) -> dict[str, float]:
    """Compare a layer that two ranks split with the whole one: relative differences, with dropout."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    whole, split = (LoRALinear(nn.Linear(12, 8), 2, lora_alpha=3.0, lora_dropout=0.5) for _ in range(2))
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    split.load_state_dict(whole.state_dict())
    for layer in (whole, split):
        layer.base_layer.requires_grad_(False)
        layer.initialized = True
    x, g = torch.randn(5, 12), torch.randn(5, 8)
    split.part = Part(style, mesh)
    for module in (split.base_layer, split):
        split_parameters(module, split.part)

    def mine(tensor: torch.Tensor, where: Style) -> torch.Tensor:
        return tensor.chunk(2, dim=-1)[dist.get_rank()] if style == where else tensor

    results = []
    for layer, inputs, outputs in ((whole, x, g), (split, mine(x, "rowwise"), mine(g, "colwise"))):
        inputs = inputs.clone().requires_grad_()
        torch.manual_seed(7)
        y = layer(inputs)
        y.backward(outputs)
        results.append((y, inputs.grad, full_tensor(layer.lora_A.grad), full_tensor(layer.lora_B.grad)))
    (y, dx, dA, dB), ours = results
    expected = mine(y, "colwise"), mine(dx, "rowwise"), dA, dB
    names = "output", "input's gradient", "A's gradient", "B's gradient"
    differences = (((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))
    return dict(zip(names, differences, strict=True))


def split_model_run() -> dict[str, Any]:
    """Compare a model that two ranks split with the whole one: the factors' starts and gradients, with dropout."""
    found: dict[str, Any] = {}
    for name in ("whole", "split"):
        model = tiny_model("qwen3")
        inject(model, LoRAConfig(r=4, lora_dropout=0.3))
        if name == "split":
            parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=(TENSOR,)))
        initialize(model)
        starts = [full_tensor(layer.initial_B).detach().flatten() for layer in lora_layers(model).values()]
        moved(model)
        torch.manual_seed(0)
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients = [full_tensor(p.grad).flatten() for p in model.parameters() if p.grad is not None]
        found[name] = {"starts": torch.cat(starts), "gradients": torch.cat(gradients)}
    return found


def statistics_run() -> dict[str, Any]:
    """Collect statistics of three batches alone, on two ranks that share them, and with weights in shards, too.

    Returns:
        For each way, the statistics, the starts from them, and the gradient of a step after that.
    """
    found: dict[str, Any] = {}
    for init in ("eva", "lora_one"):
        for way in ("alone", "shared", "sharded"):
            model = tiny_model("llama")
            inject(model, LoRAConfig(r=4, init=init))
            if way == "sharded":
                shard(model, init_device_mesh("cpu", (2,)))
            share = {} if way == "alone" else {"number": dist.get_rank(), "size": 2}
            statistics = collect_statistics(model, token_batches(3), **share)
            initialize(model, statistics=statistics, cache=False)
            free_gathered(model)
            told = [each.inputs if each.gradient is None else each.gradient for each in statistics.values()]
            layers = lora_layers(model).values()
            starts = [(full_tensor(layer.lora_B) @ full_tensor(layer.lora_A)).detach().flatten() for layer in layers]
            model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            gradients = [full_tensor(layer.lora_B.grad).flatten() for layer in layers]
            found[f"{init} {way}"] = [torch.cat([t.flatten() for t in told]), torch.cat(starts), torch.cat(gradients)]
    return found


def fused_run() -> dict[str, Any]:
    """Train a model whose fused projections have factors for each part, whole and in shards; and try to split it."""
    found: dict[str, Any] = {}
    for name in ("whole", "shards"):
        model = fused.phi3()
        inject(model, LoRAConfig(r=3, fused_parts=fused.PARTS))
        if name == "shards":
            shard(model, init_device_mesh("cpu", (2,)))
        initialize(model)
        fused.trained(model)
        layers = lora_layers(model).values()
        found[name] = [full_tensor(t).detach() for m in layers for t in (m.lora_A, m.lora_B, m.delta_weight())]
    try:
        parallelize(fused.adapted(fused.phi3(), fused.PARTS), init_device_mesh("cpu", (2,), mesh_dim_names=(TENSOR,)))
    except ValueError as error:
        found["split"] = str(error)
    return found


def sharding_runs() -> dict[str, Any]:
    styles: tuple[Style, ...] = ("colwise", "rowwise", "replicate")
    return {
        "generation": generation_run(),
        "memory": memory_run(),
        "compiled": compiled_run(),
        "statistics": statistics_run(),
        "fused": fused_run(),
        "split model": split_model_run(),
        "split": {style: split_run(style) for style in styles},
    }
