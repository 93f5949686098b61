"""``export``: writes the adapters of a checkpoint to a folder that other tools can load."""

from __future__ import annotations

from typing import Any, Literal

from milora_lightning.analysis.intruders import Intruders
from milora_lightning.cli.commands.loading import loading
from milora_lightning.export.folders import export_merged, export_peft
from milora_lightning.export.hub import check_upload, local_base, upload
from milora_lightning.export.merging import rounding_note
from milora_lightning.inference import load_module
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_output
from milora_lightning.utils.messages import inform


def export(
    ckpt_path: str,
    output: str,
    format: Literal["peft", "merged"] = "peft",
    rank: int | None = None,
    name_or_path: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    shrink_intruders: float | None = None,
    intruder_top_k: int = Intruders.top_k,
    intruder_threshold: float = Intruders.threshold,
) -> None:
    """Export the adapters of a checkpoint.

    Args:
        ckpt_path: Checkpoint written by ``fit``; a file, or the folder of a sharded run.
        output: Folder to create.
        format: ``peft`` for an adapter folder that every PEFT tool can load, ``merged`` for a whole model.
        rank: For ``peft``: compress each update to this rank; prints how much of the updates is lost.
        name_or_path: The current location of the base model; by default that of training.
        dtype: For ``merged``: dtype of the whole model. By default each weight keeps its dtype; prints how much of the
            updates is lost to rounding.
        push_to_hub: Repository on the Hugging Face Hub to upload the folder to, ``user/name``; created if necessary.
        private: Make that repository private.
        shrink_intruders: Shrink intruder dimensions to this fraction of their singular values, such as 0.75, to undo
            some forgetting. Each adds one to the rank of an adapter; rank truncates it again.
        intruder_top_k: How many of the largest singular vectors of W + ΔW may be intruder dimensions.
        intruder_threshold: They are intruders if their cosine with each singular vector of W is below this.
    """
    if private and push_to_hub is None:
        raise InvalidInputError(
            "private applies to a repository on the Hub: add --push_to_hub with its name, or leave private out."
        )
    if rank is not None and format == "merged":
        raise InvalidInputError(
            "rank compresses adapters; a merged model has none. Leave it out, or use --format peft."
        )
    if dtype is not None and format == "peft":
        raise InvalidInputError(
            "Adapters are always float32; dtype applies to merged models. Leave it out, or use --format merged."
        )
    given = (intruder_top_k, intruder_threshold) != (Intruders.top_k, Intruders.threshold)
    if given and shrink_intruders is None:
        raise InvalidInputError(
            "intruder_top_k and intruder_threshold say what shrink_intruders shrinks: add --shrink_intruders 0.75, or "
            "leave them out."
        )
    rule = None if shrink_intruders is None else Intruders(shrink_intruders, intruder_top_k, intruder_threshold)
    check_output(output)
    if push_to_hub is not None:
        check_upload(push_to_hub, private)
    base: dict[str, Any] = {"quantization": None} if format == "merged" else {}
    with loading():
        module, checkpoint = load_module(ckpt_path, name_or_path, **base)
    scores = checkpoint.get("callbacks", {}).get("EvaluationSummary", {}).get("after")
    data = checkpoint.get("SFTDataModule", {}).get("description")
    if format == "merged":
        lost = export_merged(module, output, module.tokenizer, scores, data, dtype, module.prompt_format, rule)
        if note := rounding_note(lost):
            print(note)
    else:
        lost = export_peft(module, output, rank, module.tokenizer, scores, data, module.prompt_format, rule)
        if rank is not None:
            print(f"Rank {rank} keeps {1 - lost:.2%} of the updates' energy and loses {lost:.2%}.")
    print(f"Exported to {output}")
    if push_to_hub is not None:
        if (name := local_base(output)) is not None:
            inform(
                f"The adapters name the local folder {name!r} as their base: say in the model card which model it is."
            )
        print(f"Uploaded to {upload(output, push_to_hub, private)}")
