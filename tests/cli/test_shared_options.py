"""What the runs of a comparison take from the options that they share, and what each has for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_lightning.cli.comparing.single import Comparison, RunCLI
from milora_lightning.comparison.runs import Run


@pytest.mark.usefixtures("project")
def test_a_learning_rate_that_all_share_does_not_replace_those_that_are_compared(tmp_path: Path) -> None:
    shared = ["--config=mine.yaml", "--model.learning_rate=0.01", "--model.warmup_steps=5"]
    assert RunCLI(shared).config.model.learning_rate == 0.01  # which comes before an optimizer's
    comparison = Comparison(shared, {"milora": []}, tmp_path / "out")
    for rate in (1e-3, 3e-3):
        model = comparison.parse(Run("milora", rate, 0)).config.model
        assert (model.learning_rate, model.optimizer.init_args.lr, model.warmup_steps) == (None, rate, 5)
