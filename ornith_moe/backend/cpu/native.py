"""The five steps of the routed experts by our own kernels (`forward`, `backward`): float32 and BF16.

Each step allocates, states how work is cut into tasks, and runs one kernel on all threads. `loop` has the same five
steps in torch. `rows` is a `RoutedRows`, a weight is an `Operand`, R = T * top_k; rows of a result past the last routed
one are not written.

Letters: T tokens, E experts, H hidden, I expert intermediate, R slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ornith_moe.backend.cpu import backward, forward, memory
from ornith_moe.backend.cpu.machine import run
from ornith_moe.backend.cpu.memory import empty
from ornith_moe.backend.cpu.register_tiles import DOT_COLUMNS, FP32, PANEL, VECTOR_BYTES
from ornith_moe.backend.cpu.routed import RoutedRows
from ornith_moe.backend.cpu.rows import Matrix, scale_block
from ornith_moe.quant.operand import Operand

_ROWS_BYTES = 512 << 10  # of activations that meet each row of a weight while both are in the second level of cache
_STRIP = 64  # columns of I, and two of these of H, that one task computes: 512 KB of weights of the 35B
_BLOCK = -(-256 // PANEL) * PANEL  # rows of a weight gradient that one task computes ...
_BLOCK_WORDS = 512  # ... and words of the contraction that it packs at a time
_MANY_ROWS = 256  # per expert, from which transposing them into panels pays


def serves(x: torch.Tensor, *weights: Operand) -> bool:
    """Whether these kernels know the dtypes."""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return known and all(w.scale is not None or w.value.dtype == x.dtype for w in weights)


@dataclass(frozen=True)
class Native:
    """The five steps. kind: how words are multiplied, one of `register_tiles`."""

    kind: int

    def gate_up(
        self, x: torch.Tensor, rows: RoutedRows, weight: Operand, save: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """a' = d(silu(gate) * up) [R, I], and pre = [gate, up] = d(x @ gate_up^T) [R, 2I] if `save`."""
        hidden, inner, size = weight.value.shape[2], weight.value.shape[1] // 2, x.element_size()
        x = _whole_vectors(x, VECTOR_BYTES)
        x_bytes = x.shape[1] * size
        pre = empty((rows.slots, 2 * inner), x.dtype) if save else None
        a_bytes = -(-inner * size // VECTOR_BYTES) * VECTOR_BYTES
        a = empty((rows.slots, a_bytes // size), x.dtype)
        panels = self.kind != FP32 and rows.used >= _MANY_ROWS * max(len(rows.active), 1)
        panels = panels and weight.scale is None and hidden * size == x_bytes and x_bytes % 64 == inner % 16 == 0
        chunk, strip = (max(_chunk(x_bytes), PANEL), 4 * _STRIP) if panels else (_chunk(x_bytes), _STRIP)
        matrix, _alive = _matrix(weight)
        run(
            forward.gate_up,
            len(rows.active) * -(-inner // strip),
            _work(rows, weight),
            forward.gate_up_layout(0, x_bytes, strip, chunk, panels).end,
            (self.kind, x.data_ptr(), x_bytes, rows.addresses, matrix, _address(pre), a.data_ptr(), a_bytes, strip,
             chunk, panels),
        )  # fmt: skip
        return a[:, :inner], pre

    def down(self, a: torch.Tensor, rows: RoutedRows, weights: torch.Tensor, weight: Operand) -> torch.Tensor:
        """y[t] = sum over the experts of t, in their order, of w * (a' @ down^T): [T, H] in d."""
        hidden = weight.value.shape[1]
        a = _whole_vectors(a, VECTOR_BYTES)
        a_bytes = a.stride(0) * a.element_size()
        y32 = empty((rows.tokens, -(-hidden // DOT_COLUMNS) * DOT_COLUMNS), torch.float32)
        y = empty((rows.tokens, hidden), a.dtype) if self.kind != FP32 else None
        chunk, strip = _chunk(a_bytes), 2 * _STRIP
        weights = weights.float().contiguous()
        matrix, _alive = _matrix(weight)
        run(
            forward.down,
            -(-hidden // strip),
            _work(rows, weight),
            forward.down_layout(0, a_bytes, chunk).end,
            (self.kind, a.data_ptr(), a_bytes, rows.addresses, weights.data_ptr(), matrix, y32.data_ptr(),
             4 * y32.shape[1], _address(y), strip, chunk),
        )  # fmt: skip
        return _columns(y32, hidden) if y is None else y

    def activation_gradient(
        self,
        dy: torch.Tensor,
        rows: RoutedRows,
        weights: torch.Tensor,
        weight: Operand,
        pre: torch.Tensor,
        a_given: torch.Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dweights = <da', a'> float32 [T, top_k], wa = d(w * a') [R, I], dpre [R, 2I]; None where `needs` says no.

        da' = dy @ down. a' comes from `pre`, or is `a_given` [R, I] where the forward quantized it.
        """
        needs_dweights, needs_wa, needs_dpre = needs
        _, hidden, inner = weight.value.shape
        dy, weights = _whole_vectors(dy, 4), weights.float().contiguous()
        panels, chunk = -(-inner // PANEL), 64
        partial = empty((rows.slots, panels), torch.float32) if needs_dweights else None
        wa = empty((rows.slots, inner), dy.dtype) if needs_wa else None
        dpre = empty((rows.slots, 2 * inner), dy.dtype) if needs_dpre else None
        a_given = None if a_given is None else a_given.contiguous()
        matrix, _alive = _matrix(weight)
        run(
            backward.activation_gradient,
            len(rows.active) * panels,
            _work(rows, weight),
            backward.activation_gradient_layout(0, hidden, chunk).end,
            (self.kind, dy.data_ptr(), dy.stride(0) * dy.element_size(), rows.addresses, weights.data_ptr(), matrix,
             pre.data_ptr(), _address(a_given), backward.Wanted(*map(_address, (partial, wa, dpre))), chunk),
        )  # fmt: skip
        dweights = None
        if partial is not None:
            dweights = dy.new_zeros(rows.slots, dtype=torch.float32)
            dweights[rows.slots_of(0, rows.used)] = partial[: rows.used].sum(1)
            dweights = dweights.view(weights.shape)
        return dweights, wa, dpre

    def weight_gradient(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        gathered: tuple[bool, bool],
        rows: RoutedRows,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[E, N, K] = left^T @ right over the rows of each expert, zero, untouched memory for an expert without rows.

        left, right: [R, N] and [R, K], or [T, .] where `gathered` says so.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            return self.weight_gradient(left, right, gathered, rows, shape, torch.float32).to(dtype)
        left, right = left.contiguous(), right.contiguous()
        gradient = memory.weight_gradient(shape, dtype, rows.active.tolist())
        _, height, width = shape
        sides = [
            backward.Side(side.data_ptr(), side.shape[1], side.shape[1] * side.element_size(), gather)
            for side, gather in zip((left, right), gathered, strict=True)
        ]
        run(
            backward.weight_gradient,
            len(rows.active) * -(-height // _BLOCK),
            rows.used * height * width // 50,
            backward.weight_gradient_layout(0, _BLOCK, _BLOCK_WORDS).end,
            (self.kind, *sides, rows.addresses, gradient.data_ptr(), dtype == torch.bfloat16, _BLOCK, _BLOCK_WORDS),
        )
        return gradient

    def input_gradient(self, dpre: torch.Tensor, rows: RoutedRows, weight: Operand) -> torch.Tensor:
        """dx[t] = sum over the experts of t, in their order, of dpre @ gate_up: [T, H] in d."""
        hidden, inner = weight.value.shape[2], weight.value.shape[1] // 2
        dx32 = empty((rows.tokens, -(-hidden // PANEL) * PANEL), torch.float32)
        dx = empty((rows.tokens, hidden), dpre.dtype) if self.kind != FP32 else None
        chunk = 256
        matrix, _alive = _matrix(weight)
        run(
            backward.input_gradient,
            -(-hidden // PANEL),
            _work(rows, weight),
            backward.input_gradient_layout(0, inner, chunk).end,
            (self.kind, dpre.data_ptr(), rows.addresses, matrix, dx32.data_ptr(), 4 * dx32.shape[1], _address(dx),
             chunk),
        )  # fmt: skip
        return _columns(dx32, hidden) if dx is None else dx


def _columns(padded: torch.Tensor, columns: int) -> torch.Tensor:
    """The first columns as a tensor of its own: no view, which autograd would not let a caller change in place."""
    return padded if padded.shape[1] == columns else padded[:, :columns].contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _chunk(row_bytes: int) -> int:
    return max(16, _ROWS_BYTES // row_bytes // 2 * 2)


def _work(rows: RoutedRows, weight: Operand) -> int:
    """Nanoseconds on one thread, roughly: 20 GB/s or 100 GFLOP/s."""
    _, n, k = weight.value.shape
    return max(len(rows.active) * n * k * weight.value.element_size() // 20, rows.used * n * k // 50)


def _whole_vectors(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x with rows of a multiple of some bytes, padded with zeros: itself wherever it is already so."""
    extra = -x.shape[1] * x.element_size() % multiple // x.element_size()
    if extra and x.stride() == (x.shape[1] + extra, 1):
        return x  # a view of rows that `gate_up` has padded
    return F.pad(x, (0, extra)) if extra else x.contiguous()


def _matrix(weight: Operand) -> tuple[Matrix, tuple[torch.Tensor, ...]]:
    """(the weight as the kernels take it, the tensors that hold its memory)."""
    value, scale = weight.value, weight.scale
    value = value if value.stride(2) == 1 else value.contiguous()
    size, (_, n, k) = value.element_size(), value.shape
    place = value.data_ptr(), n, k, value.stride(0) * size, value.stride(1) * size
    if scale is None:
        return Matrix(*place, 0, 0, 0, 1, 1), (value,)
    scale = scale.float().contiguous()
    block = scale_block(value.shape[1:], scale.shape[1:])
    _, scale_rows, scale_columns = scale.shape
    return Matrix(*place, scale.data_ptr(), scale_rows, scale_columns, *block), (value, scale)
