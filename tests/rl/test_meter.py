"""The mismatch meter, and what it reads off a policy in FP8: nothing at all, if both sides have one quantizer.

The rollout side is a model that transformers loads from the build that `convert` wrote, experts as stored codes and
scales; the trainer side is the masters, under `ornith_fp8`. Attention and shared experts of this tiny model are no
whole blocks, so the build keeps them as they are: the mismatch of an engine that quantizes those too is not covered,
nor is one whose GEMMs add up in another order.

Reference: sums over Python floats, and float64 torch for distributions.
"""

import copy
import doctest
import math

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same_bits
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import ornith_moe.hf
from ornith_moe import replay
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.fp8 import quantize_fp8_block
from ornith_moe.quant.source.hub import open_any
from ornith_moe.rl import meter
from ornith_moe.rl.meter import compare_quantizers, exact_kl, flipped_experts, measure, quantize_masters, sampled_kl

PROMPT, NEW = 8, 32
IDS = torch.arange(6 * 40).view(6, 40) * 7 % 97  # trained on once; their beginnings are prompts
MASK = torch.ones(6, PROMPT + NEW).index_fill(1, torch.arange(PROMPT), 0)


class TestSampled:
    def test_by_hand(self):
        trainer = torch.tensor([[1.0, 0.5, 0.25, 9.0]]).log()
        rollout = torch.tensor([[0.5, 0.5, 0.5, 1.0]]).log()
        made = sampled_kl(trainer, rollout, torch.tensor([[1, 1, 1, 0]]))
        assert made.k1 == pytest.approx(0, abs=1e-7)  # -(log 2 + 0 - log 2) / 3
        assert made.k3 == pytest.approx((1 - math.log(2) + 0 + 0.5 - 1 + math.log(2)) / 3, rel=1e-6)
        assert made[2:] == pytest.approx((0.5, 3.5 / 3, 2, 1 / 3, 3), rel=1e-6)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0)), min_size=1, max_size=9))
    def test_k3_is_never_negative_and_zero_means_equal(self, pairs):
        trainer, rollout = (torch.tensor([column], dtype=torch.float64) for column in zip(*pairs, strict=True))
        made = sampled_kl(trainer, rollout, torch.ones(trainer.shape))
        d = [a - b for a, b in pairs]
        assert made.k1 == pytest.approx(-sum(d) / len(d), rel=1e-9, abs=1e-12)
        assert made.k3 >= 0 and made.k3 == pytest.approx(
            sum(math.expm1(x) - x for x in d) / len(d), rel=1e-9, abs=1e-12
        )
        assert (made.equal == 1) == (trainer.tolist() == rollout.tolist())

    def test_both_estimate_the_exact_divergence(self):
        random = torch.Generator().manual_seed(0)
        p = torch.randn(9, dtype=torch.float64, generator=random)
        q = p + 0.3 * torch.randn(9, dtype=torch.float64, generator=random)
        ids = p.softmax(0).multinomial(400_000, replacement=True, generator=random)
        made = sampled_kl(q.log_softmax(0)[ids][None], p.log_softmax(0)[ids][None], torch.ones(1, len(ids)))
        exact = exact_kl(p, q).item()
        assert exact > 0.005
        assert made.k1 == pytest.approx(exact, rel=0.1) and made.k3 == pytest.approx(exact, rel=0.1)
        assert made.ratio_mean == pytest.approx(1, abs=0.01)  # the expectation of q / p under p

    def test_what_the_mask_leaves_out_may_hold_anything(self):
        made = sampled_kl(torch.tensor([[math.nan, -1.0]]), torch.tensor([[0.0, -1.0]]), torch.tensor([[0, 1]]))
        assert made == (0, 0, 1, 1, 1, 1, 1)
        assert sampled_kl(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)) == (0, 0, 1, 1, 1, 1, 0)


def test_exact_kl():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]).log()
    expected = torch.tensor([0.5 * math.log(2) + 0.25 * math.log(0.5), math.log(2)], dtype=torch.float64)
    assert torch.allclose(exact_kl(p, q), expected, rtol=1e-6)
    logits = torch.randn(4, 1000)
    assert not exact_kl(logits, logits.clone()).any()


def test_flipped_experts():
    rollout = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[-1, -1], [0, 1]]])
    trainer = torch.tensor([[[1, 0], [2, 9]], [[4, 8], [9, 8]], [[2, 3], [-1, -1]]])
    assert flipped_experts(rollout, trainer).tolist() == [0.25, 0.75]  # the order of slots is no flip
    assert flipped_experts(rollout, rollout).tolist() == [0, 0]
    assert flipped_experts(rollout[:0], trainer[:0]).isnan().all()


