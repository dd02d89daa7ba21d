"""What a plan says: the table of numbers and addresses by which a compiled loop knows its model, cache and buffers.

Python fills it in (looplm/decoder.py), kernels read it.  Every field is an int64.
"""

# The plan's numbers.  What a call is about; PLACES is the address of ROW_SIZE numbers for each row:
(COMMAND, BATCH, LENGTH, X, OUT, GATE_LOGIT, PLACES) = range(7)
# the first slot of its loop, its row of the cache, and its position there.
(ROW_SLOT, ROW_B, ROW_POSITION, ROW_SIZE) = range(4)
# The model's shape:
(WIDTH_D, HEADS, GROUPS, CHANNELS, FEED_FORWARD, LAYERS, VOCABULARY) = range(8, 15)
THREADS = 15  # of the team
# Key/value cache, and tables for rotary positions:
(CACHE_KIND, CAPACITY, CACHE_BATCH, KEYS, VALUES, START, COS, SIN) = range(16, 24)
# Addresses of buffers that all threads share, and of the first thread's own and the step to the next:
(STATE, NORMED, QKV, ATTENTION, BRANCH, GATE_UP, PREPARED, OWN, OWN_STEP, CONSTANTS, SCORES_SIZE) = range(24, 35)
# Addresses, from the start of a thread's own buffer:
(SCRATCH, QUERIES, SCORES, LSE) = range(35, 39)
NORM, GATE_WEIGHT, GATE_BIAS, HEAD = 40, 41, 42, 43  # and from HEAD on, a matrix: kind, codes, scales
# Addresses of compiled routines: products with prepared rows for each kind of weight, and of many that are not;
# attention.
(MULTIPLY, MULTIPLY_WIDE, ATTEND) = (46, 50, 51)
PREPARED_KINDS = 39  # a bit for each kind of weight that takes its rows prepared
PREPARED_STEP = 52  # bytes from what is prepared for one kind of weight to the next
# How work is shared: phases of the command; items of each phase of a layer and of the head; outputs come in units.
(PHASE_COUNT, UNIT, ITEMS, HEAD_ITEMS) = (53, 54, 55, 59)
QUERY_STEP, SCORE_STEP = 60, 61  # bytes from one query of a group to the next, prepared, and from scores to scores
FIRST_LAYER = 62
(NORM_1, NORM_2, NORM_3, NORM_4, Q, K, V, O, GATE, UP, DOWN) = (0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22)  # noqa: E741
LAYER_SIZE = 25

RUN_LOOP, RUN_HEAD = 0, 1
