"""What adapters leave out, and what does not train, is said once, with the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.frozen import Judged, X, fit, mlp
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, Qwen3MoeConfig

from milora_lightning import LoRAConfig, MiLoRAInit, initialize, inject, lora_layers
from milora_lightning.adapters.coverage import coverage, experts_adapted
from milora_lightning.adapters.parts import TargetNotFoundError


def said(model: nn.Module, **config: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(model, LoRAConfig(**{"r": 4, **config}))
        inject(model, LoRAConfig(**{"r": 4, **config}))
    return [str(w.message) for w in caught]


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = mlp()
        self.head = nn.Linear(16, 3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch)).square().mean()

    configure_optimizers = Judged.configure_optimizers
    train_dataloader = Judged.train_dataloader


def test_all_linear_leaves_out_layers_too_small_for_r(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Too small .*r=8.*'head' \(3×16\)\. .*modules_to_save=\['head'\]") as caught:
        module = fit(Classifier(), tmp_path, r=8)
    assert set(lora_layers(module)) == {"backbone.0", "backbone.2"}
    assert sum("'head'" in str(w.message) for w in caught) == 1
    with pytest.raises(
        ValueError, match=r"r=8 is larger than layer 'head' allows, whose weight is 3×16. Choose r of at most 3"
    ):
        inject(Classifier(), LoRAConfig(r=8, target_modules=["head"]))
    assert said(Classifier(), r=8, modules_to_save=["head"]) == []
    assert len(said(Classifier(), r=8, target_modules=r".*")) == 1
    with pytest.raises(TargetNotFoundError, match=r"No layer is left.*r=17 is larger.*Choose r of at most 16"):
        inject(Classifier(), LoRAConfig(r=17))


def test_a_layer_of_one_row_can_be_adapted() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8))
    before = model(X[:, :8])
    inject(model, LoRAConfig(r=1))
    initialize(model)
    assert torch.equal(model(X[:, :8]), before)
    model(X[:, :8]).square().sum().backward()
    assert all(layer.lora_A.grad.any() or layer.lora_B.grad.any() for layer in lora_layers(model).values())


def test_layers_that_no_adapter_fits() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8, dtype=torch.complex64), "tied": nn.Linear(8, 8)})
    model["embedding"] = nn.Embedding(8, 8)
    model["tied"].weight = model["embedding"].weight
    codes = nn.Linear(8, 8, bias=False)
    codes.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model["codes"] = codes
    assert said(model) == [
        "Layer 'c' has complex weights and gets no adapter.",
        "Layer 'tied' is tied to embedding.weight and gets no adapter.",
        "Layer 'codes' has weights of torch.int8 and gets no adapter.",
    ]
    assert list(lora_layers(model)) == ["a"]
    for name, reason in (("c", "complex"), ("codes", "int8"), ("tied", "tied to embedding.weight")):
        with pytest.raises(ValueError, match=reason):
            inject(model, LoRAConfig(r=4, target_modules=[name]))


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
def test_lazy_layers_are_refused_until_they_have_weights(targets: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"Layer '1' \(LazyLinear\) has no weights yet.*run a dummy batch"):
        inject(model, LoRAConfig(r=4, target_modules=targets))
    assert all(p.requires_grad for p in model.parameters())

    class Lazy(Classifier):
        def setup(self, stage: str) -> None:
            self.training_step(X, 0)

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.LazyLinear(16))

    assert "backbone.0" in lora_layers(fit(Lazy(), tmp_path, r=3))


def test_new_heads_that_neither_train_nor_are_adapted_are_named() -> None:
    module = Classifier()
    with pytest.warns(UserWarning, match=r"'head': looks newly made.*modules_to_save=\['head'\]"):
        inject(module, LoRAConfig(r=4, target_modules=["backbone.0", "backbone.2"]))
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    named = ["q_proj", "v_proj"]
    scored = said(AutoModelForSequenceClassification.from_config(config), target_modules=named)
    assert len(scored) == 1
    assert "'score'" in scored[0]
    other = nn.ModuleDict({"lm": tiny_model("llama"), "projection": nn.Linear(32, 8)})  # by its values, not its name
    (message,) = said(other, target_modules=named)
    assert "'projection'" in message


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_nothing_is_said_of_what_language_models_leave_frozen(kind: str) -> None:
    targets = {"gpt2": ["c_attn"], "opt": ["q_proj"]}.get(kind, ["q_proj", "up_proj"])
    assert said(tiny_model(kind), target_modules=targets) == []
    assert said(tiny_model(kind)) == []
    frozen = Classifier()
    frozen.head.requires_grad_(False)  # on purpose
    assert said(frozen, target_modules=["backbone.0"]) == []


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_key_value_heads=4, head_dim=8, num_experts=8, moe_intermediate_size=24),
}


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_mixtures_of_experts_say_what_share_is_reached(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_config(MIXTURES[kind])
    weights = {
        n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n
    }
    experts = sum(size for name, size in weights.items() if "experts" in name) / sum(weights.values())
    attention = sum(size for name, size in weights.items() if "self_attn" in name) / sum(weights.values())
    for options in ({"exclude_modules": ["experts"]}, {"target_modules": ["q_proj", "v_proj"]}):
        (message,) = said(AutoModelForCausalLM.from_config(MIXTURES[kind]), **options)
        assert f"experts in 3-D parameters {experts:.0%}" in message
        assert "target_parameters names them: ['experts.down_proj', 'experts.gate_up_proj']" in message
        assert (f"Adapters reach {attention:.0%} of the weights" in message) == ("exclude_modules" in options)
    number = 2 * 2 * (4 if kind == "mixtral" else 8)
    assert said(AutoModelForCausalLM.from_config(MIXTURES[kind])) == []
    assert experts_adapted(model) is None
    inject(model, LoRAConfig(r=4))
    assert f"Experts with adapters: {number} matrices" in str(experts_adapted(model))
    model = AutoModelForCausalLM.from_config(MIXTURES[kind])

    class Language(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model, nn.Identity()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            ids = batch.abs().long() % 64
            return self.backbone(ids, labels=ids).loss

    fit(Language(), tmp_path)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{attention + experts:.1%} of the weights; without: other weights" in shown
    assert f"backbone: {8 + number} matrices" in shown


def test_what_has_no_adapter_is_listed_by_its_share() -> None:
    """Of 64 + 32 + 128 weights, the smaller of two kinds that differ being the first of the alphabet."""
    parts = {"proj": nn.Linear(8, 8), "conv": nn.Conv1d(4, 8, 1), "back": nn.ConvTranspose1d(8, 4, 4)}
    model = nn.ModuleDict(parts)
    config = LoRAConfig(r=2, target_modules=["proj"])
    inject(model, config)
    assert coverage(model, config) == "28.6% of the weights; without: transposed convolutions 57.1%, convolutions 14.3%"


def test_convolutions_and_attention_that_no_adapter_fits_are_named() -> None:
    (message,) = said(nn.Sequential(nn.Conv2d(3, 64, 7), nn.Flatten(), nn.Linear(16, 8)))
    assert "convolutions 99%" in message
    assert "Convolutions get adapters where" in message
    (message,) = said(nn.Sequential(nn.ConvTranspose2d(3, 64, 7), nn.Flatten(), nn.Linear(16, 8)))
    assert "transposed convolutions 99%" in message
    assert "Convolutions get adapters where" not in message  # these get none
    with pytest.raises(TargetNotFoundError, match="only modules of type ConvTranspose2d; adapters fit linear layers"):
        inject(nn.Sequential(nn.ConvTranspose2d(3, 64, 7)), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(TargetNotFoundError, match=r"in_proj and out_proj of nn\.MultiheadAttention: name"):
        inject(nn.TransformerEncoderLayer(16, 2, 32), LoRAConfig(r=2, target_modules=["self_attn"]))

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert said(nn.TransformerEncoderLayer(16, 2, 32)) == []
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    encoder.self_attn = Own(16, 2)
    (message,) = said(encoder)
    assert "in_proj_weight 38%" in message


class Choosing(Classifier):
    """Chooses what its optimizers hold."""

    def __init__(self, choice: str) -> None:
        super().__init__()
        self.choice = choice
        self.early = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        return {
            "early": lambda: self.early,
            "named": lambda: torch.optim.SGD([p for n, p in named if n.endswith("weight")], 0.1),
            "some": lambda: torch.optim.SGD([p for n, p in named if "lora_A" in n or "head" in n], 0.1),
            "no head": lambda: torch.optim.SGD([p for n, p in named if "lora" in n], 0.1),
            "none": lambda: None,
            "all": lambda: torch.optim.SGD(self.parameters(), 0.1),
            "groups": lambda: torch.optim.SGD([{"params": [p]} for _, p in named if p.requires_grad], 0.1),
        }[self.choice]()


@pytest.mark.parametrize(
    ("choice", "missing"),
    [
        ("early", "4 of 6 .*in no optimizer.*'backbone.0.lora_A'"),
        ("named", "5 of 6"),
        ("some", "2 of 6 .*in no optimizer.*'backbone.0.lora_B'"),
        ("no head", "2 of 6 .*in no optimizer.*'head.weight'"),
        ("none", "6 of 6"),
        ("all", None),
        ("groups", None),
    ],
)
def test_an_optimizer_that_lacks_what_is_to_train_is_refused(choice: str, missing: str | None, tmp_path: Path) -> None:
    module = Choosing(choice)
    if missing is None:
        fit(module, tmp_path, modules_to_save=["head"])
        return
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=f"{missing}.*in configure_optimizers"):
        fit(module, tmp_path, modules_to_save=["head"])
    assert all(torch.equal(module.head.get_parameter(n), before[f"head.{n}"]) for n in ("weight", "bias"))


def test_several_optimizers_hold_what_is_to_train_together(tmp_path: Path) -> None:
    class Both(Classifier):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.backbone, self.head)]

    fit(Both(), tmp_path, modules_to_save=["head"])


def test_adapters_without_a_gradient_are_named_after_the_first_step(tmp_path: Path) -> None:
    class Teacher(Judged):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.judge(batch)
            return (self.net(batch) - target).square().mean()

    with pytest.warns(UserWarning, match=r"No gradient .*'judge.0', 'judge.2'.*exclude_modules=\['judge'\]") as caught:
        fit(Teacher(""), tmp_path)
    assert sum("No gradient" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No gradient")
        fit(Teacher(""), tmp_path, exclude_modules=["judge"])
        fit(Teacher("judge"), tmp_path)


def test_the_first_callback_may_be_used_again(tmp_path: Path) -> None:
    callback = MiLoRAInit(r=4, cache=False)
    for _ in range(2):
        quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(Classifier())
