"""docs/integration.md says only what is true: its Python runs, in order, in one process.

Blocks that begin with `# needs` want other packages or more processes; they must at least compile. Not covered: YAML.
"""

import re
from pathlib import Path

from command import python

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/integration.md").read_text(encoding="utf-8"), re.M | re.S)


def test_integration_runs(tmp_path):
    run = [block for block in BLOCKS if not block.startswith("# needs")]
    assert len(run) >= 7
    for block in BLOCKS:
        compile(block, "docs/integration.md", "exec")
    done = python("\n".join(run), tmp_path)
    assert "model.layers.0.mlp.experts fused: plain SwiGLU, recipe bf16, cpu backend" in done.stdout
    assert "\n27\n" in done.stdout  # 12 + 15 tokens with a record
