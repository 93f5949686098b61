"""What the user is told goes apart from answers, from one rank, and through the channels that Python has for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from milora_lightning.utils import messages
from milora_lightning.utils.messages import inform, is_first_rank, warn


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("milora_lightning")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    messages._logger.cache_clear()
    yield logger
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    messages._logger.cache_clear()


@pytest.mark.usefixtures("fresh_logger")
def test_what_is_told_goes_to_what_is_standard_error_at_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    inform("2 of 3 are left out.")
    assert capsys.readouterr() == ("", "2 of 3 are left out.\n")


def test_whoever_has_set_up_the_logger_keeps_it(
    fresh_logger: logging.Logger, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_logger.addHandler(caplog.handler)
    fresh_logger.setLevel(logging.WARNING)
    inform("not heard")
    fresh_logger.setLevel(logging.INFO)
    inform("heard")
    assert set(caplog.messages) == {"heard"}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_rank_speaks_for_all(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "0")
    assert is_first_rank()
    monkeypatch.setenv(variable, "3")
    assert not is_first_rank()
    inform("told")
    assert capsys.readouterr() == ("", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("of all ranks")
        with pytest.raises(UserWarning, match="of this rank"):
            warn("of this rank", from_any_rank=True)


def test_warnings_can_be_filtered() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The cached")
        warn("The cached decomposition is unusable.")
        with pytest.raises(UserWarning, match="longer"):
            warn("2 examples are longer than max_length.")
