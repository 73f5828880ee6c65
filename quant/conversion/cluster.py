"""Units of a conversion on the machines of a Ray cluster that share a file system.

    this process            plans, reserves the files, journals, reads back, publishes
    a worker per CPU        reads its units, encodes them, writes them in their places, tells their extents

Ray places the workers, restarts one that dies and gives it its units again: they are written once more, with the same
bytes. Source and output must have the same path on every machine; what a worker has written is on their disk before it
is journalled here. `ray.init()` finds the cluster by RAY_ADDRESS, or makes one of this machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ornith_moe.quant.conversion.encode import Encoded, Encoder
from ornith_moe.quant.conversion.writer import write_all
from ornith_moe.quant.errors import ConversionError, PlanError, brief
from ornith_moe.quant.files import open_output

AHEAD = 4  # batches that a worker has waiting


class Worker:
    """What runs on a CPU of the cluster: an encoder of its own, and the files; both come from Ray's store."""

    def __init__(self, shared: tuple[Encoder, list[Path]]):
        self.encoder, self.paths = shared
        self.files: dict[int, int] = {}

    def encode(self, batch: list[int]) -> list[Encoded]:
        """What becomes of the units of a batch, their pieces written and without their bytes."""
        results = self.encoder.encode(batch)
        written = set()
        for piece in (piece for result in results for piece in result.pieces):
            if piece.file not in self.files:
                self.files[piece.file] = open_output(self.paths[piece.file])
            write_all(self.files[piece.file], piece.payload, piece.offset)
            written.add(piece.file)
        for file in written:
            os.fdatasync(self.files[file])
        return [
            replace(one, pieces=[replace(piece, payload=memoryview(b"")) for piece in one.pieces]) for one in results
        ]


def encode_with_ray(
    encoder: Encoder, paths: Sequence[Path], batches: Sequence[list[int]]
) -> Generator[tuple[list[int], list[Encoded]]]:
    """(batch, what became of its units) in order; their bytes are in the files.

    Raises:
        PlanError: Ray is not installed. ConversionError: a worker failed in a way that Ray does not mend.
    """
    try:
        import ray
    except ImportError:
        raise PlanError("--executor ray: ray is not installed; pip install 'ornith-moe[ray]'") from None
    began = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    shared = ray.put((encoder, list(paths)))
    count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    remote: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Worker)
    workers = [remote.remote(shared) for _ in range(min(count, max(len(batches), 1)))]
    waiting: deque[tuple[list[int], Any]] = deque()
    try:
        for number, batch in enumerate(batches):
            waiting.append((batch, workers[number % len(workers)].encode.remote(batch)))
            if len(waiting) >= AHEAD * len(workers):
                batch, result = waiting.popleft()
                yield batch, _result(ray, result)
        while waiting:
            batch, result = waiting.popleft()
            yield batch, _result(ray, result)
    finally:
        for worker in workers:
            ray.kill(worker)
        if began:
            ray.shutdown()


def _result(ray: Any, waiting: Any) -> list[Encoded]:
    try:
        return ray.get(waiting)
    except ray.exceptions.RayTaskError as error:
        raise ConversionError(f"a worker of the Ray cluster failed: {brief(str(error.cause))}") from None
    except ray.exceptions.RayError as error:
        raise ConversionError(f"the Ray cluster failed: {brief(str(error))}; the same command goes on") from None
