"""The place of a run in a stream, kept over its iterations and from one run to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from milora_lightning.data.batches.batching import Example
from milora_lightning.data.batches.resuming import HasTrainer, batches_since_step, epoch_loop
from milora_lightning.utils.errors import InvalidInputError

BEFORE = {"group_by_length": True}
"""Values of settings in older checkpoints that do not name them."""


@dataclass(frozen=True)
class Place:
    """The place of a worker in a stream.

    Attributes:
        worker: Index of the worker, which determines its records.
        epoch: Number of complete passes through the stream.
        record: Index of the record at which the block starts.
        block: Index of the block, over all epochs.
        carried: Examples left over from the blocks before.
        consumed: Number of rows of the block, in its order, that have been trained on.
        global_batch: Rows in one batch over all ranks, by which the block is grouped.
        digest: Hash of the block's lengths, to recognise the data; empty before the block is read.
    """

    worker: int
    epoch: int = 0
    record: int = 0
    block: int = 0
    carried: tuple[Example, ...] = ()
    consumed: int = 0
    global_batch: int = 0
    digest: str = ""


class StreamPlaces:
    """Keeps the places of the workers after each of the last batches.

    Lightning's count of batches decides what has been trained on: workers fetch ahead, and a step may fail.

    Args:
        owner: The data module, whose Trainer counts the batches.
        settings: The options that the order depends on, including ``num_workers``.
    """

    def __init__(self, owner: HasTrainer, settings: Mapping[str, Any]) -> None:
        self._owner = owner
        self._settings = dict(settings)
        self.forget()

    def forget(self) -> None:
        """Start a run that is not resumed, unless a state is loaded afterwards."""
        # Starting with the worker whose batch is next: the workers take turns.
        self._start = tuple(Place(worker) for worker in range(self._settings["num_workers"]))
        self._after: dict[int, tuple[Place, ...]] = {}  # by the number of batches so far
        self._noted = 0

    def begin(self) -> tuple[Place, ...]:
        """Return the places after the batches trained on, where an iteration begins."""
        self._noted = self._trained()
        places = self._after.get(self._noted, self._start)
        self._after = {self._noted: places}
        return places

    def note(self, mark: Place | int, is_last: bool = True) -> None:
        """Note the place after one more batch.

        Args:
            mark: The place, or the number of rows consumed if it is in the same block.
            is_last: Whether another worker's batch is next.
        """
        first, *others = self._after[self._noted]
        place = replace(first, consumed=mark) if isinstance(mark, int) else mark
        self._noted += 1
        self._after[self._noted] = (*others, place) if is_last else (place, *others)
        stepped = self._stepped()
        for passed in [number for number in self._after if number < stepped]:
            del self._after[passed]

    def state_dict(self) -> dict[str, Any]:
        """Return the places after the last step, and the settings they are valid for, as primitives."""
        places = self._after.get(self._stepped(), self._start)
        return {"settings": self._settings, "places": [_state(place) for place in places]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the places of a checkpoint.

        Raises:
            ValueError: If a setting that the order depends on has changed.
        """
        for name, value in self._settings.items():
            if (before := state["settings"].get(name, BEFORE.get(name))) != value:
                raise InvalidInputError(
                    f"The checkpoint was written with data.{name}={before}, but here it is {value}, and a stream can "
                    f"only be resumed with the same value: set data.{name}: {before}, or start again."
                )
        self.forget()
        self._start = tuple(_place(place) for place in state["places"])

    def _stepped(self) -> int:
        """Return the number of batches trained on up to the last step."""
        return self._trained() - batches_since_step(self._owner.trainer)

    def _trained(self) -> int:
        """Return the number of batches trained on, by Lightning's count if there is a Trainer."""
        loop = epoch_loop(self._owner.trainer)
        return self._noted if loop is None else int(loop.batch_progress.total.processed)


def _state(place: Place) -> dict[str, Any]:
    carried = [{name: list(map(int, values)) for name, values in example.items()} for example in place.carried]
    return {**asdict(replace(place, carried=())), "carried": carried}


def _place(state: Mapping[str, Any]) -> Place:
    return Place(**{**state, "carried": tuple(state["carried"])})
