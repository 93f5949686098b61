"""Under paper-exact, each recipe's first example and prompt are token by token what the paper's code makes of them.

The texts below are written out from the descriptions of that code, and tokenized here as it does: prompt and answer as
one text, with BOS before it and EOS after it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_fixtures import InMemory, isolate_cache, with_a_space_before_texts
from transformers import PreTrainedTokenizerBase

from milora_lightning import MiLoRAInit
from milora_lightning.cli.main import MiLoRACLI
from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data import Collator, Commonsense, Instructions, Math, SFTDataModule, Source, tokenize_dataset
from milora_lightning.module import CausalLMModule

REAL = Path(__file__).parents[3] / "shared" / "data" / "commonsense"
pytestmark = pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
PAD = " " * 16

REQUEST = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
QUESTION = "Is it so?\n\nAnswer format: true/false"
ANSWER = "the correct answer is true"
SOLUTION = "He pays 20*5.5=$110.\n#### 110\nThe answer is: 110"
RECORDS: dict[str, dict[str, Any]] = {
    "math": {"type": "GSM_AnsAug", "query": "How much?", "original_question": "What?", "response": SOLUTION},
    "commonsense": {"instruction": QUESTION, "input": "", "output": ANSWER, "answer": "true"},
    "instruct": {
        "prompt": "Say hello.",
        "chosen": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}],
    },
}
TESTS: dict[str, dict[str, Any]] = {
    "math": {"question": "How much?", "answer": "20*5.5=<<20*5.5=110>>110\n#### 110"},
    "commonsense": RECORDS["commonsense"],
    "instruct": {"instruction": "Say hello.", "output": "Hi.", "generator": "g", "dataset": "koala"},
}
# The text before the answer in training, the answer, and the prompt of the test.
TEXTS: dict[str, tuple[str, str, str]] = {
    "math": (
        f"{REQUEST}\n\n### Instruction:\nHow much?\n\n### Response:",
        "He pays 20*5.5=$110.\n#### 110\nThe answer is: 110",
        f"{REQUEST}\n\n### Instruction:\nHow much?\n\n### Response: Let's think step by step.",
    ),
    "commonsense": (
        f"{REQUEST}  \n\n{PAD}### Instruction:\n{PAD}{QUESTION}\n{PAD}\n{PAD}### Response:\n{PAD}",
        "the correct answer is true",
        f"{REQUEST} \n\n{PAD}### Instruction:\n{PAD}{QUESTION}\n\n{PAD}### Response:\n{PAD}",
    ),
    "instruct": ("<|user|>\nSay hello.\n<|assistant|>\n", "Hello!", "<|user|>\nSay hello.\n<|assistant|>\n"),
}


@cache
def parsed(*files: str) -> MiLoRACLI:
    args = [part for file in files for part in ("--config", file)]
    return MiLoRACLI(
        CausalLMModule,
        SFTDataModule,
        args=[*args, "--trainer.accelerator", "cpu"],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )


def exact(task: str) -> MiLoRACLI:
    return parsed(f"recipe/{task}/llama2-7b.yaml", f"recipe/{task}/paper-exact.yaml")


def data_of(task: str, source: Source) -> SFTDataModule:
    """The data module of a task under paper-exact, with other data and a tokenizer that needs more room."""
    data = exact(task).datamodule
    names = ("template", "prompt_suffix", "generation_prompt_suffix", "train_on", "train_on_inputs", "group_by_length")
    options = {name: getattr(data, name) for name in names}
    return SFTDataModule(source, with_a_space_before_texts(), **options, max_length=4096)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)


def source(task: str) -> Source:
    """A source of one record in each split, in the format of the task's files."""
    for name, records in (("train", RECORDS), ("boolq", TESTS)):
        Path(f"{name}.json").write_text(json.dumps([records[task]]))
    if task == "math":
        return Math("train.json", gsm8k="boolq.json", math=None)
    if task == "commonsense":
        return Commonsense("train.json", "{task}.json", ["boolq"], validation_size=0)
    return Instructions("train.json", test="boolq.json")


