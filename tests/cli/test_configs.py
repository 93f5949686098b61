"""Every shipped YAML says its command, parses and instantiates; every recipe trains."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import save_tiny_model

from milora_lightning import MiLoRAInit, lora_layers
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.main import CONFIGS, MiLoRACLI, main
from milora_lightning.data import SFTDataModule
from milora_lightning.models.pretrained import load_causal_lm
from milora_lightning.module import CausalLMModule

SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
# A recipe lists a task's settings and a model; the others are overlays.
RECIPES = [str(p.relative_to(CONFIGS)) for p in SHIPPED if "\nconfig:\n" in p.read_text()]
OTHERS = [p for p in SHIPPED if str(p.relative_to(CONFIGS)) not in RECIPES]
METHODS = sorted(str(p.relative_to(CONFIGS)) for p in (CONFIGS / "method").iterdir())


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(CONFIGS)) for p in SHIPPED])
def test_header_gives_the_command(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert "python main.py" in path.read_text()
    assert str(path.relative_to(CONFIGS)) in path.read_text()


@pytest.mark.parametrize("path", OTHERS, ids=[str(p.relative_to(CONFIGS)) for p in OTHERS])
def test_parses_and_instantiates_from_any_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = (
        [] if path == CONFIGS / "milora.yaml" else ["--config", str(CONFIGS / "milora.yaml")]
    )  # the others are overlays
    args = [*base, "--config", str(path), "--trainer.accelerator=cpu"]  # whatever this machine has
    if path.name == "fsdp.yaml":
        with pytest.raises(ValueError, match="requires a GPU"):
            MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
        return
    cli = MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
    assert isinstance(cli.model, CausalLMModule)
    assert cli.datamodule.tokenizer == cli.model.name_or_path
    assert any(isinstance(callback, MiLoRAInit) for callback in cli.trainer.callbacks)


RECORDS = {
    "commonsense": {"instruction": "Is it?\n\nAnswer format: true/false", "output": "the correct answer is true"},
    "math": {"query": "2 + 3?", "response": "2 + 3 = 5.\nThe answer is: 5"},
    "instruct": {"prompt": "Say hello.", "chosen": [{"role": r, "content": "Hello."} for r in ("user", "assistant")]},
}
TESTS = {
    "commonsense": ["--data.source.tasks", "[commonsense]"],
    "math": ["--data.source.math", "null"],
    "instruct": [],
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and a file of each task's records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "model", "llama")
    for task, record in RECORDS.items():
        (tmp_path / f"{task}.json").write_text(json.dumps([{**record, "answer": "true"}] * 6))
    return tmp_path


def start(recipe: str, *overlays: str, command: str = "fit", options: tuple[str, ...] = ()) -> Any:
    """Run a recipe on the tiny model and files."""
    task = Path(recipe).parent.name
    location = "{task}.json" if task == "commonsense" else f"{task}.json"  # the tests of commonsense have names
    small = {
        "model.name_or_path": "model",
        "model.max_new_tokens": "4",
        "data.source.train": f"{task}.json",
        "data.source.validation_size": "2",
        f"data.source.{'gsm8k' if task == 'math' else 'test'}": location,
        "data.batch_size": "2",
        "data.global_batch_size": "2",
        "data.num_generation_examples": "1",
        "adapter.r": "4",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    steps = {"trainer.max_steps": "2", "trainer.accumulate_grad_batches": "1", "trainer.val_check_interval": "1"}
    named = [part for name in (recipe, *overlays) for part in ("--config", name)]
    set_to = [part for name, value in {**small, **steps}.items() for part in (f"--{name}", value)]
    return main([command, *named, *set_to, *TESTS[task], *options])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_starts(recipe: str, workplace: Path) -> None:
    trainer = start(recipe).trainer
    assert trainer.global_step == 2
    (task,) = (t for t in RECORDS if f"/{t}/" in recipe)
    description = read_checkpoint(workplace / "runs" / task / "last.ckpt")["state_dict"]["milora_lightning"]
    assert description["config"]["init"] == "milora"
    assert len(description["adapters"]) == 2 * 5


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("task", ["math", "commonsense"])
def test_recipe_starts_as_the_papers_code_does(task: str, workplace: Path) -> None:
    """A float16 base, examples of the paper's texts, and answers by its beams."""
    overlay = f"recipe/{task}/paper-exact.yaml"
    cli = start(f"recipe/{task}/llama2-7b.yaml", overlay, options=("--data.max_length", "64"))
    assert cli.trainer.global_step == 2
    assert {parameter.dtype for parameter in cli.model.model.parameters()} == {torch.float16, torch.float32}
    assert {layer.dropout_on for layer in lora_layers(cli.model).values()} == {"product"}


def test_there_is_a_recipe_for_each_task_and_model() -> None:
    models = {"llama2-7b", "llama3-8b", "qwen2.5-7b"}
    assert {tuple(Path(recipe).with_suffix("").parts[1:]) for recipe in RECIPES} == {
        (task, model) for task in RECORDS for model in models
    }


