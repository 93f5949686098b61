"""The loss of every causal language model class of transformers, against transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import VOCABULARY, small_config
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from milora_lightning.models.loss import causal_lm_loss, supervised_logits
from milora_lightning.models.supervision import check_causal

CLASSES: dict[str, type[PretrainedConfig]] = {config.__name__: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
LEFT_OUT = {
    "BltConfig": "its patches of bytes are embedded by tables of fixed size",
    "CohereCompassTextConfig": "its rotary embedding asks for parameters that its default configuration does not have",
    "DbrxConfig": "its attention's configuration lacks rope_theta, which the model asks for",
    "Dots3NoteConfig": "its vision adapter has a size that no attribute tells",
    "Gemma3nConfig": "needs timm",
    "Gemma4AssistantConfig": "its default configuration is refused by itself",
    "Gemma4UnifiedAssistantConfig": "its default configuration is refused by itself",
    "MusicgenConfig": "the class takes a part of this configuration",
    "MusicgenMelodyConfig": "the class takes a part of this configuration",
    "ReformerConfig": "hashes at random, and is differentiated in training only",
    "XLNetConfig": "where it is causal, transformers' own code fails on a padding mask",
    "ZambaConfig": "needs more than two layers",
    "Zamba2Config": "its sizes do not fit each other when they are small",
}
"""Why a class is not built here."""

OWN_LABELS = {
    *("BartConfig", "BigBirdPegasusConfig", "BlenderbotConfig", "BlenderbotSmallConfig", "MarianConfig", "MBartConfig"),
    *("MvpConfig", "PegasusConfig", "PLBartConfig", "TrOCRConfig", "WhisperConfig"),
    *("CpmAntConfig", "XLMConfig"),
}
"""Of classes whose own loss compares each position with its own label, and wants labels shifted beforehand."""
OTHER_LOSSES = {
    "GitConfig": "its own loss counts on an image before the text",
    "ProphetNetConfig": "its own loss also predicts the tokens after the next",
}
"""Why a class is compared with the cross-entropies of its own logits in place of its own loss."""

covered: set[str] = set()


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels of rows of three lengths, a token 0 in the middle."""
    mask = torch.arange(12) < torch.tensor([[12], [9], [5]])
    input_ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0)) * mask
    input_ids[1, 3] = 0
    labels = input_ids.where(mask, -100)
    labels[:, :3] = -100
    return input_ids, mask.long(), labels


def own_loss(model: PreTrainedModel, name: str) -> Tensor:
    """Transformers' own, with the mask of the padding, summed over the labelled tokens."""
    input_ids, mask, labels = padded_batch()
    targets = labels[:, 1:]
    supervised = targets != -100
    if name in OTHER_LOSSES:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1][supervised]
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
    if name in OWN_LABELS:
        labels = F.pad(targets, (0, 1), value=-100)
    mean: Tensor = model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return mean * supervised.sum()


def gradient(total: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    parts = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.filterwarnings("ignore:What ProphetNetForCausalLM does")
@pytest.mark.parametrize("name", CLASSES)
def test_loss_is_transformers_own(name: str) -> None:
    """And its gradient: with a head whose scale shows whatever is done to the logits, and as initialized."""
    if name in LEFT_OUT:
        pytest.skip(LEFT_OUT[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(CLASSES[name])).eval()
    head = model.get_output_embeddings()
    head.requires_grad_(False)
    input_ids, _, labels = padded_batch()
    with torch.inference_mode():  # as in evaluations
        got, want = causal_lm_loss(model, input_ids, labels), own_loss(model, name)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        head.weight.mul_(30)
    got, want = causal_lm_loss(model, input_ids, labels), own_loss(model, name)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    a, b = gradient(got, trained), gradient(want, trained)
    assert (a - b).norm() <= 1e-5 * b.norm()
    with torch.no_grad():  # which choose by likelihood
        logits = supervised_logits(model, input_ids, labels)
    targets = labels[:, 1:][labels[:, 1:] != -100]
    torch.testing.assert_close(F.cross_entropy(logits.float(), targets, reduction="sum"), want, rtol=1e-5, atol=0)
    covered.add(name)


def test_few_classes_are_left_out() -> None:
    if len(covered) + len(LEFT_OUT & CLASSES.keys()) < len(CLASSES):
        pytest.skip("Some of them did not run.")
    assert len(covered) >= 0.9 * len(CLASSES)


def attends_to_what_follows(model: PreTrainedModel) -> bool:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[:, :-1] for ids in (tokens, tokens.where(tokens != 10, 11))]
    return not torch.equal(*logits)


@pytest.mark.parametrize(
    "name", [n for n, c in CLASSES.items() if n not in LEFT_OUT and getattr(c(), "is_decoder", None) is False]
)
def test_exactly_the_models_that_attend_to_what_follows_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(CLASSES[name], is_decoder=False)).eval()
    if attends_to_what_follows(model):
        with pytest.raises(ValueError, match="is_decoder=False"):
            check_causal(model)
    else:
        check_causal(model)
