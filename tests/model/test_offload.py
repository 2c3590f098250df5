"""The order of copies, waits and releases of what lies in host memory, on streams that only take notes."""

from __future__ import annotations

import weakref

import torch

from fastsft.model import host_weights
from fastsft.model.host_weights import HostHead
from fastsft.model.offload import DirectCopies, Stash


class NotedCopies(DirectCopies):
    """Copies numbered as they come; a wait is noted with the inputs that are referred to at that time."""

    def __init__(self):
        self.count, self.waits, self.inputs = 0, [], []

    def copy(self, to, source):
        super().copy(to, source)
        self.count += 1
        return self.count - 1

    def wait(self, event):
        self.waits.append((event, self.alive()))

    def alive(self):
        return [i for i, x in enumerate(self.inputs) if x() is not None]


def test_two_inputs_are_on_their_way_and_each_is_waited_for_before_it_goes():
    copies = NotedCopies()
    stash = Stash(5, 3, torch.float32, torch.device("cpu"), copies)
    stash.begin(4)
    for slot in range(5):
        x = torch.full((4, 3), float(slot))
        copies.inputs.append(weakref.ref(x))
        stash.put(slot, x)
        del x
        assert copies.alive() == list(range(max(0, slot - 1), slot + 1))
    assert copies.waits == [(0, [0, 1, 2]), (1, [1, 2, 3]), (2, [2, 3, 4])]
    for slot in reversed(range(5)):
        assert torch.equal(stash.take(slot), torch.full((4, 3), float(slot)))
        assert copies.alive() == []
    assert [event for event, _ in copies.waits[3:]] == [4, 3, 5, 6, 7, 8, 9]


def test_a_pass_that_was_left_lets_go_behind_its_copies():
    copies = NotedCopies()
    stash = Stash(3, 3, torch.float32, torch.device("cpu"), copies)
    stash.begin(4)
    for _ in range(3):
        stash.put(_, torch.zeros(4, 3))
    stash.take(2)  # copies 3 and 4: slot 1 is on its way back
    stash.begin(4)
    assert copies.waits[-1][0] == 4


def test_a_heads_tiles_come_in_two_buffers(monkeypatch):
    monkeypatch.setattr(host_weights, "TILE", 4)
    weight = torch.arange(42.0).view(14, 3)
    head = HostHead(weight, torch.device("cpu"))
    head.copies = copies = NotedCopies()
    places = set()
    for first, tile in head.tiles():
        assert torch.equal(tile, weight[first : first + 4])
        places.add(tile.data_ptr())
        assert copies.waits[-1][0] == first // 4
    assert len(places) == 2
    for _ in head.tiles():
        break
    assert [event for event, _ in copies.waits[-2:]] == [4, 5]
