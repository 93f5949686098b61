"""A tiny LLaVA, made from its configuration, and conversations about coloured squares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from helpers.models import TINY_CONFIGS, tiny_tokenizer
from milora_lightning import SFTDataModule
from milora_lightning.data import VisualInstructions

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
except ImportError:  # until transformers 5.3, under other names
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    from transformers import LlavaNextImageProcessor as LlavaNextImageProcessorPil

FEATURES = 4  # of an image: 2 × 2 patches
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


SIZES = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
GRIDS = [[8, 16], [16, 8], [16, 16]]  # into which LLaVA-NeXT cuts images of other shapes


def save_tiny_llava(folder: Path, cuts: bool = False) -> Path:
    """Save a model that sees a fixed number of features, or one that cuts each image by its shape (LLaVA-NeXT)."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = (
        LlavaNextProcessor(LlavaNextImageProcessorPil(**SIZES, image_grid_pinpoints=GRIDS), tokenizer, **options)
        if cuts
        else LlavaProcessor(CLIPImageProcessorPil(**SIZES), tokenizer, **options)
    )
    text = TINY_CONFIGS["llama"]
    text.vocab_size, text.max_position_embeddings = 136, 512
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    parts = {"vision_config": vision, "text_config": text, "image_token_index": processor.image_token_id}
    torch.manual_seed(0)
    model = (
        LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, image_grid_pinpoints=GRIDS))
        if cuts
        else LlavaForConditionalGeneration(LlavaConfig(**parts, image_seq_length=FEATURES))
    )
    with torch.no_grad():  # as large as in a trained model: small random weights see little and say nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def conversation(colour: str | None, *exchanges: tuple[str, str]) -> dict[str, Any]:
    turns = [
        {"from": who, "value": text} for pair in exchanges for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"id": str(colour), "conversations": turns, **({"image": f"{colour}.png"} if colour else {})}


def visual_files(folder: Path) -> Path:
    """Images, and a file of conversations about them, one of which has none."""
    (folder / "images").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (10, 12), colour).save(folder / "images" / f"{name}.png")
    rows = [conversation(name, ("What is it?\n<image>", name), ("Sure?", "Yes.")) for name in COLOURS]
    path = folder / "train.json"
    path.write_text(json.dumps([*rows, conversation(None, ("1 plus 2?", "3"))]))
    return path


def visual_data(folder: Path, model: Path, train: Path | None = None, **options: Any) -> SFTDataModule:
    source = VisualInstructions(
        str(train or folder / "train.json"), str(folder / "images"), test=options.pop("test", None)
    )
    return SFTDataModule(source, str(model), **{"template": "vicuna", "max_length": 400, "batch_size": 4, **options})
