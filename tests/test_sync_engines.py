"""Weight sync into engines, and against builds on disk.

Engines are fakes with the published signatures: vLLM 0.29 (vllm/distributed/weight_transfer/base.py, nccl_engine.py),
SGLang of November 2026 (python/sglang/srt/entrypoints/engine.py). Reference: `convert`'s files and manifest. Not
covered: the engines themselves.
"""

import ast
import copy
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sync_models import BUILDS, SHARD_BYTES, assert_same_bytes, converted, masters, stored

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.sync import engines, named_tensors, served_weights
from ornith_moe.sync.check import differences, file_digests, stored_digests
from ornith_moe.sync.engines import buckets, send, send_to_sglang, vllm_weight_source


class TestEngines:
    def test_no_engine_is_imported_before_it_is_asked_for(self):
        """Nor transformers: by the syntax trees, function bodies left out."""
        for path in Path(engines.__file__).parent.glob("*.py"):
            named = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not [line for line in map(ast.unparse, named) if re.search("vllm|sglang|transformers", line)]

    def test_load_weights(self):
        class Worker:
            """`load_weights` of a model of vLLM or SGLang."""

            def load_weights(self, weights):
                self.loaded = {name: tensor.clone() for name, tensor in weights}
                return set(self.loaded)

        worker = Worker()
        assert worker.load_weights(named_tensors(served_weights(masters("moe"), "fp8-block")))
        assert_same_bytes(worker.loaded.items(), stored(converted("moe")["fp8-block"]))

    def test_vllm_pulls_a_weight_source(self, monkeypatch):
        for part in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.base", vllm_base())
        source = vllm_weight_source(masters("moe"), "fp8-channel")
        assert isinstance(source, sys.modules["vllm.distributed.weight_transfer.base"].WeightSource)
        for _ in range(2):  # a fresh pass per round
            assert_same_bytes(receive(source), stored(converted("moe")["fp8-channel"]))

    def test_without_vllm_one_sentence(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ImportError, match=r"needs vllm >= 0\.26 .*; install it, or send named_tensors"):
            vllm_weight_source(masters("moe"))

    @pytest.mark.parametrize("bucket_bytes", [1, 300_000, 1 << 30])
    def test_sglang_flushes_once(self, bucket_bytes):
        engine = Engine()
        sent = send_to_sglang(engine, served_weights(masters("moe"), "fp8-block"), bucket_bytes=bucket_bytes)
        expected = stored(converted("moe")["fp8-block"])
        assert_same_bytes([pair for bucket in engine.buckets for pair in bucket], expected)
        assert sent == sum(tensor.nbytes for tensor in expected.values())
        assert engine.flushed == [False] * (len(engine.buckets) - 1) + [True]

    def test_what_sglang_cannot_load_is_told(self):
        engine = Engine(answer=(False, "unexpected key"))
        with pytest.raises(RuntimeError, match=r"SGLang did not load .*: unexpected key; start the engine from"):
            send_to_sglang(engine, served_weights(masters("moe"), "fp8-block"))
        assert send_to_sglang(None, []) == 0

    def test_a_callback_gets_buckets_of_whole_weights(self):
        got = []
        sent = send(served_weights(masters("moe"), "fp8-channel"), got.append, bucket_bytes=200_000)
        assert_same_bytes([pair for bucket in got for pair in bucket], stored(converted("moe")["fp8-channel"]))
        sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in got]
        assert sum(sizes) == sent and len(sizes) > 2
        for bucket, size in zip(got, sizes, strict=True):
            names = {name for name, _ in bucket}
            assert size <= 200_000 or len(names) <= 2
            assert {name.removesuffix("_scale") for name in names} <= names
        with pytest.raises(ValueError, match="bucket_bytes: expected at least 1"):
            next(buckets([], 0))


def vllm_base():
    """vllm/distributed/weight_transfer/base.py of vLLM 0.29, as far as a source sees it."""
    module = ModuleType("vllm.distributed.weight_transfer.base")
    code = """
from abc import ABC, abstractmethod
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple

class WeightSource(ABC):
    @abstractmethod
    def metadata(self): ...
    @abstractmethod
    def __iter__(self): ...
"""
    exec(code, module.__dict__)
    return module


def receive(source):
    """(name, tensor) as a worker of the NCCL engine receives them: memory by metadata, then one broadcast each."""
    names = [(meta.name, str(meta.dtype).removeprefix("torch."), list(meta.shape)) for meta in source.metadata()]
    for (name, dtype, shape), (_, sent) in zip(names, source, strict=True):
        weight = torch.empty(shape, dtype=getattr(torch, dtype))
        assert sent.is_contiguous() and sent.nbytes == weight.nbytes
        weight.view(torch.uint8).copy_(sent.view(weight.shape).view(torch.uint8))
        yield name, weight


class Engine:
    """`sglang.Engine`, as far as a sync sees it."""

    def __init__(self, answer=(True, "Success")):
        self.buckets, self.flushed, self.answer = [], [], answer

    def update_weights_from_tensor(self, named_tensors, load_format=None, flush_cache=True):
        assert isinstance(named_tensors, list) and load_format is None
        self.buckets.append([(name, tensor.clone()) for name, tensor in named_tensors])
        self.flushed.append(flush_cache)
        return self.answer


class TestCheck:
    @pytest.mark.parametrize("build", BUILDS)
    def test_digests_are_those_of_the_manifest(self, build):
        path = converted("moe")[build]
        found = file_digests(masters("moe"), build, max_shard_bytes=SHARD_BYTES)
        assert found == stored_digests(path) and len(found) > 1

    @pytest.mark.parametrize("build", BUILDS)
    def test_a_build_of_this_policy(self, build):
        assert differences(masters("moe"), converted("moe")[build]) == []

    def test_another_policy_is_told_by_its_tensors(self):
        path, model = converted("moe")["fp8-block"], copy.deepcopy(masters("moe"))
        with torch.no_grad():
            model.model.layers[2].mlp.experts.gate_up_proj[1, 300].mul_(-1)
        name = "model.layers.2.mlp.experts.1.up_proj.weight"
        assert differences(model, path) == [f"{name}: holds other values in the build than in the policy"]
        told = differences(masters("dense"), path, most=1000)
        for half in ("is in the policy and not in the build", "is in the build and not in the policy"):
            assert any(half in one for one in told)
        assert differences(masters("dense"), path, most=3) == told[:3]

    def test_a_checkpoint_of_another_dtype(self):
        told = differences(masters("moe"), converted("moe")["fp8-block"], saved_as=None, most=1000)
        assert told and all("is BF16" in one and "torch.float32" in one for one in told)

    def test_what_is_no_build(self, tmp_path):
        with pytest.raises(CheckpointError, match="no build here"):
            differences(masters("moe"), tmp_path / "none")
        with pytest.raises(CheckpointError, match=r"no ornith_manifest\.json here; compare with differences"):
            stored_digests(tmp_path)