class TestQuantizers:
    def test_are_equal_on_the_grid_of_bf16_and_differ_beside_it(self):
        random = torch.Generator().manual_seed(0)
        master = torch.randn(3, 256, 384, generator=random)
        assert compare_quantizers(master.bfloat16().float()) == (0, 0, 0)
        made = compare_quantizers(master)
        assert 0.005 < made.codes < 0.05 and 1e-4 < made.relative_rms < 0.02  # 2 % of the codes
        ours = compare_quantizers(master, quantize_fp8_block, quantize_fp8_block)
        assert ours == (0, 0, 0)

    @pytest.mark.parametrize("shape", [(128, 128), (2, 130, 257), (1, 1)])
    @pytest.mark.parametrize("scale", ["fp32", "bf16"])
    def test_of_masters_is_our_rule_without_the_rounding(self, shape, scale):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
        q, s = quantize_masters(weight, scale)
        expected_q, expected_s = quantize_fp8_block(weight, scale=scale)
        assert_same_bits("q", q.view(torch.uint8), expected_q.view(torch.uint8))
        assert_same_bits("s", s, expected_s)
        assert compare_quantizers(torch.zeros(128, 128)) == (0, 0, 0)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A trainer whose masters have left the grid of BF16 by one step, and the policy served from its FP8 build."""
    torch.manual_seed(0)
    trainer = hf_models.model("qwen3_5_moe", "ornith_fp8", hidden_size=128, moe_intermediate_size=128)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.copy_(parameter.bfloat16())
    optimizer = torch.optim.AdamW(trainer.parameters(), 1e-4)
    trainer(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    folder = tmp_path_factory.mktemp("policy")
    trainer.save_pretrained(folder / "saved")
    convert(open_any(str(folder / "saved")), folder / "out", ["fp8-block"], jobs=1)
    (build,) = (folder / "out").iterdir()
    init, forward = FP8Experts.__dict__["__init__"], FP8Experts.__dict__["forward"]
    with pytest.MonkeyPatch.context() as patch:  # it dequantizes on a CPU, though ours needs no GPU
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        served = AutoModelForCausalLM.from_pretrained(
            build, experts_implementation="ornith_fp8", dtype=torch.float32
        ).eval()
    yield trainer, served
    FP8Experts.__init__, FP8Experts.forward = init, forward  # the load decorates the class in place


@pytest.fixture(scope="module")
def ids(sides):
    """Rows that the served policy sampled."""
    torch.manual_seed(1)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    return sides[1].generate(IDS[:, :PROMPT], attention_mask=torch.ones(6, PROMPT), **options)


@torch.no_grad()
def rollout(model, ids, temperature=1.0):
    """Logits, log-probs of the sampled tokens and the experts visited, as an engine returns them."""
    with replay.record(model) as trace:
        logits = model(input_ids=ids, use_cache=False).logits
    logps = torch.zeros(ids.shape)
    logps[:, 1:] = meter.token_logps(logits[:, :-1], ids[:, 1:], temperature)
    return logits, logps, trace[0]


class TestPolicyInFP8:
    def test_one_quantizer_gives_equal_bits(self, sides, ids):
        trainer, served = sides
        paths = [set(ornith_moe.hf.explain(model).values()) for model in sides]
        assert paths == [
            {"fused: plain SwiGLU, recipe fp8, cpu backend"},
            {"fused: plain SwiGLU, stored FP8, recipe fp8, cpu backend"},
        ]
        logits, logps, records = rollout(served, ids)
        own, _, _ = rollout(trainer, ids)
        assert_same_bits("logits", own, logits)
        assert not exact_kl(logits, own).any()
        found = measure(trainer, ids, logps, MASK, records)
        assert found.free == found.replayed == (0, 0, 1, 1, 1, 1, 6 * NEW)
        assert found.flipped.tolist() == [0] * 4 and len(found.layers) == 4

    def test_another_quantizer_does_not_and_replay_takes_its_flips_away(self, sides, ids):
        """The same rollouts beside a trainer that quantizes its fp32 masters as they are."""
        trainer, served = sides
        logits, logps, records = rollout(served, ids)
        masters = {name: p.detach() for name, p in trainer.named_parameters() if ".experts." in name}
        assert len(masters) == 8
        assert all(0.005 < compare_quantizers(master).codes < 0.05 for master in masters.values())
        other = copy.deepcopy(served)
        parameters = dict(other.named_parameters())
        for name, master in masters.items():
            q, s = quantize_masters(master)
            parameters[name].data, parameters[f"{name}_scale_inv"].data = q, s.float()
        found = measure(other, ids, logps, MASK, records)
        free, _, _ = rollout(other, ids)
        with replay.replay(other, records):
            replayed, _, _ = rollout(other, ids)
        exact = [exact_kl(logits, own)[:, PROMPT - 1 : -1].mean().item() for own in (free, replayed)]
        assert found.free.k3 > 1e-6 and found.free.equal < 0.1 and exact[0] > 1e-6
        assert found.flipped.sum() > 0
        assert exact[1] < exact[0]


def test_measure_sees_a_temperature(sides, ids):
    trainer, _ = sides
    _, logps, records = rollout(trainer, ids, temperature=0.7)
    assert measure(trainer, ids, logps, MASK, records, temperature=0.7).free.equal == 1
    assert measure(trainer, ids, logps, MASK, records).free.k3 > 1e-3


def test_refusals():
    two, three = torch.zeros(1, 2), torch.zeros(1, 3)
    for call, message in (
        (lambda: sampled_kl(two, three, two), "trainer_logps, rollout_logps, mask: expected one shape"),
        (lambda: exact_kl(two, three), "rollout_logits, trainer_logits: expected one shape"),
        (lambda: flipped_experts(two, two), r"expected two records \[tokens, layers, top_k\]"),
        (lambda: measure(None, two, two, torch.ones(1, 2), None), "nothing in the mask at position 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples_run():
    assert doctest.testmod(meter, extraglobs={"torch": torch}).failed == 0
