"""Layers are told when the device has finished them, not when they were launched."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from baton.engine.layer_events import LayerEvents

NUM_LAYERS = 4


class Device:
    """Finishes layers when told to."""

    def __init__(self) -> None:
        self.finished = [threading.Event() for _ in range(NUM_LAYERS)]
        self.num_recorded = 0
        self._num_made = 0

    def make_event(self) -> "DeviceEvent":
        self._num_made += 1
        return DeviceEvent(self, self._num_made - 1)


class DeviceEvent:
    def __init__(self, device: Device, layer: int) -> None:
        self._device, self._layer = device, layer

    def record(self) -> None:
        self._device.num_recorded += 1

    def synchronize(self) -> None:
        assert self._device.finished[self._layer].wait(20)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def events(device: Device) -> Iterator[LayerEvents]:
    events = LayerEvents(NUM_LAYERS, pin_memory=False, make_event=device.make_event)
    yield events
    events.close()


class Told:
    def __init__(self) -> None:
        self.layers: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, num_layers: int) -> None:
        with self._changed:
            self.layers.append(num_layers)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.layers) >= count, 20)


def plain(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + layer


def launch(events: LayerEvents, told: Told, broken_layer: int | None = None) -> None:
    attend = events.announcing(plain, told)
    for layer in range(NUM_LAYERS):
        q, k, v = torch.ones(3, 5, 2, 8)
        if layer == broken_layer:
            k[3, 1, 2] = float("nan")
        assert torch.equal(attend(layer, q, k, v), q + layer)


def test_a_layer_is_told_when_the_device_has_it(events: LayerEvents, device: Device) -> None:
    told = Told()
    launch(events, told)
    assert device.num_recorded == NUM_LAYERS
    assert told.layers == []
    for layer in range(NUM_LAYERS):
        device.finished[layer].set()
        told.wait_for(layer + 1)
        assert told.layers == list(range(1, layer + 2))
    events.finish()


def test_finish_waits_for_what_is_still_told(events: LayerEvents, device: Device) -> None:
    told = Told()
    launch(events, told)
    finishing = threading.Thread(target=events.finish)
    finishing.start()
    finishing.join(0.05)
    assert finishing.is_alive()
    for event in device.finished:
        event.set()
    finishing.join(20)
    assert told.layers == [1, 2, 3, 4]


def test_nothing_is_told_from_the_first_layer_on_that_is_not_finite(
    events: LayerEvents, device: Device
) -> None:
    for event in device.finished:
        event.set()
    told = Told()
    launch(events, told, broken_layer=2)
    events.finish()
    assert told.layers == [1, 2]
    launch(events, again := Told())  # another step
    events.finish()
    assert again.layers == [1, 2, 3, 4]
