"""Hostile inputs against the command line, in forked workers: the corpus of minimised ones, and 300 made from seed 0.

tests/fuzz/ makes and runs them; `make fuzz ARGS="--cases 5000 --seed 7"` makes others. `imatrix` and `compare`, which
run models, have a fourth and a tenth of the share of another class.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "run.py"


@pytest.mark.slow
def test_hostile_inputs_end_in_a_sentence():
    asked = [sys.executable, str(FUZZ), "--corpus", "--cases", "300", "--seed", "0"]
    done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
