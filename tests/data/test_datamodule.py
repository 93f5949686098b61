from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.data_fixtures import InMemory, isolate_cache, make_tokenizer, rows
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from milora_lightning.data import Files, SFTDataModule, WordProblems
from milora_lightning.models import pretrained

SPLITS = {"train": rows(30), "validation": rows(11), "test": rows(7)}


def make_data(splits: dict = SPLITS, ranks: tuple[int, int] = (1, 0), **options) -> SFTDataModule:
    data = SFTDataModule(InMemory(**splits), make_tokenizer(), **{"template": "plain", "batch_size": 4, **options})
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks[0], "rank": ranks[1]})
    return data


def responses(batches) -> list[str]:
    tokenizer = make_tokenizer()
    return [tokenizer.decode(row[row >= 0]) for batch in batches for row in batch["labels"]]


def expected(split: str) -> list[str]:
    return [f"{response}</s>" for _, response in SPLITS[split]]


def test_epoch_trains_on_every_response_once():
    data = make_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(responses(batches)) == sorted(expected("train"))
    assert [len(batch["input_ids"]) for batch in batches] == [4] * 7 + [2]
    assert all(set(batch) == {"input_ids", "attention_mask", "labels"} for batch in batches)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in batches)


def test_order_depends_on_seed_and_epoch():
    def epoch(seed: int, number: int) -> list[str]:
        data = make_data(seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return responses(loader)

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3


@pytest.mark.parametrize(("stage", "split"), [("validate", "validation"), ("test", "test")])
def test_evaluation_has_losses_and_prompts(stage, split):
    number = {"num_generation_examples" if stage == "validate" else "num_test_generation_examples": 5}
    data = make_data(**number, eval_batch_size=3, generation_batch_size=2)
    data.setup(stage)
    losses, prompts = data.val_dataloader() if stage == "validate" else data.test_dataloader()
    assert sorted(responses(losses)) == sorted(expected(split))
    assert max(len(batch["input_ids"]) for batch in losses) == 3
    batches = list(prompts)
    references = [reference for batch in batches for reference in batch["reference"]]
    assert sorted(references) == sorted(r for _, r in SPLITS[split][:5])
    assert [len(batch["prompt"]) for batch in batches] == [2, 2, 1]
    lengths = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    first = batches[0]
    assert make_tokenizer().decode(first["input_ids"][0][first["attention_mask"][0] == 1]) == "<s>" + first["prompt"][0]
    assert first["attention_mask"][:, -1].all()


def test_generation_can_be_left_out():
    data = make_data(num_generation_examples=0)
    data.setup("validate")
    assert len(data.val_dataloader()) == 1


def test_prediction_takes_all_of_test_in_order():
    data = make_data(num_test_generation_examples=2)
    data.setup("predict")
    references = [reference for batch in data.predict_dataloader() for reference in batch["reference"]]
    assert references == [response for _, response in SPLITS["test"]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_evaluation_without_repeats(ranks):
    shares = []
    for rank in range(ranks):
        data = make_data(ranks=(ranks, rank), num_generation_examples=7)
        data.setup("validate")
        shares.append([list(loader) for loader in data.val_dataloader()])
    losses, prompts = zip(*shares, strict=True)
    assert len({len(share) for share in losses}) == len({len(share) for share in prompts}) == 1
    assert sorted(r for share in losses for r in responses(share) if r) == sorted(expected("validation"))
    references = [reference for share in prompts for batch in share for reference in batch["reference"]]
    assert sorted(r for r in references if r is not None) == sorted(r for _, r in SPLITS["validation"][:7])
    assert references.count(None) == -7 % ranks


def test_ranks_train_on_the_batches_of_one_process():
    def epoch(ranks: int, rank: int) -> list[list[str]]:
        data = make_data(ranks=(ranks, rank), batch_size=6 // ranks)
        data.setup("fit")
        return [responses([batch]) for batch in data.train_dataloader()]

    together = [sorted(a + b) for a, b in zip(epoch(2, 0), epoch(2, 1), strict=True)]
    assert together == [sorted(batch) for batch in epoch(1, 0)]


def test_stages_load_what_they_need_once():
    class Counting(InMemory):
        def load(self, split):
            loads.append(split)
            return super().load(split)

    loads: list[str] = []
    data = SFTDataModule(Counting(**SPLITS), make_tokenizer(), template="plain")
    data.setup("validate")
    assert loads == ["validation"]
    data.setup("fit")
    data.setup("fit")
    assert loads == ["validation", "train"]
    data.setup("test")
    data.setup("predict")
    data.setup()
    assert loads == ["validation", "train", "test"]


@pytest.mark.parametrize("fn", [TrainerFn.FITTING, None])
def test_one_process_fills_the_cache_for_the_others(fn, tmp_path, monkeypatch):
    """Before a stage, or in a script of the user's own before any."""
    isolate_cache(monkeypatch, tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')

    def files_after(world_size: int, method: str, *args: str | None) -> set[str]:
        data = SFTDataModule(Files(train=str(path)), make_tokenizer())
        data.trainer = SimpleNamespace(world_size=world_size, state=SimpleNamespace(fn=fn))
        getattr(data, method)(*args)
        return {file.name for file in tmp_path.rglob("*.arrow")}

    assert files_after(1, "prepare_data") == set()
    filled = files_after(2, "prepare_data")
    assert len(filled) == 2  # the rows, and the tokens
    assert files_after(2, "setup", fn and fn.value) == filled


def test_a_sample_is_of_the_training_examples_and_changes_nothing():
    """What a start from data looks at: the same in any run, with little padding."""
    data, other = make_data(), make_data(seed=5)
    for each in (data, other):
        each.setup("fit")
    before = responses(data.train_dataloader())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    batches = data.sample_batches(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert responses(data.train_dataloader()) == before
    assert [len(batch["input_ids"]) for batch in batches] == [4] * 3
    sampled = responses(batches)
    assert len(set(sampled)) == 12
    assert set(sampled) < set(expected("train"))
    assert responses(other.sample_batches(3)) == sampled
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    assert all(shorter.max() <= longer.min() for shorter, longer in pairwise(lengths))
    assert sorted(responses(data.sample_batches(99))) == sorted(expected("train"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(num_workers):
    data = make_data(ranks=(2, 1), num_workers=num_workers)
    data.setup("validate")
    losses, prompts = (list(loader) for loader in data.val_dataloader())
    assert [len(responses([batch])) for batch in losses] == [4, 2]
    assert responses(losses)[-1] == ""  # the filler
    assert [reference for batch in prompts for reference in batch["reference"]][-1] is None


@pytest.mark.parametrize(
    ("stage", "split"), [("fit", "train"), ("validate", "validation"), ("test", "test"), ("predict", "test")]
)
def test_missing_split_is_named(stage, split):
    with pytest.raises(ValueError, match=f"There is no {split} data. Set data.source.{split} to"):
        make_data({}).setup(stage)


def test_loader_before_setup_says_what_to_call():
    with pytest.raises(ValueError, match=r"There is no train data\. .* call setup\(\) for a stage that uses train"):
        make_data().train_dataloader()


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "generation_batch_size", "pad_to_multiple_of"])
def test_sizes_have_to_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        make_data(**{name: 0})


def test_tokenizer_is_loaded_by_name(monkeypatch):
    monkeypatch.setattr(pretrained, "load_tokenizer", {"some-model": make_tokenizer()}.__getitem__)
    data = SFTDataModule(InMemory(**SPLITS), "some-model", template="plain", num_generation_examples=0)
    data.setup("test")
    assert sorted(responses(data.test_dataloader()[0])) == sorted(expected("test"))
    with pytest.raises(ValueError, match="needs a tokenizer: pass the model's name"):
        SFTDataModule(InMemory(**SPLITS)).setup("fit")


def test_arguments_can_be_written_in_yaml(tmp_path, monkeypatch):
    isolate_cache(monkeypatch, tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SFTDataModule, "data")
    prefix = "milora_lightning.data."
    for name, init_args, source in [
        ("WordProblems", {"train_size": 7}, WordProblems),
        ("Files", {"train": ["a.json", "b.json"], "validation_size": 0.1}, Files),
    ]:
        config = {"source": {"class_path": prefix + name, "init_args": init_args}, "tokenizer": "m", "template": "chat"}
        parsed = parser.parse_object({"data": {"class_path": prefix + "SFTDataModule", "init_args": config}})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name until 4.49
        data = instantiate(parsed).data
        assert isinstance(data.source, source)
        assert (data.tokenizer, data.template) == ("m", "chat")


class Counter(LightningModule):
    """Counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[list[str]]] = {"train": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(responses([batch]))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if "reference" not in batch:
            self.seen["validation"].append(responses([batch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("with_validation", [True, False])
def test_trainer_sets_the_epoch_and_can_do_without_validation(tmp_path, with_validation):
    splits = SPLITS if with_validation else {"train": SPLITS["train"]}
    data = SFTDataModule(InMemory(**splits), make_tokenizer(), template="plain", batch_size=4)
    module = Counter()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    seen = module.seen["train"]
    epochs = seen[:8], seen[8:]
    assert all(sorted(r for batch in epoch for r in batch) == sorted(expected("train")) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(module.seen["validation"]) == (6 if with_validation else 0)
