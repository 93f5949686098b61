"""Where in a stream a run is, over the iterations of a run and from one run to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from milora_lightning.data.batches.batching import Example
from milora_lightning.data.batches.resuming import HasTrainer
from milora_lightning.utils.errors import InvalidInputError


@dataclass(frozen=True)
class Place:
    """Where a worker is in a stream.

    Attributes:
        worker: Its number, which tells its records.
        epoch: How often it has gone through the stream.
        record: From which record of the stream on its block is.
        block: Number of the block, over all epochs.
        carried: Examples that are left of the blocks before.
        consumed: Rows of the block, in its order, that have been trained on.
        global_batch: Rows of one batch of all ranks, by which the block is grouped.
        digest: Of the block's lengths, to know it again; empty before it is read.
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
    """Keeps the places of the workers behind each of the last batches.

    Lightning's count of batches is the truth about what has been trained on: workers fetch ahead, and a step may fail.

    Args:
        owner: The data module, whose Trainer counts.
        settings: What the order depends on, by the names of the options; ``num_workers`` among them.
    """

    def __init__(self, owner: HasTrainer, settings: Mapping[str, Any]) -> None:
        self._owner = owner
        self._settings = dict(settings)
        self.forget()

    def forget(self) -> None:
        """Begin a run that so far is not a resumed one."""
        # Those first whose batch is next: the workers take turns.
        self._start = tuple(Place(worker) for worker in range(self._settings["num_workers"]))
        self._behind: dict[int, tuple[Place, ...]] = {}  # by how many batches there have been
        self._noted = 0

    def begin(self) -> tuple[Place, ...]:
        """Return the places behind what has been trained on, where an iteration begins."""
        self._noted = self._trained()
        places = self._now()
        self._behind = {self._noted: places}
        return places

    def note(self, mark: Place | int) -> None:
        """Note the place behind one more batch, or how many rows of the same block have been consumed by then."""
        first, *others = self._behind[self._noted]
        last = replace(first, consumed=mark) if isinstance(mark, int) else mark
        self._noted += 1
        self._behind[self._noted] = (*others, last)
        trained = self._trained()
        for passed in [number for number in self._behind if number < trained]:
            del self._behind[passed]

    def state_dict(self) -> dict[str, Any]:
        """Return the places behind what has been trained on, and what they hold for, in primitives."""
        return {"settings": self._settings, "places": [_state(place) for place in self._now()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the places of a checkpoint.

        Raises:
            ValueError: If the order was another one there.
        """
        for name, value in self._settings.items():
            if (before := state["settings"].get(name)) != value:
                raise InvalidInputError(
                    f"The checkpoint was written with data.{name}={before}, here it is {value}: a "
                    "stream goes on where it was only with the same. Set it so, or begin anew."
                )
        self.forget()
        self._start = tuple(_place(place) for place in state["places"])

    def _now(self) -> tuple[Place, ...]:
        return self._behind.get(self._trained(), self._start)

    def _trained(self) -> int:
        """Return how many batches have been trained on, by Lightning's count, if it counts."""
        loop = getattr(getattr(self._owner.trainer, "fit_loop", None), "epoch_loop", None)
        return self._noted if loop is None else int(loop.batch_progress.total.processed)


def _state(place: Place) -> dict[str, Any]:
    carried = [{name: list(map(int, values)) for name, values in example.items()} for example in place.carried]
    return {**asdict(replace(place, carried=())), "carried": carried}


def _place(state: Mapping[str, Any]) -> Place:
    return Place(**{**state, "carried": tuple(state["carried"])})
