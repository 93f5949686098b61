"""The command line as a user calls it, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import run
from helpers.models import TINY_CONFIGS, tiny_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from transformers import AutoModelForCausalLM

from milora_lightning import MiLoRAInit, lora_layers
from milora_lightning.checkpoint.adapter import KEY
from milora_lightning.checkpoint.options import differences
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.config_files import replaced_checkpoints
from milora_lightning.cli.main import CONFIGS, resolve_configs
from milora_lightning.cli.trainer_defaults import missing_options


def test_an_evaluation_leaves_the_config_of_the_run(project: Path) -> None:
    """Which it would replace in the same folder, as there is without a logger, by one that fit does not take."""
    path = project / "out" / "config.yaml"
    run("validate", "--config", "mine.yaml", "--data.batch_size", "3")
    assert yaml.safe_load(path.read_text())["data"]["batch_size"] == 3
    run("fit", "--config", "mine.yaml", "--trainer.max_steps", "1")
    fitted = path.read_text()
    (checkpoint,) = (project / "out").rglob("*.ckpt")
    run("validate", "--config", "mine.yaml", "--ckpt_path", str(checkpoint))
    assert path.read_text() == fitted
    run("fit", "--config", str(path), "--trainer.max_steps", "2", "--ckpt_path", str(checkpoint))
    assert yaml.safe_load(path.read_text())["trainer"]["max_steps"] == 2


def test_fit_validate_test_predict(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", "--config", "mine.yaml").trainer
    printed = capsys.readouterr().out
    assert "Adapters initialized: milora" in printed
    assert re.search(r"validation\s*┃ before\s*┃ after", printed)
    (path,) = (project / "out").rglob("*.ckpt")
    assert path.stat().st_size < 150_000
    validated = run("validate", "--config", "mine.yaml", "--ckpt_path", str(path)).trainer.callback_metrics
    for name, value in fitted.callback_metrics.items():
        if name.startswith("val_"):
            assert validated[name].item() == pytest.approx(value.item(), rel=1e-5)
    tested = run("test", "--config", "mine.yaml", "--ckpt_path", str(path)).trainer.callback_metrics
    assert tested["test_loss"].item() == pytest.approx(validated["val_loss"].item(), rel=1e-5)
    run("predict", "--config", "mine.yaml", "--ckpt_path", str(path), "--predictions.output", "answers.jsonl")
    answers = [json.loads(line) for line in (project / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert all(a.keys() == {"prompt", "instruction", "generation", "reference", "task"} for a in answers)


def test_resume_from_the_last_checkpoint(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = {"dirpath": "saved", "every_n_train_steps": 1, "save_last": True}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}]
    adapter = {"lora_dropout": 0.3}
    model = {"lr_scheduler": "constant_with_warmup"}  # one that does not depend on where the run is to end
    saving = {"model": model, "adapter": adapter, "trainer": {"callbacks": callbacks}}
    (project / "saving.yaml").write_text(yaml.safe_dump(saving))
    options = ["fit", "--config", "mine.yaml", "--config", "saving.yaml"]
    run(*options, "--trainer.max_steps", "5", "--trainer.callbacks.dirpath", "whole")
    run(*options, "--trainer.max_steps", "3")
    assert "Adapters initialized" in capsys.readouterr().out
    # another seed: what matters has to come from the checkpoint
    run(*options, "--trainer.max_steps", "5", "--ckpt_path", "last", "--seed_everything", "9")
    assert "Adapters initialized" not in capsys.readouterr().out
    whole, resumed = (read_checkpoint(project / folder / "last.ckpt") for folder in ("whole", "saved"))
    assert whole["global_step"] == resumed["global_step"] == 5
    assert all(k == KEY or torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())


def test_tokenizer_follows_the_model_and_overlays_compose(project: Path) -> None:
    (project / "overlay.yaml").write_text(yaml.safe_dump({"adapter": {"init": "pissa"}, "trainer": {"max_steps": 1}}))
    cli = run("fit", "--config", "mine.yaml", "--config=overlay.yaml", "--adapter.lora_dropout", "0.1")
    assert cli.datamodule.tokenizer.name_or_path == "model"
    (path,) = (project / "out").rglob("*.ckpt")
    config = read_checkpoint(path)["state_dict"]["milora_lightning"]["config"]
    assert (config["init"], config["r"], config["lora_dropout"]) == ("pissa", 4, 0.1)
    assert cli.trainer.global_step == 1


def test_optimizer_is_injected(project: Path) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    (project / "sgd.yaml").write_text(yaml.safe_dump({"model": {"optimizer": optimizer}}))
    cli = run("fit", "--config", "mine.yaml", "--config", "sgd.yaml", "--trainer.max_steps", "1")
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD
    cli = run("fit", "--config", "mine.yaml", "--model.optimizer.lr", "0.25", "--trainer.max_steps", "1")
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.25


def test_exported_card_has_the_results_of_the_run(project: Path) -> None:
    common = {"dirpath": "saved", "save_last": True, "enable_version_counter": False}
    saving = [{**common, "every_n_train_steps": 2}, {**common, "monitor": "val_loss", "filename": "best"}]
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    callbacks = [{"class_path": checkpoint, "init_args": options} for options in saving]
    (project / "saving.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    metrics = run("fit", "--config", "mine.yaml", "--config", "saving.yaml").trainer.callback_metrics
    run("export", "--ckpt_path", "saved/last.ckpt", "--output", "exported")
    card = (project / "exported" / "README.md").read_text()
    assert f"| val_loss | {metrics['val_loss'].item():.4g} |" in card
    with pytest.raises(SystemExit):
        run("export", "--help")


def test_help_tells_of_export(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    assert "export" in capsys.readouterr().out


def test_shipped_configs_are_found_by_name_and_local_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(CONFIGS / "milora.yaml")
    assert resolve_configs(["fit", "--config", "milora.yaml"]) == ["fit", "--config", shipped]
    assert resolve_configs(["fit", "-c", "milora.yaml"]) == ["fit", "-c", shipped]
    assert resolve_configs(["fit", "--config=milora.yaml"]) == ["fit", f"--config={shipped}"]
    (tmp_path / "milora.yaml").write_text("")
    assert resolve_configs(["fit", "--config", "milora.yaml"]) == ["fit", "--config", "milora.yaml"]
    with pytest.raises(SystemExit, match=r"no config 'nope.yaml'.*milora.yaml"):
        resolve_configs(["fit", "--config", "nope.yaml"])


def test_a_list_of_configs_stands_for_those_it_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    recipe = tmp_path / "deep" / "recipe.yaml"
    recipe.write_text("config:\n  - a.yaml\n  - ../b.yaml\n")
    parts = [str(tmp_path / "deep" / "a.yaml"), str(tmp_path / "b.yaml")]
    expected = ["fit", "--config", parts[0], "--config", parts[1], "--trainer.max_steps", "1"]
    assert resolve_configs(["fit", "--config", str(recipe), "--trainer.max_steps", "1"]) == expected
    assert resolve_configs([f"--config={recipe}"]) == [f"--config={part}" for part in parts]
    for content in ("config: [a.yaml]\nmodel: {}", "config: a.yaml", "[", ""):
        recipe.write_text(content)
        assert resolve_configs(["--config", str(recipe)]) == ["--config", str(recipe)]


@pytest.mark.parametrize("help", ["--help", "--help_all"])
def test_every_option_is_documented(help: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run("predict", help)
    assert done.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  --((?:model|data|adapter|predictions)\.[\w.]+)(.*(?:\n {6,}.*)*)", text, re.MULTILINE)
    assert {"model.name_or_path", "data.max_length", "adapter.r", "predictions.output"} <= {name for name, _ in options}
    undocumented = [
        n for n, t in options if len(re.sub(r"\(.*?\)|[A-Z_]{2,}|\{.*?\}|\s", "", t)) < 10 and "help" not in n
    ]
    assert undocumented == []
    assert "--data.tokenizer" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--adapter.target_modules", "[q_prj]"], r"'q_prj' matches no linear layer.*Did you mean 'q_proj'"),
        (["--adapter.r", "33"], r"r=33 is larger than layer 'model.model.layers.0"),
        (["--data.source.train", "absent.jsonl"], r"absent\.jsonl"),
        (["--data.source.prompt_field", "question"], r"question.*instruction"),
        (["--model.name_or_path", "nobody/nothing"], r"no model 'nobody/nothing'"),
        (["--ckpt_path", "absent.ckpt"], r"no checkpoint 'absent.ckpt'"),
        (["--ckpt_path", "model"], r"'model' is a folder, but not a checkpoint folder of a sharded run"),
        (["--model.max_new_tokens", "0"], r"max_new_tokens must be at least 1, not 0"),
        (["--trainer.precision", "transformer-engine"], r"Trainer's options: .*transformer_engine"),
        (["--adapter.init", "micah"], "init='micah' is no start"),
    ],
)
def test_mistakes_are_named_before_training(
    project: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", "mine.yaml", *change)
    output = str(stopped.value.code) + capsys.readouterr().err
    assert re.search(message, output, re.DOTALL)
    assert "Traceback" not in output
    assert not list((project / "out").rglob("*.ckpt"))


@pytest.mark.parametrize("options", [["--trainer.barebones", "true"], ["--trainer.limit_train_batches", "0"]])
def test_options_that_leave_something_out_run(project: Path, options: list[str]) -> None:
    trainer = run("fit", "--config", "mine.yaml", *options, "--trainer.num_sanity_val_steps", "0").trainer
    assert trainer.global_step == (0 if "0" in options else 6)


def test_predictions_that_cannot_be_written_are_named(project: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot be written to model \(Is a directory\)"):
        run("predict", "--config", "mine.yaml", "--predictions.output", "model")


def saved_by_fit(*options: str) -> str:
    """Train for some steps and return the checkpoint."""
    steps = ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.enable_version_counter=false"]
    checkpoints = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=saved"]
    run("fit", "--config", "mine.yaml", *checkpoints, "--trainer.callbacks.save_last=true", *steps, *options)
    return "saved/last.ckpt"


def test_what_is_given_beside_a_checkpoint_wins_and_the_rest_comes_from_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = ["--trainer.max_steps=2", "--model.max_new_tokens=3", "--adapter.lora_alpha=8", "--adapter.init=pissa"]
    path = saved_by_fit(*trained)
    lines = []

    def options(*args: str) -> dict[str, Any]:
        capsys.readouterr()
        cli = run(*args)
        lines[:] = [line for line in capsys.readouterr().err.splitlines() if line.endswith("in the checkpoint")]
        model = {name: getattr(cli.model, name) for name in ("name_or_path", "max_new_tokens", "warmup_steps")}
        (milora,) = (c for c in cli.trainer.callbacks if isinstance(c, MiLoRAInit))
        return {**model, "adapter": (milora.config.r, milora.config.lora_alpha, milora.config.init)}

    data = [
        "--data.source=milora_lightning.data.Files",
        "--data.source.test=held_out.jsonl",
        "--trainer.accelerator=cpu",
    ]
    data += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    from_checkpoint = {"name_or_path": "model", "max_new_tokens": 3, "warmup_steps": 2, "adapter": (4, 8, "pissa")}
    # nothing is given: all comes from the checkpoint
    assert options("test", *data, "--ckpt_path", path) == from_checkpoint
    assert lines == []
    # a value that is the default, but given, wins as any other
    given = options("test", *data, "--ckpt_path", path, "--model.max_new_tokens=256")
    assert given == {**from_checkpoint, "max_new_tokens": 256}
    assert lines == ["model.max_new_tokens: 256 here, 3 in the checkpoint"]
    # so does what a config gives; what it does not give comes from the checkpoint
    assert options("test", "--config", "mine.yaml", "--ckpt_path", path) == {**from_checkpoint, "max_new_tokens": 4}
    assert lines == ["model.max_new_tokens: 4 here, 3 in the checkpoint"]
    # a base that has moved
    (project / "model").rename("moved")
    with pytest.raises(SystemExit, match=r"checkpoint's base model 'model' does not exist.*--model.name_or_path"):
        options("test", *data, "--ckpt_path", path)
    moved = options("test", *data, "--ckpt_path", path, "--model.name_or_path=moved")
    assert moved == {**from_checkpoint, "name_or_path": "moved"}
    assert lines == ["model.name_or_path: moved here, model in the checkpoint"]
    with pytest.raises(SystemExit, match=r"checkpoint's base model 'model' does not exist.*--name_or_path"):
        run("export", "--ckpt_path", path, "--output", "exported")
    run("export", "--ckpt_path", path, "--output", "exported", "--name_or_path=moved")
    assert "model.name_or_path: moved here, model in the checkpoint" in capsys.readouterr().err


def test_values_that_mean_the_same_do_not_differ() -> None:
    saved = {"adapter.r": 4, "adapter.lora_alpha": 8.0, "adapter.modules_to_save": (), "adapter.rank_pattern": {}}
    given = {"adapter.r": 4, "adapter.lora_alpha": "2r", "adapter.modules_to_save": None, "adapter.rank_pattern": None}
    assert differences(given, saved) == []
    assert differences({**given, "adapter.lora_alpha": None}, saved) == [
        "adapter.lora_alpha: 4.0 here, 8.0 in the checkpoint"
    ]


def test_a_missing_model_is_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--ckpt_path=last"]):
        with pytest.raises(SystemExit):
            run("test", "--data.source=milora_lightning.data.Files", *more)
        assert "model.name_or_path is missing" in capsys.readouterr().err


def test_adapters_or_a_base_other_than_the_checkpoint_s_are_refused(project: Path) -> None:
    path = saved_by_fit("--trainer.max_steps=1")
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"]).save_pretrained("other")
    tiny_tokenizer().save_pretrained("other")
    for option, message in {
        "--model.name_or_path=other": "another base model",
        "--adapter.r=2": "adapters have r=4, this run's have r=2",
        "--adapter.init=full": "holds adapters, but adapter.init is full",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run("test", "--config", "mine.yaml", "--ckpt_path", path, option)


def test_an_optimizer_goes_on_with_what_is_given_and_else_as_in_the_checkpoint(project: Path) -> None:
    data = ["--config", "mine.yaml", "--data.num_generation_examples=0", "--model.lr_scheduler=constant"]
    path = saved_by_fit(
        *data, "--trainer.max_steps=1", "--model.optimizer.lr=0.5", "--model.optimizer.weight_decay=0.1"
    )

    def resumed(*options: str) -> tuple[float, float]:
        cli = run("fit", *data, "--trainer.max_steps=2", "--ckpt_path", path, *options)
        group = cli.trainer.optimizers[0].param_groups[0]
        return group["lr"], group["weight_decay"]

    assert resumed() == (0.5, 0.1)
    assert resumed("--model.optimizer.lr=3e-4") == (3e-4, 0.1)  # the default, but given
    assert resumed("--model.optimizer.weight_decay=0.2") == (0.5, 0.2)


def test_lightning_s_messages_to_the_user_need_no_traceback(project: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*limit_train_batches"):
        run("fit", "--config", "mine.yaml", "--trainer.limit_train_batches=1.5")


def test_keywords_for_checkpoints_bring_options_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by_fit("--trainer.max_steps=2", "--model.attn_implementation=eager")
    checkpoints = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=saved"]
    options = ["--config", "mine.yaml", *checkpoints, "--ckpt_path=last"]
    cli = run("fit", *options, "--trainer.max_steps=3", "--model.max_new_tokens=9")
    assert (cli.model.attn_implementation, cli.model.max_new_tokens) == ("eager", 9)
    assert cli.trainer.lightning_module is cli.model
    assert cli.trainer.global_step == 3
    assert "model.max_new_tokens: 9 here, 4 in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_weights_are_averaged_and_averages_resumed(project: Path, average: str) -> None:
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 1} if average.startswith("Sto") else {"decay": 0.5}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    saving["init_args"] = {"dirpath": "saved", "save_last": True, "enable_version_counter": False}
    callbacks = [{"class_path": f"lightning.pytorch.callbacks.{average}", "init_args": options}, saving]
    model = {"lr_scheduler": "constant"}
    (project / "average.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}, "model": model}))
    fit = ["fit", "--config", "mine.yaml", "--config", "average.yaml", "--data.num_generation_examples=0"]
    run(*fit)
    (project / "saved" / "last.ckpt").rename("first.ckpt")
    resumed = run(*fit, "--trainer.max_epochs=2", "--ckpt_path=first.ckpt").model
    whole = run(*fit, "--trainer.max_epochs=2").model
    for name, layer in lora_layers(whole).items():
        assert torch.equal(layer.lora_B, lora_layers(resumed)[name].lora_B)
    assert (project / "saved" / "last.ckpt").stat().st_size < 300_000


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_a_keyword_without_a_checkpoint_is_refused(project: Path, subcommand: str) -> None:
    with pytest.raises(SystemExit, match=r"There is no checkpoint for --ckpt_path last.*Give the path"):
        run(subcommand, "--config", "mine.yaml", "--ckpt_path=last")
    with pytest.raises(SystemExit, match=r"known only in the process that trained"):
        run(subcommand, "--config", "mine.yaml", "--ckpt_path=best")
    assert not list((project / "out").rglob("*.ckpt"))


def test_checkpoints_that_another_list_of_callbacks_takes_away_are_named(tmp_path: Path) -> None:
    def config(name: str, content: Any) -> list[str]:
        (tmp_path / name).write_text(yaml.safe_dump({"trainer": content}))
        return ["--config", str(tmp_path / name)]

    saving = config("saving.yaml", {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]})
    replacing = config("replacing.yaml", {"callbacks": ["EarlyStopping"]})
    adding = config("adding.yaml", {"callbacks+": ["EarlyStopping"]})
    (line,) = replaced_checkpoints(["fit", *saving, *replacing])
    assert re.search(r"replacing.yaml.*ModelCheckpoint.*callbacks\+", line)
    for option in (["--trainer.callbacks=EarlyStopping"], ["--trainer.callbacks", "EarlyStopping"]):
        assert len(replaced_checkpoints(["fit", *saving, *option])) == 1
    for option in (adding, ["--trainer.callbacks+=EarlyStopping"], ["--trainer.callbacks.dirpath", "there"]):
        assert replaced_checkpoints(["fit", *saving, *option]) == []
    assert replaced_checkpoints(["fit", *replacing, *saving]) == []


def test_without_a_trainer_part_it_trains_three_epochs_and_goes_on_from_the_last(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So is the configuration that README shows; Lightning would train 1,000 epochs, and find no checkpoint again."""
    config = yaml.safe_load((project / "mine.yaml").read_text())
    del config["trainer"]
    (project / "mine.yaml").write_text(yaml.safe_dump(config))
    options = ("--config=mine.yaml", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    assert run("fit", *options).trainer.global_step == 18
    said = capsys.readouterr().err
    assert "Training 3 epochs: set trainer.max_epochs" in said
    assert "Keeping the last checkpoint in checkpoints" in said
    (path,) = (project / "checkpoints").iterdir()
    assert read_checkpoint(path)["global_step"] == 18
    resumed = run("fit", *options, "--ckpt_path=last", "--trainer.max_epochs=4").trainer
    assert resumed.global_step == 24
    assert "Training 3 epochs" not in capsys.readouterr().err


def test_a_run_is_as_long_as_it_is_told() -> None:
    saving = {"callbacks": ModelCheckpoint()}
    assert missing_options(saving, trains=True)[0] == {"max_epochs": 3}
    for limit in ({"max_steps": 5}, {"max_time": "00:00:01:00"}, {"max_epochs": -1}):
        assert missing_options({**saving, **limit}, trains=True) == ({}, [])
    assert missing_options({"callbacks": [ModelCheckpoint(), Timer("00:00:01:00")]}, trains=True) == ({}, [])


def test_a_root_on_another_machine_is_refused_and_no_local_folder_of_its_name_made() -> None:
    with pytest.raises(ValueError, match="default_root_dir=s3://bucket/run is no local folder"):
        missing_options({"default_root_dir": "s3://bucket/run"}, trains=True)


def test_data_of_all_formats_train_with_no_source_and_no_field_named(project: Path) -> None:
    questions = [(f"What is {i} plus 1?", f"It is {i + 1}") for i in range(6)]
    folder = project / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("Question,Answer\n" + "".join(f"{q},{a}\n" for q, a in questions))
    records = {
        "b.jsonl": [{"prompt": q, "completion": a} for q, a in questions],
        "c.jsonl": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in questions
        ],
        "d.jsonl": [{"text": f"{q} {a}"} for q, a in questions],
    }
    for name, rows in records.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained("model")
    trainer = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--data.max_length=64"]
    cli = run("fit", "--model.name_or_path=model", "--data.source.train=folder", "--adapter.r=4", *trainer)
    assert len(cli.datamodule.examples("train")) == 22
    assert len(cli.datamodule.examples("validation")) == 2
    assert cli.trainer.global_step == 2
