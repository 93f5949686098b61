"""What the user is told goes apart from answers, from one rank, and through the channels that Python has for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from milora_lightning.utils import messages
from milora_lightning.utils.messages import each_said_once, inform, inform_once, is_first_rank, warn, warn_once


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


class Owner:
    """Any object that something is said of."""


@pytest.mark.usefixtures("fresh_logger")
def test_each_object_is_spoken_of_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each text, and of another object again; by the first rank alone."""
    one, other = Owner(), Owner()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for owner, text in ((one, "a"), (one, "a"), (one, "b"), (other, "a")):
            warn_once(owner, text)
        for owner, text in ((one, "c"), (one, "c"), (one, "d"), (other, "c"), (one, "a")):
            inform_once(owner, text)
        monkeypatch.setenv("RANK", "1")
        warn_once(Owner(), "a")
        inform_once(Owner(), "c")
    assert [str(each.message) for each in seen] == ["a", "b", "a"]
    assert all(each.filename == __file__ for each in seen)  # where the caller is, for filters by module
    assert capsys.readouterr().err.split() == ["c", "d", "c"]


@pytest.mark.usefixtures("fresh_logger")
def test_within_a_context_each_thing_is_said_once_and_afterwards_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        shown = warnings.showwarning
        with each_said_once():
            for _ in range(2):
                warnings.warn("one", stacklevel=1)
                inform("told")
                inform("one")  # which has been said, as a warning
            warnings.warn("two", DeprecationWarning, stacklevel=1)
        assert warnings.showwarning is shown
        warnings.warn("one", stacklevel=1)
        inform("told")
    assert [(str(each.message), each.category) for each in seen] == [
        ("one", UserWarning),
        ("two", DeprecationWarning),
        ("one", UserWarning),
    ]
    assert capsys.readouterr().err.split() == ["told", "told"]


def test_once_ranks_know_of_each_other_their_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: a job within another one's task, say."""
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setattr(messages.dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(messages.dist, "get_rank", lambda rank=rank: rank)
        assert is_first_rank() == (rank == 0)
