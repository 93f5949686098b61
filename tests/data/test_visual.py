"""Conversations about images: what a model of LLaVA's kind reads of them, and how it is trained and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_fixtures import isolate_cache
from helpers.models import quiet_trainer, save_tiny_model
from helpers.visual import COLOURS, FEATURES, conversation, save_tiny_llava, visual_data, visual_files
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from milora_lightning import (
    CausalLMModule,
    MiLoRAInit,
    PredictionWriter,
    SFTDataModule,
    export_merged,
    export_peft,
    lora_layers,
)
from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data import VisualInstructions

ADAPTER: dict[str, Any] = {"r": 8, "exclude_modules": ["vision_tower", "multi_modal_projector"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    visual_files(tmp_path / "data")
    return tmp_path / "data"


def only_batch(data: SFTDataModule) -> dict[str, Any]:
    data.setup("fit")
    (batch,) = data.epoch()
    return batch


def test_a_batch_is_what_the_models_own_processor_makes(llava: Path, folder: Path) -> None:
    """Token ids, placeholders and pixels are the processor's; the assistant's turns alone are learned."""
    processor = AutoProcessor.from_pretrained(llava)
    batch = only_batch(visual_data(folder, llava))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    found = {}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
        found[learned] = ids[mask.bool()].tolist()
    pixels = list(batch["images"]["pixel_values"])
    for name in COLOURS:
        text = f"<s>{system} USER: <image>\nWhat is it? ASSISTANT: {name}</s>USER: Sure? ASSISTANT: Yes.</s>"
        with Image.open(folder / "images" / f"{name}.png") as image:
            expected = processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
        ids = found[f" {name}</s> Yes.</s>"]
        assert ids == expected["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == FEATURES
        assert sum(torch.equal(expected["pixel_values"][0], each) for each in pixels) == 1
    assert processor.image_token_id not in found[" 3</s>"]


def test_images_are_in_the_order_of_their_rows(llava: Path, folder: Path) -> None:
    module = CausalLMModule(str(llava))
    module.configure_model()
    module.model.eval()
    batch = only_batch(visual_data(folder, llava))
    processor = AutoProcessor.from_pretrained(llava)
    shown = (batch["input_ids"] == processor.image_token_id).any(-1)
    whole = module.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **batch["images"]).logits
    place = iter(range(int(shown.sum())))
    for row in range(len(shown)):
        pixels = {"pixel_values": batch["images"]["pixel_values"][[next(place)]]} if shown[row] else {}
        alone = module.model(input_ids=batch["input_ids"][[row]], **pixels).logits
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(whole[row][real], alone[0][real])


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss by transformers itself."""
    with torch.no_grad():
        return model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, **batch["images"]).loss


@torch.no_grad()
def test_logits_of_a_batch_are_those_for_its_images(llava: Path, folder: Path) -> None:
    module = CausalLMModule(str(llava))
    module.configure_model()
    module.model.eval()
    batch = only_batch(visual_data(folder, llava))
    whole = module.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **batch["images"]).logits
    wanted = whole[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]
    torch.testing.assert_close(module(batch), wanted)
    blind = module({k: v for k, v in batch.items() if k != "images"})
    assert (blind - wanted).abs().max() > 0.1


def test_training_starts_at_the_model_learns_from_images_and_is_exported(
    llava: Path, folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForImageTextToText.from_pretrained(llava).eval()
    data = visual_data(folder, llava)
    batch = only_batch(data)
    module = CausalLMModule(
        str(llava), warmup_steps=0, lr_scheduler="constant", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    losses: list[float] = []

    class Keep(MiLoRAInit):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"].item())

    trainer = quiet_trainer(tmp_path, max_epochs=40, callbacks=[Keep(**ADAPTER)])
    trainer.fit(module, data)
    assert losses[0] == pytest.approx(loss_of(base, batch).item(), rel=1e-5)
    assert losses[-1] < 0.3 * losses[0]
    assert len(lora_layers(module)) == 2 * 7
    assert all("language_model" in name for name in lora_layers(module))
    pristine = dict(base.named_parameters())
    for name, parameter in module.model.named_parameters():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(parameter, pristine[name])
    module.eval()

    def loss(pixels: torch.Tensor) -> float:
        with torch.no_grad():
            total, tokens = module.loss({**batch, "images": {"pixel_values": pixels}})
        return (total / tokens).item()

    pixels = batch["images"]["pixel_values"]
    assert loss(pixels.roll(1, 0)) > 1.3 * loss(pixels)  # the answers are those to the images

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")
    export_merged(module, tmp_path / "merged", module.tokenizer)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert loss_of(merged, batch).item() == pytest.approx(loss(pixels), rel=1e-4)
    assert loss_of(loaded.model.eval(), batch).item() == pytest.approx(loss(pixels), rel=1e-5)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"
    export_peft(module, tmp_path / "peft", tokenizer=module.tokenizer)
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(llava), tmp_path / "peft").eval()
    assert loss_of(tuned, batch).item() == pytest.approx(loss(pixels), rel=1e-4)


def test_images_may_have_different_numbers_of_features(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 12), COLOURS["red"]).save(folder / "images" / "red.png")
    model = save_tiny_llava(tmp_path / "next", cuts=True)
    batch = only_batch(visual_data(folder, model))
    module = CausalLMModule(str(model))
    module.configure_model()
    placeholder = AutoProcessor.from_pretrained(model).image_token_id
    assert len(set((batch["input_ids"] == placeholder).sum(-1).tolist())) == 3  # red, the squares, and no image
    with torch.no_grad():
        total, tokens = module.loss(batch)
    base = AutoModelForImageTextToText.from_pretrained(model).eval()
    torch.testing.assert_close(total / tokens, loss_of(base, batch))


