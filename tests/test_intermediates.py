from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcalib import intermediates
from fxcalib.errors import OptionError
from fxcalib.intermediates import Intermediates, storage_device
from fxcalib.transfers import Transfers

CPU = torch.device("cpu")


class Recording(Transfers):
    """Copies for park and fetch, so that a value that was not parked or fetched is noticed."""

    def __init__(self) -> None:
        self.parked = 0
        self.fetched = 0
        self.dropped: list[int] = []

    def park(self, tensor: torch.Tensor) -> Any:
        self.parked += 1
        return tensor.clone()

    def fetch(self, parked: torch.Tensor) -> Any:
        self.fetched += 1
        return parked.clone()

    def arrive(self, fetched: torch.Tensor) -> torch.Tensor:
        return fetched

    def expect(self, nbytes: int) -> None:
        pass

    def drop(self, parked: torch.Tensor) -> None:
        self.dropped.append(id(parked))

    def pace(self) -> None:
        pass


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    made = Recording()
    monkeypatch.setattr(intermediates, "transfers_between", lambda device, storage: made)
    return made


def test_values_come_back_as_they_were_stored(recording: Recording) -> None:
    store = Intermediates(CPU, CPU)
    value = {"a": (torch.ones(2), None, [torch.zeros(3)]), "b": 7, "c": torch.arange(3)}
    store.append(value)
    value["c"].add_(1)
    store.prefetch(0, ["a", "c"])
    store.prefetch(0, ["c"])
    assert recording.fetched == 3
    loaded = store.load(0, ["a", "b", "c"])
    assert recording.fetched == 3
    assert torch.equal(loaded["a"][0], torch.ones(2)) and loaded["a"][1] is None and isinstance(loaded["a"], tuple)
    assert loaded["b"] == 7 and loaded["c"].tolist() == [0, 1, 2]
    assert store.bytes == 8 + 12 + 24
    store.store(0, {"c": torch.zeros(1)})
    assert len(recording.dropped) == 1 and store.bytes == 8 + 12 + 4
    store.prefetch(0, ["c"])
    store.free(0, ["c", "a", "nothing"])
    assert len(recording.dropped) == 4 and store.bytes == 0
    with pytest.raises(KeyError):
        store.load(0, ["c"])


def test_shared_values_stay_where_they_are_and_private_ones_are_copies(recording: Recording) -> None:
    store = Intermediates(CPU, CPU)
    base = torch.zeros(4)
    store.append({})
    store.store(0, {"base": base, "view": base[:2]}, shared={"base", "view"})
    assert recording.parked == 0
    assert store.load(0, ["base"])["base"] is base
    copies = store.load(0, ["base", "view"], private={"base", "view"})
    copies["view"].fill_(3)
    assert copies["base"].tolist() == [3, 3, 0, 0] and base.tolist() == [0, 0, 0, 0]


def test_what_has_room_stays_on_the_device(recording: Recording) -> None:
    class Room(intermediates.Room):
        def __init__(self) -> None:
            pass

        def now(self, kept: int) -> int:
            return 100

    store = Intermediates(CPU, CPU, room=Room())
    for _ in range(3):
        store.append({"x": torch.zeros(10)})
    assert recording.parked == 1
    store.free(0, ["x"])
    store.store(2, {"y": torch.zeros(10)})
    assert recording.parked == 1
    assert [store.load(i, names)[names[0]].shape for i, names in ((1, ["x"]), (2, ["x"]), (2, ["y"]))] == [(10,)] * 3
    assert recording.fetched == 1


def test_offload_names_a_place() -> None:
    assert storage_device("auto", CPU) == storage_device("none", CPU) == storage_device("cpu", CPU) == CPU
    with pytest.raises(OptionError, match="keeps no values"):
        storage_device("meta", CPU)
