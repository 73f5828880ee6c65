"""Compile every kernel whose machine code the tests look at, and write tests/machine_code.json, a few minutes:

    python tests/record_machine_code.py

after a change of a kernel, so that the next run of the tests need not. See machine_code.py.
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = "compiles_for_every_target or every_kernel_of_a_step or held_out_timings"


class Recorder:
    def pytest_collection_finish(self):
        import machine_code  # after conftest.py has chosen the interpreter

        machine_code.recorded = {}

    def pytest_sessionfinish(self, exitstatus):
        import machine_code

        if exitstatus == pytest.ExitCode.OK:
            machine_code.write()


if __name__ == "__main__":
    sys.exit(pytest.main([str(HERE / "kernels"), "-k", TESTS, "-q"], plugins=[Recorder()]))
