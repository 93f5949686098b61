"""``ranks``: chooses the rank of each layer by the energy of the slice it would train, and writes an overlay."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from milora_lightning.adapters.surgery import inject
from milora_lightning.analysis.ranks import Which, default_slice, rank_pattern
from milora_lightning.analysis.spectra import module_type
from milora_lightning.cli.commands.loading import loading
from milora_lightning.cli.main import MiLoRACLI, command_line
from milora_lightning.config import LoRAConfig
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_file


class RanksCLI(MiLoRACLI):
    """The command line of ``fit``, which creates all objects but does not train."""

    command = "ranks"

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def ranks(fit: Sequence[str], output: str, slice: Which | None = None, most: int | None = None) -> None:
    """Choose the rank of each layer such that the trained slice has the same share of ‖W‖² in all of them.

    Takes the options of fit. The ranks have the same sum as equal ranks adapter.r. Writes adapter.rank_pattern to a
    YAML file that is used as an overlay: fit --config mine.yaml --config ranks.yaml.

    Args:
        fit: Options of ``fit``.
        output: The YAML file to write.
        slice: Whether adapters start at the minor or the principal singular triplets; by default according to
            adapter.init.
        most: The largest rank; by default four times adapter.r.
    """
    path = Path(output).expanduser()
    check_file(path, "The overlay")
    if path.exists():
        raise InvalidInputError(f"There is a file {output} already: choose another output, or remove it.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
        cli = command_line(RanksCLI, ["fit", *fit])
    config: LoRAConfig | None = cli.config_init["fit"]["adapter"].config
    if config is None:
        raise InvalidInputError("adapter.init is full, which has no adapters, and so no ranks: choose another.")
    if config.rank_pattern:
        raise InvalidInputError("adapter.rank_pattern gives ranks already: leave it out to have them chosen.")
    if most is not None and most < config.r:
        raise InvalidInputError(f"most={most} is less than the mean rank, adapter.r={config.r}: raise it.")
    with loading():
        model: Any = cli.model.load_model()
    inject(model, replace(config, init="lora", alpha_pattern={}))  # the cheapest start: nothing is decomposed
    found = rank_pattern(model, config.r, slice or default_slice(config), most)
    overlay: dict[str, Any] = {"rank_pattern": found}
    if (config.lora_alpha is not None or config.alpha_pattern) and not config.use_rslora:
        # So that each layer keeps its scale. A given pattern stays in force for layers that are left out.
        alphas = {name: config.scale(name.replace("\\", "")) * rank for name, rank in found.items()}
        overlay["alpha_pattern"] = {**alphas, **config.alpha_pattern}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"adapter": overlay}, sort_keys=False), encoding="utf-8")
    Console().print(_table(found))
    print(f"The ranks are in {output}: give fit --config {output} after the other configs.")


def _table(pattern: dict[str, int]) -> Table:
    groups: dict[str, list[int]] = {}
    for name, rank in pattern.items():
        groups.setdefault(module_type(name.replace("\\", "")), []).append(rank)
    table = Table("module", "layers", "smallest r", "mean r", "largest r")
    for name, group in groups.items():
        table.add_row(name, str(len(group)), str(min(group)), f"{sum(group) / len(group):.1f}", str(max(group)))
    return table
