"""How a sequence of tasks ends when one of its runs is ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from milora_lightning.cli.continual import TaskSequence


@pytest.mark.parametrize(
    ("interrupted", "ended", "raised"),
    [
        (True, SystemExit(1), KeyboardInterrupt),  # as Lightning ends on Ctrl-C; the command then ends with 130
        (True, SIGTERMException(), SIGTERMException),  # which is not the user's
        (False, SystemExit(3), SystemExit),
        (False, ValueError("NaN"), ValueError),
    ],
)
def test_a_run_that_is_ended_ends_the_sequence(
    interrupted: bool, ended: BaseException, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any) -> None:
        raise ended

    run = SimpleNamespace(begin=lambda: None, trainer=SimpleNamespace(fit=fit, interrupted=interrupted))
    sequence: Any = object.__new__(TaskSequence)
    sequence.tasks = {"one": []}
    monkeypatch.setattr(
        sequence, "parse", lambda task, number: SimpleNamespace(**vars(run), model=None, datamodule=None)
    )
    with pytest.raises(raised) as caught:
        sequence.learn(1)
    assert type(caught.value) is raised
