"""demo/rank_types.py on small layers: what is predicted, what is measured, and how both are ranked.

References: scipy's Spearman, the definition of the error written a second time. Not covered: the trained weights of
others, whose figures are in docs/quality.md.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DEMO = Path(__file__).parent.parent / "demo"
spec = importlib.util.spec_from_file_location("demo_rank_types", DEMO / "rank_types.py")
rank = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)


def test_ranks_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy, the extra `fit`, is not installed")
    random = np.random.default_rng(0)
    first, second = random.integers(0, 8, 63), random.integers(0, 8, 63)
    assert rank.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, rel=1e-12)
    assert rank.spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)


class Blocks(torch.nn.Module):
    """Two layers of one role whose inputs differ in size, and a head that is none of them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64)}) for _ in range(2))
        self.head = torch.nn.Linear(64, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer["up"](x).tanh()
        return self.head(x)


@torch.inference_mode()
def test_errors_are_predicted_of_inputs_and_measured_of_outputs():
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(100, 64) * torch.linspace(0.1, 3, 64)
    modules = rank.linears(model)
    assert list(modules) == ["layers.0.up", "layers.1.up"] and {rank.role_of(name) for name in modules} == {"up"}
    importance = rank.importance_of(modules, lambda: (model(x[:63]), model(x[63:])))
    assert importance["layers.0.up"] == pytest.approx(x.square().mean(0).numpy(), rel=1e-5)
    before, kept = model(x), {name: module.weight.clone() for name, module in modules.items()}
    rows = rank.measure(modules, importance, lambda: float((model(x) - before).square().mean()), singly=2)
    assert all(torch.equal(module.weight, kept[name]) for name, module in modules.items())
    assert {row.of for row in rows} == {"all", *modules} and {"Q8_0", "MLX 2 bits"} <= {row.kind for row in rows}
    found = {(row.of, row.kind): row for row in rows}
    (one,) = [row for row in rows if (row.of, row.kind) == ("layers.0.up", "Q8_0")]
    w = kept["layers.0.up"].numpy().astype(np.float64)
    stored = rank.restored(w.astype(np.float32), rank.storages(64, importance["layers.0.up"])["Q8_0"])
    h = importance["layers.0.up"].astype(np.float64)
    assert one.predicted == pytest.approx((h * (w - stored) ** 2).sum() / (h * w**2).sum(), rel=1e-6)
    assert found["all", "Q8_0"].predicted == pytest.approx(
        sum(found[name, "Q8_0"].predicted for name in modules), rel=1e-9
    )
    figures = rank.correlations(rows)
    assert figures["roles"]["up"] > 0.9 and figures["tensors"]["count"] == 2 and figures["pairs"] == len(rows) // 3
