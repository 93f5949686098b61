"""Tiny models of many families, as somebody's Lightning project would hold them, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BART = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ids(length: int = 7) -> Tensor:
    return torch.randint(10, 60, (2, length), generator=seeded())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded())


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Args:
        build: Makes the model.
        batch: Its inputs by name.
        adapter: Arguments of MiLoRAInit.
        adapted: Endings of the names of some layers that get adapters.
        trained: What trains in full, from the model's name on.
        output: Which output counts.
        refused: What is said where PEFT has no adapters for these layers.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    adapter: dict[str, Any] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    output: str = "logits"
    refused: str = ""


class Project(LightningModule):
    """A Lightning project around a model, with nothing in it that knows of adapters."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model
        self.at_start: Tensor | None = None

    def forward(self) -> Tensor:
        found = self.model(**self.family.batch())
        return found if isinstance(found, Tensor) else found[self.family.output]

    def on_train_start(self) -> None:
        with torch.no_grad():
            self.at_start = self()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self() - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(1))


class DiT(nn.Module):
    """A diffusion transformer: patches of a noisy image, modulated by the time, become the noise in it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.final = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        shift1, scale1, gate1, shift2, scale2, gate2 = self.time(t)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norms[0](tokens) * (1 + scale1) + shift1).chunk(3, -1)
        tokens = tokens + gate1 * self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        tokens = tokens + gate2 * self.mlp(self.norms[1](tokens) * (1 + scale2) + shift2)
        return self.final(tokens)


def images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": normal(2, 3, size, size)}


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)
    options = {"image_token_index": 5, "image_seq_length": 4, "vision_feature_layer": -1}
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), **options)
    return hf.LlavaForConditionalGeneration(config)


def qwen_vl() -> nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    vision |= {"fullatt_block_indexes": [0]}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=7
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen_vl_batch() -> dict[str, Tensor]:
    tokens = torch.tensor([[7, 5, 5, 5, 5, 8, 9, 10]])
    return {
        "input_ids": tokens,
        "mm_token_type_ids": (tokens == 5).int(),
        "pixel_values": normal(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


FAMILIES: dict[str, Family] = {
    "image classification, ViT": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES)),
        images,
        {"modules_to_save": "auto", "target_modules": r".*(fc[12]|[qv]_proj|projection)"},
        ("fc1", "patch_embeddings.projection"),
        ("classifier",),
    ),
    "image classification, ConvNeXt": Family(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5)
        ),
        lambda: images(32),
        {"modules_to_save": "auto", "target_modules": ".*", "rank_pattern": {r"0\.layers\.0\.dwconv": 8, "dwconv": 16}},
        ("dwconv", "pwconv1", "patch_embeddings"),
        ("classifier",),
    ),
    "segmentation, SegFormer": Family(
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 16],
                depths=[1, 1],
                num_encoder_blocks=2,
                num_attention_heads=[1, 2],
                sr_ratios=[2, 1],
                patch_sizes=[3, 3],
                strides=[2, 2],
                mlp_ratios=[1, 1],
                decoder_hidden_size=8,
                num_labels=5,
            )
        ),
        images,
        {"modules_to_save": "auto", "target_modules": ["q_proj", "v_proj", "proj", "linear_fuse"]},
        ("q_proj", "proj", "linear_fuse"),
        ("decode_head.classifier",),
    ),
    "speech, Whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **BART,
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        lambda: {"input_features": normal(2, 8, 16), "decoder_input_ids": ids()},
        {"target_modules": ["q_proj", "v_proj", "conv1", "conv2"]},
        ("q_proj", "conv1"),
        refused="the model reads conv1.stride",
    ),
    "speech, wav2vec 2.0": Family(
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                **SIZES,
                vocab_size=12,
                conv_dim=(8, 8),
                conv_kernel=(4, 3),
                conv_stride=(2, 2),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                mask_time_prob=0.0,
            )
        ),
        lambda: {"input_values": normal(2, 60)},
        {"modules_to_save": ["lm_head"]},
        ("q_proj", "projection"),
        ("lm_head",),
    ),
    "encoder-decoder, T5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)},
        {},
        ("q", "wo"),
    ),
    "encoder-decoder, BART": Family(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, max_position_embeddings=16)),
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)},
        {"target_modules": ["q_proj", "v_proj"]},
        ("q_proj",),
    ),
    "vision and language, LLaVA": Family(
        llava,
        lambda: {"input_ids": torch.tensor([[5, 5, 5, 5, 8, 9], [5, 5, 5, 5, 9, 11]]), **images(8)},
        {},
        ("q_proj", "linear_1", "fc1"),
    ),
    "vision and language, Qwen2.5-VL": Family(
        qwen_vl,
        qwen_vl_batch,
        {"target_modules": ["q_proj", "v_proj", "qkv", "patch_embed.proj"]},
        ("q_proj", "qkv", "patch_embed.proj"),
    ),
    "diffusion transformer": Family(
        DiT,
        lambda: {"x": normal(2, 4, 8, 8), "t": torch.tensor([[0.2], [0.7]])},
        {"target_modules": ["qkv", "proj", "mlp.0", "mlp.2", "patches"]},
        ("qkv", "mlp.0", "patches"),
        refused="contains no Hugging Face model",
    ),
    "state space model, Mamba": Family(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
        ),
        lambda: {"input_ids": ids()},
        {"target_modules": ["in_proj", "x_proj", "out_proj", "conv1d"], "rank_pattern": {"conv1d": 32}},
        ("in_proj", "conv1d"),
        refused="reads the weight of .*conv1d.* in place of a call",
    ),
    "sentence embedder": Family(
        lambda: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=64), add_pooling_layer=False),
        lambda: {"input_ids": ids()},
        {},
        ("query", "output.dense"),
        output="last_hidden_state",
    ),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as trained weights are: of every size, and not as torch initializes
                parameter.normal_(std=0.2, generator=seeded())
    return model
