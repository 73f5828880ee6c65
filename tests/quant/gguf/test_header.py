"""quant/gguf/header.py against the `gguf` package's own writer: the same bytes for every kind of value.

Not covered: what the keys should be (test_gguf_metadata.py, test_gguf_converter.py).
"""

import gguf
import numpy as np
from gguf import GGUFValueType as Type

from ornith_moe.quant.gguf.header import Entry, gguf_header, padded

ENTRIES = [
    Entry("general.architecture", "qwen35", Type.STRING),
    Entry("a.empty", "", Type.STRING),
    Entry("a.text", "größe 🦙\x00\n", Type.STRING),
    *(Entry(f"a.{kind.name}", value, kind) for kind, value in {
        Type.UINT8: 255, Type.INT8: -128, Type.UINT16: 65535, Type.INT16: -32768, Type.UINT32: 2**32 - 1,
        Type.INT32: -(2**31), Type.FLOAT32: 0.1, Type.BOOL: True, Type.UINT64: 2**64 - 1, Type.INT64: -(2**63),
        Type.FLOAT64: 0.1,
    }.items()),
    Entry("a.strings", ["", "Ġthe", "日本"], Type.ARRAY, Type.STRING),
    Entry("a.kinds", [1, 3, -6], Type.ARRAY, Type.INT32),
    Entry("a.flags", [True, False], Type.ARRAY, Type.BOOL),
    Entry("a.scores", [-1000.0, 0.1], Type.ARRAY, Type.FLOAT32),
]  # fmt: skip
TENSORS = [("token_embd.weight", "Q8_0", (7, 64), 7 * 68), ("x", "F32", (5,), 20), ("e.weight", "BF16", (2, 3, 8), 96)]


def written(path, entries, tensors):
    writer = gguf.GGUFWriter(path, "qwen35")
    for entry in entries[1:]:  # the writer has added the architecture
        writer.add_key_value(*entry)
    for name, dtype, shape, nbytes in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType[dtype])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        step()
    writer.close()
    header = path.read_bytes()
    return header.ljust(padded(len(header)), b"\0")


def test_the_header_is_the_one_that_the_gguf_package_writes(tmp_path):
    assert gguf_header(ENTRIES, TENSORS) == written(tmp_path / "x.gguf", ENTRIES, TENSORS)
