"""Kinds of weights and of importance that codecs are tested on, as rows of COLUMNS values."""

import numpy as np

COLUMNS = 2048
_random = np.random.default_rng(0)
FEW = _random.standard_normal((37, COLUMNS)).astype(np.float32)  # 296 super-blocks: the last of 16 is not full
_SPREAD = np.exp(4 * _random.standard_normal((37, COLUMNS // 32))).repeat(32, axis=1).astype(np.float32)
WEIGHTS = {
    "normal": FEW,
    "heavy-tailed": FEW**5,
    "bf16": (FEW.view(np.uint32) & 0xFFFF0000).view(np.float32),
    "constant": np.full((4, COLUMNS), -0.37, np.float32),
    "positive constant": np.full((4, COLUMNS), 0.37, np.float32),
    "almost constant": 1 + FEW * np.float32(1e-6),
    "tiny": FEW * np.float32(1e-30),
    "near the epsilons": FEW * np.float32(1e-14),
    "subnormal fp16": FEW * np.float32(1e-6),
    "subnormal": FEW * np.float32(1e-41),
    "large": FEW * np.float32(1e4),
    "zeros": np.zeros((4, COLUMNS), np.float32),
    "sparse": FEW * (_random.random(FEW.shape) < 0.05),  # zeros of both signs
    "halves": (np.arange(4 * COLUMNS, dtype=np.float32).reshape(4, COLUMNS) % 255 - 127) / 2,
    "positive": np.abs(FEW),
    "ternary": np.sign(np.round(FEW)),
    "mixed blocks": np.clip(FEW * _SPREAD, -6e4, 6e4),
    "mixed values": np.clip(FEW * np.exp(8 * _random.standard_normal(FEW.shape)).astype(np.float32), -6e4, 6e4),
    "negative zero": np.full((1, COLUMNS), -0.0, np.float32),
}
_EVEN = (0.1 + _random.random(COLUMNS)).astype(np.float32)
IMPORTANCE = {
    "even": _EVEN,
    "sparse": _EVEN * (_random.random(COLUMNS) < 0.1),
    "wide": np.exp(6 * _random.standard_normal(COLUMNS)).astype(np.float32),
    "zero blocks": _EVEN * (np.arange(COLUMNS) // 256 % 2 > 0),
    "zero": np.zeros(COLUMNS, np.float32),
}
