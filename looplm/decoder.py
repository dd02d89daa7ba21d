"""The compiled loop over a model, its plan and its buffers: what a session drives.

A decoder is for up to so many rows at a time; it keeps the state after each loop of those it ran last.
"""

import numpy as np

from .arrays import Array, Floats, Ints, aligned_empty, lined_up
from .cache import KeyValueCache
from .kernels import plan as field
from .kernels.attention import forward_buffer_size
from .kernels.cached_attention import attend_few, attend_many, score_size
from .kernels.decoding import PHASES, TAPERED
from .kernels.product.stored import FEW_ROWS, multiply, multiply_many, prepared_size, row_size, scratch_size
from .kernels.product.widened import multiply_wide, multiply_wide_pairs
from .kernels.rope import rope_tables
from .model_files import EMBEDDING
from .stored import LAYER_NORMS, LAYER_PARTS, StoredWeights
from .threads import Team

ITEM_BYTES = 1 << 15  # weights that a thread takes at once, at least: a microsecond or two
LARGE_BYTES = 1 << 20  # weights of a product for each thread from which on it takes smaller and smaller items
MOST_ITEMS = 2  # of any other product, for each thread: more are shorter streams, which memory is slower to follow
FEW_UNIT, WIDE_UNIT = 16, 256  # outputs are taken in multiples of it, for a few rows and for many
TILED_UNIT = 32  # for many rows in tile registers


