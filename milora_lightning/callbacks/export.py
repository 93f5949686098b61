"""Exports the trained adapters when training ends."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from milora_lightning.analysis.intruders import Intruders
from milora_lightning.export.folders import export_merged, export_peft
from milora_lightning.export.merging import rounding_note
from milora_lightning.metrics.results import results
from milora_lightning.strategies.base import shards
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_output
from milora_lightning.utils.messages import inform


class AdapterExport(Callback):
    """Exports the adapters when fitting ends.

    Args:
        output: Folder to create; it must not exist, or must be empty.
        format: ``"peft"`` for an adapter folder, ``"merged"`` for a whole Hugging Face model.
        rank: For ``"peft"``: compress each update to this rank.
        dtype: For ``"merged"``: dtype of the whole model; by default each weight keeps its dtype.
        shrink_intruders: Shrink intruder dimensions to this fraction of their singular values.

    Raises:
        ValueError: If an option does not apply to the format.
    """

    def __init__(
        self,
        output: str,
        format: Literal["peft", "merged"] = "peft",
        rank: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        shrink_intruders: float | None = None,
    ) -> None:
        for name, value, other in (("rank", rank, "merged"), ("dtype", dtype, "peft")):
            if value is not None and format == other:
                raise InvalidInputError(f"AdapterExport has no {name} in the format {other!r}: leave it out.")
        self.output = output
        self.format = format
        self.rank = rank
        self.dtype = dtype
        self.shrink_intruders = None if shrink_intruders is None else Intruders(shrink_intruders)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an output folder that is in use, and sharded weights, before training rather than after it."""
        if stage == "fit":
            check_output(self.output)
            if shards(trainer.strategy):
                raise InvalidInputError(
                    f"AdapterExport needs whole weights, which {type(trainer.strategy).__name__} does not leave on any "
                    "rank: leave it out, and export the checkpoint afterwards (milora export --ckpt_path ...)."
                )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, on the first rank."""
        if not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        options: dict[str, Any] = {
            "tokenizer": getattr(pl_module, "tokenizer", None),
            "metrics": results(trainer.callback_metrics, "val", "test"),
            "shrink_intruders": self.shrink_intruders,
            "data": getattr(data, "description", None),
            "prompt_format": getattr(data, "prompt_format", None) or getattr(pl_module, "prompt_format", None),
        }
        if self.format == "peft":
            export_peft(pl_module, self.output, self.rank, **options)
        else:
            if note := rounding_note(export_merged(pl_module, self.output, dtype=self.dtype, **options)):
                inform(note)
