"""A vision transformer with a new head: adapters in the backbone, the head trained in full.

python examples/image_classifier.py                         # a small model with random weights, to see it work
python examples/image_classifier.py google/vit-base-patch16-224-in21k
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from milora_lightning import MiLoRAInit

CLASSES = 10


class Classifier(LightningModule):
    """Classifies images by a Hugging Face vision transformer."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = (
            ViTForImageClassification.from_pretrained(name, num_labels=CLASSES)
            if name
            else ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=8, num_labels=CLASSES))
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images).logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


if __name__ == "__main__":
    module = Classifier(sys.argv[1] if len(sys.argv) > 1 else None)
    size = module.model.config.image_size
    data = TensorDataset(torch.randn(64, 3, size, size), torch.randint(CLASSES, (64,)))  # your images here
    milora = MiLoRAInit(r=8, modules_to_save=["classifier"])
    Trainer(max_epochs=1, callbacks=[milora], logger=False).fit(module, DataLoader(data, batch_size=16))