class Decoder:
    """Up to `rows` positions through a loop at once: `states` (R x rows x D) and `gate_logit` (R x rows)."""

    def __init__(self, weights: StoredWeights, cache: KeyValueCache, start: Ints, rows: int, team: Team) -> None:
        config = weights.config
        self._weights, self._cache, self._team, self._start = weights, cache, team, start  # start: B
        self._rows = rows
        self.embedded = aligned_empty((rows, config.hidden_size))
        self.states = aligned_empty((cache.loops, rows, config.hidden_size))
        self.gate_logit = aligned_empty((cache.loops, rows))
        at = [self.embedded.ctypes.data, *(state.ctypes.data for state in self.states)]  # asking takes a microsecond
        self._of_loop = [(at[r], at[r + 1], gate.ctypes.data) for r, gate in enumerate(self.gate_logit)]
        self._plan = np.zeros(field.FIRST_LAYER + config.num_hidden_layers * field.LAYER_SIZE, np.int64)
        self._constants = np.array([config.rms_norm_eps])
        self._places = np.zeros((rows, field.ROW_SIZE), np.int64)
        self._point(PLACES=self._places)
        self._set_model()
        self._set_shared_buffers()
        self._way = ""  # how products are made: "few" rows, "many", or many "rounded"
        self.cache_moved()

    def place(self, cache_rows: Ints | int, positions: Ints | int, rows: int = 1) -> None:
        """Where the first rows are in the cache from now on.  cache_rows, positions: M, or the same for all `rows`."""
        self._places[:rows, field.ROW_B], self._places[:rows, field.ROW_POSITION] = cache_rows, positions

    def run_loop(self, r: int, batch: int, length: int) -> None:
        """Loop r of batch x length rows, placed as `place` said last.  Loop 0 starts from `embedded`.

        Blocks of more than FEW_ROWS rows must be consecutive positions of one row of the cache.
        """
        self._places[: batch * length, field.ROW_SLOT] = self._cache.first_slot(r)
        attend = attend_many if length > FEW_ROWS else attend_few[self._cache.kind]
        self._plan[field.ATTEND] = attend.address
        self._plan[: field.GATE_LOGIT + 1] = (field.RUN_LOOP, batch, length, *self._of_loop[r])
        self._run(batch * length)

    def run_rows(self, loops: Ints, x: Floats, out: Floats, gate_logit: Floats) -> None:
        """One loop of a few rows (at most FEW_ROWS), each its own: loops[m] of row m, counted from 0.

        x: MD, the state before the loop -> out: MD, gate_logit: M.  All contiguous; placed as `place` said last.
        Several positions of one row of the cache may run one loop together: they see each other as they would apart.
        """
        self._places[: len(loops), field.ROW_SLOT] = self._cache.first_slot(loops)
        at = (x.ctypes.data, out.ctypes.data, gate_logit.ctypes.data)
        self._plan[field.ATTEND] = attend_few[self._cache.kind].address
        self._plan[: field.GATE_LOGIT + 1] = (field.RUN_LOOP, len(loops), 1, *at)
        self._run(len(loops))

    def logits(self, states: Floats) -> Floats:
        """states: MD (at most `rows`) -> MV"""
        states = np.ascontiguousarray(states)
        found = np.empty((len(states), self._weights.config.vocab_size), np.float32)
        self._plan[: field.OUT + 1] = (field.RUN_HEAD, len(states), 1, states.ctypes.data, found.ctypes.data)
        self._run(len(states))
        return found

    def _run(self, rows: int) -> None:
        loop = self._plan[field.COMMAND] == field.RUN_LOOP
        way = "few" if rows <= FEW_ROWS else "rounded" if loop and self._weights.prompt_precision == "bf16" else "many"
        if way != self._way:
            self._go(way)
            self._way = way
        self._plan[field.PHASE_COUNT] = PHASES * self._weights.config.num_hidden_layers if loop else 1
        self._team.run(self._plan)

    def _go(self, way: str) -> None:
        """Set the routines of products, compiled when they are first needed, and how work is divided."""
        self._plan[field.PREPARED_KINDS] = 0
        for kind in self._kinds:
            routine = multiply[kind] if way == "few" else multiply_many(kind, way == "rounded")
            if routine is None:
                self._plan[field.MULTIPLY_WIDE] = (multiply_wide_pairs if way == "rounded" else multiply_wide).address
            else:
                self._plan[field.MULTIPLY + kind] = routine.address
                self._plan[field.PREPARED_KINDS] |= 1 << kind
        tiled = self._plan[field.PREPARED_KINDS] == sum(1 << kind for kind in self._kinds)
        unit = FEW_UNIT if way == "few" else TILED_UNIT if tiled else WIDE_UNIT
        self._plan[field.UNIT : field.HEAD_ITEMS + 1] = self._divided(unit)

    def _divided(self, unit: int) -> Ints:
        """How many outputs make a unit, and how many items the phases of a layer and the head are divided into."""
        config, threads = self._weights.config, self._team.threads
        matrices = [self._weights.matrices[f"model.layers.0.{LAYER_PARTS[i]}.weight"] for i in (3, 4, 6)]
        items = []
        for matrix in (*matrices, self._weights.head):
            most = max(1, matrix.nbytes // ITEM_BYTES)
            many = TAPERED if matrix.nbytes >= LARGE_BYTES * threads else MOST_ITEMS
            items.append(min(-(-matrix.shape[0] // unit), many * threads, most) if threads > 1 else 1)
        return np.array([unit, config.num_key_value_heads, *items])

    def cache_moved(self) -> None:
        """The cache has other memory than before: point there, and make room for attending to all of it."""
        config, cache = self._weights.config, self._cache
        keys = cache.capacity
        self._tables = rope_tables(max(config.max_position_embeddings, keys), config.head_dim, config.rope_theta)
        self._set(CACHE_KIND=cache.kind, CAPACITY=keys, CACHE_BATCH=cache.batch)
        self._point(KEYS=cache.keys, VALUES=cache.values, START=self._start, COS=self._tables[0], SIN=self._tables[1])
        self._set_own_buffers(keys)

    def _set(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._plan[getattr(field, name)] = number

    def _point(self, **arrays: Array) -> None:
        self._set(**{name: array.ctypes.data for name, array in arrays.items()})

    def _set_model(self) -> None:
        weights, config = self._weights, self._weights.config
        self._set(
            WIDTH_D=config.hidden_size,
            HEADS=config.num_attention_heads,
            GROUPS=config.num_key_value_heads,
            CHANNELS=config.head_dim,
            FEED_FORWARD=config.intermediate_size,
            LAYERS=config.num_hidden_layers,
            VOCABULARY=config.vocab_size,
            THREADS=self._team.threads,
        )
        kinds = {matrix.plan[0] for name, matrix in weights.matrices.items() if name != EMBEDDING}
        self._kinds = kinds | {weights.head.plan[0]}
        self._point(
            NORM=weights.norm, GATE_WEIGHT=weights.gate_weight, GATE_BIAS=weights.gate_bias, CONSTANTS=self._constants
        )
        self._plan[field.HEAD : field.HEAD + 3] = weights.head.plan
        for layer in range(config.num_hidden_layers):
            prefix, entry = f"model.layers.{layer}.", []
            entry += [weights.floats[f"{prefix}{name}.weight"].ctypes.data for name in LAYER_NORMS]
            for name in LAYER_PARTS:
                entry += weights.matrices[f"{prefix}{name}.weight"].plan
            first = field.FIRST_LAYER + layer * field.LAYER_SIZE
            self._plan[first : first + field.LAYER_SIZE] = entry

    def _set_shared_buffers(self) -> None:
        config, rows = self._weights.config, self._rows
        query, key_value = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        longest = max(config.hidden_size, config.intermediate_size, query)
        self._shared = {
            "STATE": aligned_empty((rows, config.hidden_size)),
            "NORMED": aligned_empty((rows, config.hidden_size)),
            "PREPARED": aligned_empty((len(multiply), prepared_size(longest, max(rows, FEW_ROWS)))),
            "QKV": aligned_empty((rows, query + 2 * key_value)),
            "ATTENTION": aligned_empty((rows, query)),
            "BRANCH": aligned_empty((rows, config.hidden_size)),
            "GATE_UP": aligned_empty((rows, 2 * config.intermediate_size)),
        }
        self._point(**self._shared)
        self._set(PREPARED_STEP=self._shared["PREPARED"].strides[0])

    def _set_own_buffers(self, keys: int) -> None:
        """One after the other, for each thread."""
        config, rows = self._weights.config, self._rows
        channels = config.head_dim
        per_group = config.num_attention_heads // config.num_key_value_heads
        longest = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * channels)
        scores = max(per_group * score_size(keys), forward_buffer_size(keys, channels) + 2 * keys * channels)
        sizes = {
            "SCRATCH": scratch_size(longest),
            "QUERIES": per_group * row_size(channels),
            "SCORES": scores,
            "LSE": rows * per_group,
        }
        at = 0
        for name, size in sizes.items():
            self._set(**{name: 4 * at})
            at += lined_up(size)
        self._own = aligned_empty((self._team.threads, at))
        self._point(OWN=self._own)
        steps = {"QUERY_STEP": 4 * row_size(channels), "SCORE_STEP": 4 * score_size(keys)}
        self._set(OWN_STEP=4 * at, SCORES_SIZE=scores, **steps)
