"""How far what a build decodes to is from its source, a unit at a time.

    SQNR = 10 log10( sum s^2 / sum (w' - w)^2 ) in dB

w is the source's weight, w' what the build decodes to, s what was rounded: w, or w + 1 where a GGUF stores that, or 1
where it stores -exp(w): `Values.signal`. Blocks below the range of their type's scales count in what is reported and
not in what is judged: a floor means nothing there, only a bound of the error does (underflow.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.builds.underflow import small_blocks
from ornith_moe.quant.source.slab import Slab


@dataclass
class Error:
    """Sums of s^2 and (w' - w)^2 over weights, the largest |w' - w|, and the sums over those that a floor judges."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    judged_signal: float = 0.0
    judged_noise: float = 0.0

    def add(self, other: Error) -> None:
        self.signal, self.noise = self.signal + other.signal, self.noise + other.noise
        self.largest = max(self.largest, other.largest)
        self.judged_signal += other.judged_signal
        self.judged_noise += other.judged_noise

    @property
    def sqnr_db(self) -> float | None:
        """None when exact."""
        return _sqnr(self.signal, self.noise)

    @property
    def judged_db(self) -> float | None:
        """Of the weights that a floor judges; -inf where another is beyond its bound."""
        return _sqnr(self.judged_signal, self.judged_noise)


def unit_error(step: Step, slab: Slab, parts: tuple[np.ndarray, ...]) -> Error:
    """The error of rows of a weight: those of `slab` that the step takes, as `parts` of a build hold them.

    What is not finite misses every floor, since damage may decode to anything; where the source itself is not finite,
    kept by leave, it must still be what it was.
    """
    columns = slab.float32.shape[1]
    step = replace(step, storage=step.storage.as_stored(parts))
    with np.errstate(all="ignore"):
        decoded = step.transform.inverse(step.storage.decode(parts, columns, slab.dtype))
        truth = slab.float32.astype(np.float64)
        difference = decoded - truth
        sound = np.isfinite(truth)
        if not sound.all():
            same = (decoded == truth) | (np.isnan(decoded) & np.isnan(truth))
            difference = np.where(sound, difference, np.where(same, 0.0, np.inf))
            truth = np.where(sound, truth, 0.0)
        signal, noise = step.transform.values.signal(truth) ** 2, difference**2
        total = Error(float(signal.sum()), float(noise.sum()), float(np.abs(difference).max(initial=0.0)))
        total.judged_signal, total.judged_noise = total.signal, total.noise
        small = _small(step, slab)
        if small is not None:
            scales, judged = step.storage.scales, small == 0
            assert scales is not None  # or no block would be below their range
            within = judged | (np.abs(difference) <= 2 * small + scales.reach * scales.step)
            total.judged_signal = float(signal[judged].sum())
            total.judged_noise = float(noise[judged].sum()) if within.all() else math.inf
    return total


def _small(step: Step, slab: Slab) -> np.ndarray | None:
    """`small_blocks` of what was encoded, in the order of the source."""
    if not step.transform.exact or not step.storage.scales:
        return None
    small = small_blocks(step.transform.forward(slab).float32, step.storage)
    return None if small is None else step.transform.inverse(small)


def _sqnr(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
