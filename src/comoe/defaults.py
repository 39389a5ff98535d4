"""What is taken where nobody asks for anything else: of settings that both a flag and the library have.

Each is here once. None here: settings whose default is worked out, as memory is, or that only one place knows.
"""

CONTEXT = 2048
"""Tokens of prompt and answer together that memory is sized for."""

MAX_NEW_TOKENS = 128
TEMPERATURE = 0.0
TOP_K = 0
TOP_P = 1.0
SEED = 0

POLICY = "lfu"
"""Who leaves the cache first."""

PREFETCH = "auto"
"""Whether experts are read before they are asked for."""

ROUTING_BIAS = 0.0
"""Logits that decoding adds for experts in memory."""

FORMS = ("dropped", "lowrank", "q2", "residual", "q3", "q4", "q8")
"""What is tried for a pack beside exact experts; forms that no step of its chain uses are left out again.

`merged` is not: docs/analysis.md shows it gain or lose at 3 % of the bytes alone, where little works.
"""

CALIBRATION_TOKENS = 16384