@pytest.mark.parametrize(
    ("recipe", "r", "epochs"), [("commonsense", 32, 3), ("math", 64, 3), ("instruct", 32, 3), ("pissa_setting", 128, 1)]
)
def test_recipes_have_the_papers_settings(recipe: str, r: int, epochs: int) -> None:
    files = [f"recipe/{recipe}/llama2-7b.yaml"]
    pissa = recipe == "pissa_setting"
    if pissa:
        files = ["recipe/math/llama2-7b.yaml", "method/lora.yaml", "recipe/math/pissa_setting.yaml"]
    args = [part for file in files for part in ("--config", file)]
    cli = MiLoRACLI(
        CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None, auto_configure_optimizers=False
    )
    (adapter,) = (callback.config for callback in cli.trainer.callbacks if isinstance(callback, MiLoRAInit))
    assert (adapter.r, adapter.scaling, cli.trainer.max_epochs) == (r, 1.0, epochs)
    assert adapter.lora_dropout == (0 if pissa else 0.05)
    expected = "all-linear" if pissa else ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert adapter.target_modules == expected or tuple(adapter.target_modules) == expected
    assert cli.datamodule.step_batch().total == cli.datamodule.global_batch_size == (128 if pissa else 16)
    assert cli.datamodule.template == "alpaca"
    assert cli.datamodule.prompt_suffix == ("Let's think step by step.\n" if "math" in files[0] else "")
    (group,) = cli.model.optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-5 if pissa else 3e-4, 0)
    assert (cli.model.lr_scheduler, cli.model.warmup_steps) == (("cosine", 24) if pissa else ("linear", 100))
    assert (cli.model.dtype_name, cli.trainer.precision) == ("bfloat16", "32-true")
    assert (cli.model.loss_agg_mode, cli.model.num_beams, cli.trainer.gradient_clip_val) == ("token-mean", 1, 1.0)
    assert (cli.datamodule.train_on_inputs, cli.datamodule.group_by_length) == (False, True)
    assert not cli.datamodule.generation_prompt_suffix


@pytest.mark.parametrize("method", METHODS)
def test_method_changes_the_start_alone(method: str, workplace: Path) -> None:
    name = Path(method).stem
    (workplace / "text.txt").write_text("What is 1 plus 2? " * 100)
    kept = ("--adapter.preserve", "text.txt") if name == "sc_lora" else ()
    cli = start("recipe/math/llama2-7b.yaml", method, options=kept)
    layers = lora_layers(cli.model)
    assert cli.trainer.global_step == 2
    start_of = {"milora-strict": "milora", "lora-plus": "lora", "rslora": "lora"}.get(name, name)
    assert {layer.init for layer in layers.values()} == (set() if name == "full" else {start_of})
    scale = {"lora": 2.0, "lora-plus": 2.0, "rslora": cli.trainer.callbacks[0].config.r ** 0.5 if layers else 0.0}
    assert {layer.scaling for layer in layers.values()} <= {scale.get(name, 1.0)}
    groups = cli.trainer.optimizers[0].param_groups
    rates = [group["initial_lr"] / groups[0]["initial_lr"] for group in groups]
    assert rates == ([1.0, 16.0] if name == "lora-plus" else [1.0])


def test_pissas_setting_starts_after_a_method(workplace: Path) -> None:
    cli = start("recipe/math/llama2-7b.yaml", "method/lora.yaml", "recipe/math/pissa_setting.yaml")
    layers = lora_layers(cli.model)
    assert {(layer.init, layer.scaling, layer.lora_dropout) for layer in layers.values()} == {("lora", 1.0, 0.0)}
    assert len(layers) == 2 * 7


def test_full_fine_tuning_trains_everything_and_is_tested_from_its_checkpoint(workplace: Path) -> None:
    fitted = start("recipe/commonsense/llama2-7b.yaml", "method/full.yaml")
    parameters = dict(fitted.model.named_parameters())
    assert all(p.requires_grad and p.dtype is torch.float32 for p in parameters.values())
    pristine = load_causal_lm("model").state_dict()
    assert not any(torch.equal(p, pristine[name.removeprefix("model.")]) for name, p in parameters.items())
    path = str(workplace / "runs" / "commonsense" / "last.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() >= parameters.keys()
    options = ("--ckpt_path", path, "--data.answer_by", "likelihood")
    tested = start("recipe/commonsense/llama2-7b.yaml", "method/full.yaml", command="test", options=options)
    assert {"test_accuracy", "test_accuracy/commonsense", "test_loss"} <= tested.trainer.callback_metrics.keys()
    assert all(torch.equal(p, parameters[name]) for name, p in tested.model.named_parameters())
    with pytest.raises(SystemExit, match=r"holds no adapters.*--config method/full\.yaml"):
        start("recipe/commonsense/llama2-7b.yaml", command="test", options=options)


def test_commands_in_comments_name_configs_that_exist() -> None:
    for path in SHIPPED:
        for command in re.findall(r"python main.py.*", path.read_text()):
            words = shlex.split(command.rstrip("\\"))
            for option, name in itertools.pairwise(words):
                assert option != "--config" or (CONFIGS / name).is_file(), command


def test_a_config_of_several_commands_comes_before_the_command_which_alone_is_made_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    monkeypatch.setattr(MiLoRACLI, "_run_subcommand", lambda cli, name: None)
    monkeypatch.setattr(MiLoRACLI, "instantiate_classes", lambda cli: made.append([*cli._subcommand_parsers]))
    config = tmp_path / "both.yaml"
    of_each = {name: {"model": {"name_or_path": f"to-{name}"}} for name in ("fit", "validate")}
    config.write_text(yaml.safe_dump(of_each))
    with pytest.raises(SystemExit):
        main(["--config", str(config), "validate", "--print_config"])
    assert "to-validate" in capsys.readouterr().out
    main(["fit", "--model.name_or_path=x", "--data.source.train=x"])
    main(["--config", str(config), "fit", "--data.source.train=x"])
    assert made == [["fit"], ["fit", "validate", "test", "predict"]]
