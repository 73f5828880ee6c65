"""The picture of a run: rewards of both stages, entropies, and what replay and strike-outs saw, over updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

PANELS = {  # title -> keys of a trainer's log that it shows
    "reward": ("reward", "reward/scaffold_best", "eval_reward"),
    "entropy, nats per token": ("entropy/scaffold", "entropy/solution"),
    "share": (
        "scaffold/repeated",
        "struck/scaffolds",
        "struck/solutions",
        "replay/flipped_share",
        "clip_ratio/region_mean",
    ),
}


def draw_curve(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw a trainer's `state.log_history` to a PNG; False, and no file, without matplotlib or anything to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = {
        title: {key: [(row["step"], row[key]) for row in history if row.get(key) is not None] for key in keys}
        for title, keys in PANELS.items()
    }
    lines = {title: {key: line for key, line in of.items() if line} for title, of in lines.items()}
    lines = {title: of for title, of in lines.items() if of}
    if not lines:
        return False
    figure = Figure(figsize=(4.5 * len(lines), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, of) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for key, line in of.items():
            axes.plot(*zip(*line, strict=True), label=key, linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True
