"""What writing the principal part back into a bfloat16 weight costs, against keeping the weight.

The embedded model in bfloat16, r = 32, the paper's five target modules. "Written back" stores W − BA in the weight's
dtype, the textbook way; its model at the start is compared with the pretrained one on generated problems.
"""

from __future__ import annotations

import torch
from common import publish, table
from torch.nn.functional import kl_div

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.data import WordProblems
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@torch.no_grad()
def main() -> None:
    tokenizer = load_tokenizer("embedded")
    problems = WordProblems(validation_size=32).load("validation")
    assert problems is not None
    texts = [f"{row['prompt']}\n{row['response']}" for row in problems]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    real = batch["attention_mask"].bool()

    def predictions() -> torch.Tensor:
        return model(**batch).logits[real].float().log_softmax(-1)

    model = load_causal_lm("embedded", "bfloat16")
    pretrained = predictions()
    inject(model, LoRAConfig(r=32, target_modules=TARGETS))
    initialize(model)
    ours = kl_div(predictions(), pretrained, reduction="batchmean", log_target=True).item()
    identical = bool((predictions() == pretrained).all())

    unchanged: dict[str, list[float]] = {target: [] for target in TARGETS}
    lost: dict[str, list[float]] = {target: [] for target in TARGETS}
    for name, layer in lora_layers(model).items():
        weight = layer.base_layer.weight
        minor = layer.lora_B @ layer.lora_A
        written = (weight.float() - minor).to(weight.dtype)
        target = name.rsplit(".", 1)[-1]
        unchanged[target].append((written == weight).float().mean().item())
        lost[target].append(((weight.float() - written.float() - minor).norm() / minor.norm()).item())
        weight.copy_(written)
        layer.initial_A.zero_()  # now the layer computes W_p x + s BA x, as the textbook has it
    theirs = kl_div(predictions(), pretrained, reduction="batchmean", log_target=True).item()

    mean = {key: [sum(values[t]) / len(values[t]) for t in TARGETS] for key, values in (("u", unchanged), ("l", lost))}
    rows = [
        ["entries that do not change when W − BA is written", *(f"{value:.0%}" for value in mean["u"])],
        ["error of what was taken out, relative to ‖BA‖", *(f"{value:.0%}" for value in mean["l"])],
    ]
    publish(
        "half_precision",
        table(["mean over layers", *(f"`{t}`" for t in TARGETS)], rows)
        + f"\n\nKL divergence of the model that starts training from the pretrained one: {theirs:.2g} nats per token "
        f"written back, {ours:.2g} here (logits identical: {'yes' if identical else 'no'}).",
    )


if __name__ == "__main__":
    main()