def test_questions_about_images_are_answered(llava: Path, folder: Path, tmp_path: Path) -> None:
    questions = [{"question_id": i, "image": f"{name}.png", "text": "What is it?"} for i, name in enumerate(COLOURS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    module = CausalLMModule(str(llava), max_new_tokens=3)
    writer = PredictionWriter(str(tmp_path / "answers.jsonl"))
    trainer = quiet_trainer(tmp_path, callbacks=[writer])
    trainer.predict(module, visual_data(folder, llava, test=str(folder / "questions.jsonl")))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["task"] for answer in answers] == ["0", "1", "2"]
    processor = AutoProcessor.from_pretrained(llava)
    for name, answer in zip(COLOURS, answers, strict=True):
        with Image.open(folder / "images" / f"{name}.png") as image:
            inputs = processor(text=answer["prompt"], images=image, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            tokens = module.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        text = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["generation"] == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation("red", ("What is it?", "red")), "0 placeholders <image> and one image"),
        (conversation(None, ("<image>\nWhat?", "red")), "1 placeholders <image> and no image"),
        (conversation("red", ("<image><image>", "red")), "2 placeholders <image> and one image"),
        (conversation("red", ("What?", "<image>")), "stands in what the assistant says"),
        (conversation("pink", ("<image>\nWhat?", "pink")), "there is no image '.*pink.png'. Set data.source.images"),
        ({"image": "red.png"}, "neither conversations nor a text with a question"),
    ],
)
def test_rows_that_cannot_be_shown_are_refused(row: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / "other.json"
    path.write_text(json.dumps([conversation(None, ("a", "b")), row]))
    with pytest.raises((ValueError, FileNotFoundError), match=f"In row 2 of .*other.json: .*{message}"):
        VisualInstructions(str(path), str(folder / "images")).load("train")


def test_an_example_without_its_image_is_left_out(llava: Path, folder: Path) -> None:
    path = folder / "long.json"
    long = conversation("red", ("<image>\nWhat is it?", "red"), ("Sure? " * 20, "Yes. " * 40))
    path.write_text(json.dumps([long, conversation("blue", ("<image>\nWhat is it?", "blue"))]))
    data = visual_data(folder, llava, path, max_length=280)
    with pytest.warns(UserWarning, match="1 of 2 examples of the train data lose their image"):
        data.setup("fit")
    assert len(data.examples("train")) == 1
    path.write_text(json.dumps([long]))
    with pytest.raises(ValueError, match="No example of the train data has kept"):
        visual_data(folder, llava, path, max_length=280).setup("fit")


def test_what_has_no_images_is_refused(folder: Path, llava: Path, tmp_path: Path) -> None:
    text_model = save_tiny_model(tmp_path / "text", "llama")
    with pytest.raises(ValueError, match="takes no images: choose a model of LLaVA's kind"):
        visual_data(folder, text_model).setup("fit")
    with pytest.raises(ValueError, match="neither packing nor streaming"):
        visual_data(folder, llava, packing=True)


def test_choices_without_a_look_at_the_image_are_refused(llava: Path, folder: Path) -> None:
    class Choosing(VisualInstructions):
        def choices(self, prompt: str) -> list[str]:
            return list(COLOURS)

    source = Choosing(str(folder / "train.json"), str(folder / "images"))
    with pytest.raises(ValueError, match="would choose without seeing the images: use 'generation'"):
        SFTDataModule(source, str(llava), answer_by="likelihood")
    assert SFTDataModule(source, str(llava)).answer_by == "generation"


def test_a_part_is_held_out(folder: Path) -> None:
    source = VisualInstructions(str(folder / "train.json"), str(folder / "images"), validation_size=1)
    train, validation = source.load("train"), source.load("validation")
    assert (len(train), len(validation)) == (3, 1)
    assert not set(train["messages"]) & set(validation["messages"])
    assert source.load("test") is None
