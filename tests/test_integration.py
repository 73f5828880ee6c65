"""docs/integration.md says only what is true: its Python runs, in order, in one process.

Blocks that begin with `# needs` want other packages or more processes; they must at least compile. Not covered: YAML.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/integration.md").read_text(encoding="utf-8"), re.M | re.S)


def test_integration_runs(tmp_path):
    run = [block for block in BLOCKS if not block.startswith("# needs")]
    assert len(run) >= 7
    for block in BLOCKS:
        compile(block, "docs/integration.md", "exec")
    # a user has installed the package; the checkout stands in for that
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", "\n".join(run)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.mlp.experts fused: plain SwiGLU, recipe bf16, cpu backend" in done.stdout
    assert "\n27\n" in done.stdout  # 12 + 15 tokens with a record