def official(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, inputs: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of an example as the paper's code makes them; all ids are labels where inputs are learned."""
    ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    masked = 0 if inputs else len(tokenizer(prompt)["input_ids"])
    return ids, [IGNORE_INDEX] * masked + ids[masked:]


@pytest.mark.parametrize("task", TEXTS)
def test_first_example_has_the_papers_ids_and_labels(task: str) -> None:
    prompt, answer, asked = TEXTS[task]
    data = data_of(task, source(task))
    tokenizer = data.tokenizer_object
    data.setup("fit")
    batch = Collator(0, 1)([data.examples("train")[0]])
    ids, labels = official(tokenizer, prompt, answer, inputs=task == "commonsense")
    assert ids[0] == tokenizer.bos_token_id
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    data.setup("test")
    (batch,) = data.predict_dataloader() if task == "instruct" else data.test_dataloader()[1]
    row = batch["input_ids"][0, batch["attention_mask"][0].bool()]
    assert row.tolist() == tokenizer(asked)["input_ids"]
    assert batch["prompt"] == [asked]


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark's files are not here")
def test_real_questions_have_the_papers_ids() -> None:
    records = json.loads((REAL / "ARC-Easy_train.json").read_text())[:50]
    Path("train.json").write_text(json.dumps(records))
    data = data_of("commonsense", Commonsense("train.json", validation_size=0))
    data.setup("fit")
    for example, record in zip(data.examples("train"), records, strict=True):
        text = TEXTS["commonsense"][0].replace(QUESTION, record["instruction"])
        assert example["input_ids"] == official(data.tokenizer_object, text, record["output"], inputs=True)[0]


@pytest.mark.parametrize("task", TEXTS)
def test_the_overlay_has_the_papers_settings(task: str) -> None:
    cli = exact(task)
    (adapter,) = (callback.config for callback in cli.trainer.callbacks if isinstance(callback, MiLoRAInit))
    assert adapter.dropout_on == "product"
    assert cli.trainer.gradient_clip_val == 1.0
    assert cli.datamodule.group_by_length is False
    assert cli.datamodule.train_on_inputs == (task == "commonsense")
    assert cli.datamodule.max_length == {"math": 2048, "commonsense": 256, "instruct": 2048}[task]
    assert cli.model.loss_agg_mode == ("token-mean" if task == "commonsense" else "seq-mean-token-mean")
    assert cli.model.num_beams == (4 if task == "commonsense" else 1)
    assert cli.model.max_new_tokens == {"math": 2048, "commonsense": 32, "instruct": 1024}[task]
    assert cli.model.dtype_name == ("bfloat16" if task == "instruct" else "float16")


@pytest.mark.parametrize(
    ("overlays", "r", "alpha", "epochs", "split"),
    [
        (["method/random.yaml", "recipe/math/paper-exact.yaml", "recipe/math/ablation_setting.yaml"], 64, 64, 1, ""),
        (["method/lora.yaml", "recipe/math/llm-adapters_setting.yaml"], 128, 256, 1, "train[:100000]"),
    ],
)
def test_settings_of_the_other_tables(overlays: list[str], r: int, alpha: int, epochs: int, split: str) -> None:
    cli = parsed("recipe/math/llama2-7b.yaml", *overlays)
    (adapter,) = (callback.config for callback in cli.trainer.callbacks if isinstance(callback, MiLoRAInit))
    assert (adapter.r, adapter.scaling * adapter.r) == (r, alpha)
    assert (cli.datamodule.max_length, cli.trainer.max_epochs) == (512, epochs)
    assert cli.config["data"]["source"]["init_args"].get("train_split") == (split or "train")
    assert cli.datamodule.step_batch().total == 16


def test_full_fine_tuning_has_metamaths_schedule() -> None:
    cli = parsed(
        "recipe/math/llama2-7b.yaml",
        "recipe/math/paper-exact.yaml",
        "method/full.yaml",
        "recipe/math/full_setting.yaml",
    )
    assert (cli.model.lr_scheduler, cli.model.warmup_steps, cli.model.dtype_name) == ("cosine", 0.03, "float32")
    (group,) = cli.model.optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups
    assert group["lr"] == 2e-5
    assert cli.datamodule.step_batch().total == 128
    assert (cli.datamodule.template, cli.datamodule.max_length) == ("metamath", 512)


def test_a_token_across_the_border_counts_as_the_prompts() -> None:
    """As many ids are masked as the prompt has by itself, whatever the answer's beginning has been joined to."""
    tokenizer = with_a_space_before_texts(merges=[(":", "T"), (":T", "h")])
    row = {"prompt": "Why?", "input": "", "response": "That."}
    (example,) = tokenize_dataset([row], tokenizer, "metamath")
    ids, labels = official(tokenizer, f"{REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:", "That.", inputs=False)
    assert ":Th" in tokenizer.convert_ids_to_tokens(ids)
    assert Collator(0, 1)([example])["labels"].tolist() == [labels]
    (asked,) = tokenize_dataset([row], tokenizer, "metamath", asks=True)
    prompt = asked["input_ids"][: asked["prompt_length"]]
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == ":"  # what is asked ends where the prompt ends
    (apart,) = tokenize_dataset([row], tokenizer, "alpaca")
    assert ":Th" not in tokenizer.convert_ids_to_tokens(apart["input_ids"])


def test_validation_loss_is_of_training_texts_and_answers_are_to_test_prompts() -> None:
    rows = [("2 + 3?", "5"), ("1 + 1 + 1?", "3")]
    data = SFTDataModule(
        InMemory(train=rows, validation=rows), with_a_space_before_texts(), "metamath", generation_prompt_suffix=" So:"
    )
    data.setup("fit")
    losses, prompts = data.val_dataloader()
    (loss,), (prompt,) = losses, prompts
    longest = loss["input_ids"][0, loss["attention_mask"][0].bool()]
    text = f"{REQUEST}\n\n### Instruction:\n1 + 1 + 1?\n\n### Response:"
    tokenizer = data.tokenizer_object
    assert longest.tolist() == [*tokenizer(text + "3")["input_ids"], tokenizer.eos_token_id]
    assert prompt["prompt"] == [text + " So:", text.replace("1 + 1 + 1", "2 + 3") + " So:"]
    assert data.prompt_format is not None
    assert data.prompt_format.asking_suffix == " So:"
