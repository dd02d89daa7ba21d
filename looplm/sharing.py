"""One slot for all loops: a key/value cache that takes R times less memory, at a loss.

A prompt runs through all loops with slots of their own; before the first token is decoded, they become one.  While a
token is decoded, each of its loops attends to what earlier positions left in that slot, and to the token's own keys and
values of this loop; afterwards one of them, or their mean, stays.  A further prompt sees what is left of the past in
every loop, and slots of its own for itself, until they become one, too.

Source: Section 5.4.2, Table 14 (last step, averaged, first step only).
"""

from typing import Any

import numpy as np

from .arrays import Array, Ints
from .cache import KeyValueCache
from .safetensors_file import round_to_bfloat16, widen_bfloat16


class SharedCache(KeyValueCache):
    """L x B x G x capacity x K while decoding, (R * L) x B x G x capacity x K while a prompt is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.apart = True  # every loop has slots of its own
        self._shared = 0  # of these positions, all loops' slots hold the same
        shape = (self.loops, self.layers, *self._heads, self._channels)
        self._own = [np.empty(shape, array.dtype) for array in (self.keys, self.values)]  # of the token in progress

    def first_slot(self, loop: Any) -> Any:
        return super().first_slot(loop) if self.apart else 0 * loop

    def reserve(self, positions: int, fed: bool = False) -> bool:
        moved = self._separate() if fed else self._unite()
        return super().reserve(positions) or moved

    def ran(self, r: int) -> None:
        for own, array in zip(self._own, (self.keys, self.values), strict=True):
            own[r] = array[..., self.filled, :]

    def append_exited(self, exit_index: Ints) -> None:
        """Count one position, of which one loop's keys and values, or the mean of those row b ran, stay."""
        for own, array in zip(self._own, (self.keys, self.values), strict=True):
            for row, r in enumerate(exit_index):
                array[:, row, :, self.filled] = self._kept(own[: r + 1, :, row])
        self.filled += 1

    def _kept(self, by_loop: Array) -> Array:
        """What stays of the loops that ran.  by_loop: R..., in order -> ..."""
        if self.policy == "first":
            return by_loop[0]
        if self.policy == "shared-last":
            return by_loop[-1]
        if self.dtype == "bfloat16":
            return round_to_bfloat16(widen_bfloat16(by_loop).mean(axis=0))
        mean: Array = by_loop.mean(axis=0)
        return mean

    def _unite(self) -> bool:
        """One slot for all loops from here on; the memory of the others is given back.  True if memory moved."""
        if not self.apart:
            return False
        before, after = slice(min(self._shared, self.filled)), slice(min(self._shared, self.filled), self.filled)
        united = []
        for array in (self.keys, self.values):
            one, by_loop = self._empty(1, self.capacity), array.reshape(self.loops, self.layers, *array.shape[1:])
            one[..., before, :] = by_loop[0][..., before, :]
            for layer in range(self.layers):  # one at a time: a mean needs room
                one[layer][..., after, :] = self._kept(by_loop[:, layer, ..., after, :])
            united.append(one)
        (self.keys, self.values), self.apart = united, False
        return True

    def _separate(self) -> bool:
        """Slots of their own for all loops, each with what the one slot held.  True if memory moved."""
        if self.apart:
            self._shared = min(self._shared, self.filled)  # some may have been forgotten
            return False
        separated = []
        for array in (self.keys, self.values):
            many = self._empty(self.loops, self.capacity)
            many.reshape(self.loops, *array.shape)[..., : self.filled, :] = array[..., : self.filled, :]
            separated.append(many)
        (self.keys, self.values), self.apart, self._shared = separated, True, self.filled
        return True
