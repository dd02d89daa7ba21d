"""The key/value cache of a looped model: the loops share weights, not what they attend to.

Slot loop * L + layer holds what that layer computed in that loop.  A position that stopped after loop e never computed
the deeper loops' keys and values; what later positions find there is the policy:

full          every loop's own, so every loop has to run; stopping only chooses which state is read
exact         every loop's own as well, computed when a later position needs them (deferral.py)
last-exited   the keys and values of the loop it stopped at, copied: depth d reads those of loop min(d, e)
shared-last   one slot for all loops (sharing.py): what the last loop run left,
average       the mean over the loops run,
first         or what the first loop left

Knowingly not here: keeping fewer than all positions.
"""

from typing import Any, Literal, get_args

import numpy as np

from .arrays import Array, Ints, aligned_empty
from .config import ModelConfig
from .kernels.streams import BFLOAT16, FLOAT32

Policy = Literal["full", "exact", "last-exited", "shared-last", "average", "first"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
SHARED: tuple[Policy, ...] = ("shared-last", "average", "first")
KeyValueType = Literal["float32", "bfloat16"]
KEY_VALUE_TYPES: tuple[KeyValueType, ...] = get_args(KeyValueType)


def kept_loops(policy: Policy, loops: int) -> int:
    """How many loops' keys and values stay of a position, of `loops`."""
    return 1 if policy in SHARED else loops


class KeyValueCache:
    """Keys and values of `filled` positions in every slot: (R * L) x B x G x capacity x K each.

    `dtype` is float32, or bfloat16 (as its bits, in uint16).  Capacity doubles when it is used up, so appending one
    position costs constant time on average; preallocate it where the length is known.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        loops: int,
        capacity: int,
        policy: Policy = "last-exited",
        dtype: KeyValueType = "float32",
    ) -> None:
        self.batch, self.loops, self.layers, self.policy = batch, loops, config.num_hidden_layers, policy
        self.filled = 0
        self.dtype = dtype
        self._heads = (batch, config.num_key_value_heads)
        self._channels = config.head_dim
        self.keys, self.values = (self._empty(loops, max(1, capacity)) for _ in range(2))

    @property
    def kind(self) -> int:
        return {"float32": FLOAT32, "bfloat16": BFLOAT16}[self.dtype]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def _empty(self, loops: int, capacity: int) -> Array:
        shape = (loops * self.layers, *self._heads, capacity, self._channels)
        return aligned_empty(shape) if self.dtype == "float32" else np.empty(shape, np.uint16)

    def first_slot(self, loop: Any) -> Any:
        """The slot of a loop's first layer, or of several loops' (an array); those of the other layers follow."""
        return loop * self.layers

    def reserve(self, positions: int, fed: bool = False) -> bool:
        """Make room for that many more positions; True if memory moved.  `fed`: all loops will run over all of them."""
        return self.grow(self.filled + positions)

    def grow(self, positions: int) -> bool:
        """Make room for that many positions in all; True if memory moved."""
        held = self.capacity
        if positions <= held:
            return False
        for name in ("keys", "values"):
            grown = self._empty(len(getattr(self, name)) // self.layers, max(positions, 2 * held))
            grown[..., :held, :] = getattr(self, name)
            setattr(self, name, grown)
        return True

    def ran(self, r: int) -> None:
        """Loop r has run over the one position in progress."""

    def append(self, positions: int) -> None:
        """Count positions that every loop has written."""
        self.filled += positions

    def append_exited(self, exit_index: Ints) -> None:
        """Count one position that row b left at loop exit_index[b] (B), deeper slots filled as the policy says."""
        if self.policy == "last-exited":
            for row, r in enumerate(exit_index):
                if r < self.loops - 1:
                    self.repeat_deeper(row, self.filled, r)
        self.filled += 1

    def repeat_deeper(self, row: int, position: int, r: int) -> None:
        """The keys and values of one position in loop r (from 0) become those of every deeper loop."""
        for array in (self.keys, self.values):
            by_loop = array.reshape(self.loops, self.layers, *array.shape[1:])
            by_loop[r + 1 :, :, row, :, position] = by_loop[r, :, row, :, position]

    def leave(self, rows: Ints, positions: Ints, exit_index: Ints) -> None:
        """One position of each of these rows was left at its own loop: fill deeper slots as the policy says.  All N."""
        if self.policy != "last-exited":
            return
        for r in np.unique(exit_index[exit_index < self.loops - 1]):
            row, position = rows[exit_index == r], positions[exit_index == r]
            for array in (self.keys, self.values):
                by_loop = array.reshape(self.loops, self.layers, *array.shape[1:])
                by_loop[r + 1 :, :, row, :, position] = by_loop[r][:, row, :, position][:, None]

    def take_row(self, row: int, other: "KeyValueCache", positions: int) -> None:
        """The first positions of another cache's only row become those of this row."""
        for array, source in ((self.keys, other.keys), (self.values, other.values)):
            array[:, row, :, :positions] = source[:, 0, :, :positions]
