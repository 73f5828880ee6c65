"""Slots sorted by expert, as every step of the CPU backend reads them.

T = 3, E = 4, top_k = 2, indices [[1, 3], [0, 3], [2, 9]]: offsets [0, 1, 2, 3, 5], row_to_slot [2, 0, 4, 1, 3, -1].
Slot = token * top_k + k. Sorting is stable; the ids outside [0, E) reach no row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from ornith_moe.backend.cpu import forward


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """What the steps ask for again and again is read once: with one token, asking costs as much as computing."""

    offsets: torch.Tensor  # [E + 1] int32
    row_to_slot: torch.Tensor  # [T * top_k] int32, -1 past the last row
    active: torch.Tensor  # int32, the experts that have rows
    tokens: int
    top_k: int

    @property
    def slots(self) -> int:
        return self.tokens * self.top_k

    @cached_property
    def used(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def addresses(self) -> forward.Rows:
        offsets, row_to_slot, active = (t.data_ptr() for t in (self.offsets, self.row_to_slot, self.active))
        return forward.Rows(offsets, row_to_slot, active, len(self.active), self.tokens, self.top_k)

    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, its first row, the row after its last) for every expert that has rows."""
        offsets = self.offsets.tolist()
        return [(e, offsets[e], offsets[e + 1]) for e in self.active.tolist()]

    def slots_of(self, first: int, last: int) -> torch.Tensor:
        return self.row_to_slot[first:last].long()

    def tokens_of(self, first: int, last: int) -> torch.Tensor:
        return self.slots_of(first, last) // self.top_k


def group_by_expert(indices: torch.Tensor, experts: int) -> RoutedRows:
    """RoutedRows of indices [T, top_k]."""
    offsets, active, row_to_slot = (
        torch.empty(size, dtype=torch.int32, device="cpu") for size in (experts + 1, experts, indices.numel())
    )
    ids = indices.detach().reshape(-1).to(torch.int64).numpy()
    count = forward.group_by_expert(ids, offsets.numpy(), row_to_slot.numpy(), active.numpy())
    return RoutedRows(offsets, row_to_slot, active[:count], *indices.shape)


def regroup(offsets: torch.Tensor, row_to_slot: torch.Tensor, tokens: int, top_k: int) -> RoutedRows:
    """RoutedRows of what a forward has saved."""
    active = (offsets[1:] > offsets[:-1]).nonzero().flatten().to(torch.int32)
    return RoutedRows(offsets.contiguous(), row_to_slot.contiguous(), active, tokens, top_k)
