"""Comparing builds layer by layer.

References: the whole model in transformers with the same weights loaded into it, log-probabilities in fp64, for both
sides; ornith_moe/compare.py's metrics, which work on whole distributions. Random fixtures say whether the two compute
the same thing, not what a build is worth. Not covered: a model that does not fit in memory, which docs/quality.md
measures.
"""

from itertools import pairwise

import fixtures
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ornith_moe.compare import kl_divergence, top1_agreement
from ornith_moe.divergence import Divergences, mean, quantile
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.source.source import weight_matrix
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.streamed import compare_streamed

BUILDS = ["fp8-channel", "fp8-block", "bf16", "int4-ct", "nvfp4", "mlx:4", "gguf:F32", "gguf:Q4_K_M", "gguf:NVFP4"]
KINDS = {
    "qwen35moe": {"experts_layout": "fused", "mtp": True, "vision": True, "experts": 4, "top_k": 2},
    "qwen35": {},
    "gemma4": {},
}


class Rounded:
    """A candidate in memory: some weights of a source with noise, told by their names."""

    name = kind = fingerprint = "rounded"

    def __init__(self, source, chosen, noise=0.05):
        self.arrays = {}
        generator = np.random.default_rng(0)
        for number, weight in enumerate(source.weights):
            if weight.role not in ("vision", "mtp"):
                self.arrays[weight.name] = source.read(number, 0, weight_matrix(weight)[0]).float32.copy()
                if chosen(weight.name):
                    wide = self.arrays[weight.name]
                    wide += noise * wide.std() * generator.standard_normal(wide.shape, np.float32)
        self.chosen, self.asked = chosen, []

    def changes(self, name):
        return self.chosen(name)

    def rows(self, name, start, count):
        self.asked.append((name, start))
        return self.arrays[name][start : start + count]

    def state(self, model):
        """Of transformers' model, experts packed."""
        found = {}
        for name, tensor in model.state_dict().items():
            own = name if name in self.arrays else name.replace("model.", "model.language_model.", 1)
            if own in self.arrays:
                value = self.arrays[own]
            elif name == "lm_head.weight":
                value = self.arrays["model.embed_tokens.weight"]
            else:
                stem, _, kind = own.rpartition(".")
                kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                each = [[self.arrays[f"{stem}.{e}.{k}.weight"] for k in kinds] for e in range(len(tensor))]
                value = np.stack([np.concatenate(parts) for parts in each])
            found[name] = torch.from_numpy(value.copy()).reshape(tensor.shape)
        return found


