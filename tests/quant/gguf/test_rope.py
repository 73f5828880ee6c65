"""Stretched rotations: llama.cpp and transformers on one model, whose config says YaRN or linear scaling.

Reference: transformers in fp32 on a random model. Keys against llama.cpp's converter: test_converter.py, whose model
with a tower has YaRN. Not covered: contexts beyond 48 tokens, so the original one is of 16.
"""

import json

import fixtures
import numpy as np
import pytest
from gguf import GGUFReader

from ornith_moe.clients import open_client
from ornith_moe.compare import log_probs
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, PlanError
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.weights import open_source

TOKENS = np.random.default_rng(0).integers(0, 230, 48)
POSITIONS = [3, 19, 35, 46]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}


def stretched(folder, more, key="rope_parameters"):
    """A checkpoint of this config; 48 tokens tell one stretching from another."""
    fixtures.qwen35(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_theta": 10_000.0}
    config[key] = config.get(key, {}) | more
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def keys_of(path):
    fields = GGUFReader(path).fields
    return {name.partition("scaling.")[2]: field.contents() for name, field in fields.items() if "scaling." in name}


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        (YARN | {"beta_fast": 32, "beta_slow": 1.0}, {"original_context_length": 16, "yarn_beta_fast": 32.0}),
        (YARN | {"original_max_position_embeddings": 512}, {"original_context_length": 512}),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    ],
)
def test_llama_cpp_computes_what_transformers_computes(tmp_path, more, keys):
    """Measured: 3e-5 between the two."""
    folder = stretched(tmp_path / "model", more)
    path = convert(open_source(folder), tmp_path / "out", ["gguf:F32"]).builds[0].path
    plain = convert(open_source(stretched(tmp_path / "plain", {})), tmp_path / "out", ["gguf:F32"]).builds[0].path
    assert keys_of(path).items() >= keys.items() and not keys_of(plain)
    with open_client(folder) as truth, open_client(path) as client, open_client(plain) as other:
        p, q, r = (log_probs(one, TOKENS[None], POSITIONS) for one in (truth, client, other))
    assert np.abs(p - q).max() < 4e-4
    assert np.abs(p - r).max() > 0.01, "scalings that differ, or the comparison shows nothing"


def test_rope_scaling_of_older_configs_goes_before(tmp_path):
    folder = stretched(tmp_path / "model", {"type": "yarn", "factor": 4.0}, key="rope_scaling")
    path = convert(open_source(folder), tmp_path / "out", ["gguf:F32"]).builds[0].path
    assert keys_of(path) == {"type": "yarn", "factor": 4.0, "original_context_length": 1024}


@pytest.mark.parametrize(
    ("more", "error", "sentence"),
    [
        ({"factor": None}, CheckpointError, "factor to be a positive number, got None"),
        ({"factor": -4}, CheckpointError, "factor to be a positive number, got -4"),
        ({"beta_fast": "32"}, PlanError, "beta_fast is '32', llama.cpp takes 32.0 alone"),
        ({"beta_slow": 2}, PlanError, "beta_slow is 2, llama.cpp takes 1.0 alone"),
        ({"original_max_position_embeddings": 1.5}, CheckpointError, "original_max_position_embeddings to be an"),
        (
            {"attention_factor": 1.0},
            PlanError,
            "attention_factor is 1.0, llama.cpp takes 1.2079 alone for a factor of 8",
        ),
        ({"mscale": 0.7, "mscale_all_dim": 1.0}, PlanError, "mscale is 0.7, llama.cpp takes none"),
        ({"truncate": False}, PlanError, "truncate is False, llama.cpp takes True alone"),
        (
            {"rope_type": "longrope"},
            PlanError,
            "'longrope' is not written to a GGUF, only default, mrope, yarn, linear",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, more, error, sentence):
    config = json.loads((fixtures.qwen35(tmp_path / "model") / "config.json").read_text())
    config["rope_parameters"] |= YARN | more
    with pytest.raises(error, match=sentence):
        architecture(config).gguf_keys(0)


def test_the_magnitude_that_is_llama_cpps_own_may_be_said(tmp_path):
    config = json.loads((fixtures.qwen35(tmp_path / "model") / "config.json").read_text())
    config["rope_parameters"] |= YARN | {"attention_factor": 0.1 * float(np.log(8)) + 1}
    assert ("{arch}.rope.scaling.type", "yarn") in [key[:2] for key in architecture(config).gguf_keys(0)[0]]