def whole(model, candidate, windows):
    """float64 [W, L, V] log-probabilities of transformers' model with the weights of a candidate."""
    model.load_state_dict(candidate.state(model))
    with torch.inference_mode():
        return model(torch.from_numpy(windows)).logits.double().log_softmax(-1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_whole_models(kind, tmp_path):
    folder = getattr(fixtures, kind)(tmp_path / "model", **KINDS[kind])
    source = open_source(folder, mtp="drop")
    windows = np.random.default_rng(0).integers(0, 500, (3, 40))
    head = "lm_head" if kind != "gemma4" else "embed_tokens"
    everything = Rounded(source, lambda name: True)
    late = Rounded(source, lambda name: ".layers.2." in name and "_proj" in name)
    last = Rounded(source, lambda name: head in name) if kind != "gemma4" else late
    same = Rounded(source, lambda name: False)
    builds = [everything, late, last, same]
    found = compare_streamed(source, builds, windows)
    model, positions = AutoModelForCausalLM.from_pretrained(folder).float().eval(), list(range(5, 39))
    assert (found.windows, found.window_tokens, found.positions) == (3, 40, 3 * 34)
    p, targets = whole(model, same, windows)[:, positions], windows[:, 6:]
    likelihood = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    assert found.perplexity == pytest.approx(np.exp(-likelihood.mean()), rel=1e-5)
    for candidate, figures in zip(builds, found.builds, strict=True):
        q = whole(model, candidate, windows)[:, positions]
        kl = kl_divergence(p.reshape(-1, p.shape[-1]), q.reshape(-1, p.shape[-1])).reshape(3, -1)
        assert figures.kl_windows == pytest.approx(kl.mean(1), rel=2e-3, abs=1e-8)
        assert figures.kl_max == pytest.approx(kl.max(), rel=2e-3, abs=1e-8)
        assert figures.kl_mean_se == pytest.approx(kl.mean(1).std(ddof=1) / 3**0.5, rel=1e-2, abs=1e-8)
        assert figures.top1 == pytest.approx(top1_agreement(p, q), abs=1e-9)
        own = np.take_along_axis(q, targets[..., None], -1)[..., 0]
        assert figures.perplexity == pytest.approx(np.exp(-own.mean()), rel=1e-5)
        assert figures.log_perplexity_change == pytest.approx((likelihood - own).mean(), abs=1e-5)
    errors = [[each.error for each in figures.layers] for figures in found.builds]
    flips = [[each.flipped for each in figures.layers] for figures in found.builds]
    assert min(errors[0]) > 0.01 and errors[1][:2] == [0, 0] and min(errors[1][2:]) > 0.001
    assert found.builds[1].kl_mean < found.builds[0].kl_mean and errors[3] == [0] * 4
    assert (found.builds[3].kl_mean, found.builds[3].top1) == (0, 1)
    if kind == "qwen35moe":
        assert max(flips[0]) > 0 and flips[3] == [0] * 4
    else:
        assert flips == [[None] * 4] * 4
    assert [name.rpartition("model.")[2] for name, _ in same.asked] == ["norm.weight"]
    assert len(everything.asked) == len({*everything.asked}) + (kind == "gemma4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, {build: path}) of builds of a Qwen MoE, a GGUF of several files among them."""
    base = tmp_path_factory.mktemp("streamed")
    folder = fixtures.qwen35moe(base / "model", experts=4, top_k=2, mtp=True)
    report = convert(open_source(folder), base / "out", BUILDS)
    return open_source(folder, mtp="drop"), {build.build: build.path for build in report.builds}


def test_every_build_is_decoded_under_the_names_of_its_source(made):
    """In any cut of rows; how near to the source, as each type can be."""
    source, paths = made
    limits = {"gguf:F32": 1e-6, "bf16": 0, "fp8-channel": 0.03, "fp8-block": 0.03, "gguf:Q4_K_M": 0.09}
    for name, path in paths.items():
        build, worst = open_decoded(path, source), 0.0
        assert build.kind == name
        for number, weight in enumerate(source.weights):
            rows = weight_matrix(weight)[0]
            values, truth = build.rows(weight.name, 0, rows), source.read(number, 0, rows).float32
            cut = [build.rows(weight.name, start, min(128, rows - start)) for start in range(0, rows, 128)]
            assert values.shape == truth.shape and values.dtype == np.float32
            assert np.array_equal(values, np.concatenate(cut))
            worst = max(worst, float(np.linalg.norm(values - truth) / np.linalg.norm(truth)))
        assert worst <= limits.get(name, 0.13), name


def test_a_build_of_another_model_is_told(made, tmp_path):
    source, paths = made
    other = open_source(fixtures.qwen35(tmp_path / "dense"), mtp="drop")
    for name in ("fp8-block", "gguf:Q4_K_M"):
        with pytest.raises(CheckpointError, match=r"is no build of dense"):
            open_decoded(paths[name], other)
    with pytest.raises(CheckpointError, match="no build here"):
        open_decoded(tmp_path / "nothing", source)


def test_an_interrupted_comparison_goes_on_at_its_layer(made, tmp_path):
    source, paths = made
    builds = [open_decoded(paths[name], source) for name in ("fp8-block", "gguf:Q4_K_M")]
    windows = np.random.default_rng(1).integers(0, 500, (2, 24))
    expected = compare_streamed(source, builds, windows)

    def stop(phase, done, total):
        if done > 7 * total // 12:  # in the third of four layers
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        compare_streamed(source, builds, windows, state=state, progress=stop)
    with pytest.raises(PlanError, match="had other tokens"):
        compare_streamed(source, builds, windows + 1, state=state, resume=True)
    with pytest.raises(PlanError, match="had other builds; leave --resume out to begin anew"):
        compare_streamed(source, builds[:1], windows, state=state, resume=True)
    counts = []
    journal = (state / "journal").read_bytes()
    (state / "journal").write_bytes(journal + b'{"figures": [[0.1')  # torn by a crash
    found = compare_streamed(
        source,
        builds,
        windows,
        state=state,
        resume=True,
        progress=lambda phase, done, total: counts.append((phase, done)),
    )
    assert found.builds == expected.builds and found.perplexity == expected.perplexity
    assert [done for phase, done in counts if phase == "layers"][:4] == [0, 6, 12, 14] and not state.exists()
    with pytest.raises(PlanError, match="no comparison was begun here"):
        compare_streamed(source, builds, windows, state=state, resume=True)


def test_activations_that_were_lost_are_not_gone_on_with(made, tmp_path):
    source, paths = made
    build, windows, state = [open_decoded(paths["bf16"], source)], np.arange(40).reshape(2, 20), tmp_path / "state"

    def stop(phase, done, total):
        if phase == "head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_streamed(source, build, windows, state=state, progress=stop)
    path = state / "x1.0"
    path.write_bytes(b"\0" * 64 + path.read_bytes()[64:])
    with pytest.raises(CheckpointError, match="activations are not those that its journal means"):
        compare_streamed(source, build, windows, state=state, resume=True)
    assert compare_streamed(source, build, windows, state=state).builds[0].kl_mean == 0
    (state := tmp_path / "mine").mkdir()
    (state / "letter.txt").write_text("dear")
    with pytest.raises(PlanError, match="holds files that are of no comparison"):
        compare_streamed(source, build, windows, state=state)


def test_activations_that_are_not_finite_name_the_build(made):
    source, _ = made
    broken = Rounded(source, lambda name: "layers.1.mlp.experts.0.down" in name, noise=np.inf)
    with pytest.raises(
        ConversionError, match="rounded: layer 1 makes activations that are not finite on chunks 0 to 1"
    ):
        compare_streamed(source, [broken], np.arange(80).reshape(2, 40))


@pytest.mark.parametrize("tokens", [np.zeros(1, int), np.zeros((2, 8)), np.full(8, 520), np.zeros((0, 8), int)])
def test_tokens_that_are_none_are_refused(made, tokens):
    with pytest.raises(ValueError, match="tokens"):
        compare_streamed(made[0], [], tokens)


def test_divergences_in_slabs_are_those_of_whole_rows():
    generator = np.random.default_rng(0)
    a, targets = generator.normal(size=(63, 1000)).astype(np.float32) * 8, generator.integers(0, 1000, 63)
    b = a + generator.normal(size=a.shape).astype(np.float32)
    b[:5] = a[:5] + 100  # the same distributions
    for cuts in ([0, 1000], [0, 1, 100, 999, 1000]):
        online = Divergences(targets, 2)
        for start, stop in pairwise(cuts):
            first, *others = (torch.from_numpy(m[:, start:stop]) for m in (a, b, a))
            online.add(start, first, others)
        found = online.found()
        p, q = (torch.from_numpy(m).double().log_softmax(-1).numpy() for m in (a, b))
        assert found.kl[0] == pytest.approx(kl_divergence(p, q), rel=1e-9, abs=1e-12)
        assert (found.kl[1] == 0).all() and found.same_top[1].all()
        assert found.same_top[0].mean() == pytest.approx(top1_agreement(p, q))
        assert found.log_likelihood[:2] == pytest.approx(np.stack([p, q])[:, range(63), targets], rel=1e-9)


def test_standard_errors_are_over_windows():
    values = np.array([[1.0, 1.0, 2.0], [3.0, 3.0, 4.0]])
    assert mean(values).value == pytest.approx(14 / 6) and mean(values).error == pytest.approx(2**0.5 / 2**0.5)
    assert mean(values[:1]).error is None and quantile(values[:1], 0.5) == quantile(values[:1], 0.5)
    many = np.random.default_rng(0).normal(size=(400, 25))
    spread = quantile(many, 0.9)
    assert spread.value == pytest.approx(1.2816, abs=0.05)
    assert spread.error == pytest.approx((0.9 * 0.1 / 10_000) ** 0.5 / 0.1755, rel=0.25)  # of independent draws
