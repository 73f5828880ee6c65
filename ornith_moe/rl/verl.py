"""verl adapter: its FSDP2 engine, with replayed routing and with weights that are synced as the bytes of a build.

    actor_rollout_ref:
      model:
        external_lib: ornith_moe.rl.verl          # imported in every worker before the model is configured
        override_config:
          _experts_implementation: ornith         # a word of ornith_moe.hf
          attn_implementation: sdpa               # verl's default needs flash-attn
          served_build: FP8                       # optional: what `get_per_tensor_param` gives; default: verl's own
      actor:
        strategy: fsdp2

Importing this file registers the words of `ornith_moe.hf` and, in verl's `EngineRegistry`, a subclass of its engine for
strategy fsdp2 under the vendor of this machine; verl looks there before it takes its own, registered without a vendor.

    forward_step            a micro-batch with `routed_experts` [B, j1, layers, top_k] visits those experts
    get_per_tensor_param    with `served_build`: (name, tensor) of that build, quantized expert by expert

Without them it is verl's engine. verl fills `routed_experts` from the rollout where
`rollout.enable_rollout_routing_replay` is set, for its pass of old log-probabilities as for the update. Where a rollout
has no record (the last token, text of tools) it writes zeros, expert 0 top_k times: there the router chooses. The share
of recorded experts that the router would not choose is the metric `replay/flipped_share`.

What receives `served_build` has to load (q, scale) as they lie on disk. verl 0.9.1's own vLLM worker does not: it
quantizes whatever it gets (verl/utils/vllm/vllm_quant_utils.py, `quant_weights`).

Source: ours, on verl 0.9.1; the need is verl-project/verl#5392.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import ornith_moe.hf  # noqa: F401, which registers its words
from ornith_moe import replay
from ornith_moe.routing_records import MISSING
from ornith_moe.sync import Sync, named_tensors, plan_sync

try:
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_device_id, get_device_name, get_vendor
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
except ImportError as error:
    raise ImportError(f"ornith_moe.rl.verl needs verl 0.9.1 ({error}); pip install 'ornith-moe[verl]'") from None

SERVED_BUILD = "served_build"  # the key in override_config


@EngineRegistry.register("language_model", "fsdp2", device=get_device_name(), vendor=get_vendor())
class OrnithFSDPEngine(FSDPEngineWithLMHead):
    """verl's `FSDPEngineWithLMHead`; `served_build` of `override_config` names a build of `ornith_moe.sync`.

    Raises:
        ValueError: `served_build` with LoRA, whose adapters verl sends by themselves.
    """

    def __init__(self, model_config: Any, *configs: Any, **options: Any) -> None:
        super().__init__(model_config, *configs, **options)
        overrides = model_config.override_config
        self.served_build: str | None = overrides.get("model_config", overrides).get(SERVED_BUILD)
        vars(model_config.hf_config).pop(SERVED_BUILD, None)  # verl set it there too, and would save it
        if self.served_build is not None and self._is_lora:
            raise ValueError(
                f"{SERVED_BUILD}: expected none with lora_rank={model_config.lora_rank}, whose adapters verl sends by "
                "themselves; drop one of the two"
            )

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """verl's step, in which the routers visit `routed_experts` where the micro-batch has them.

        The backward pass comes later and may recompute: it visits the same.

        Raises:
            TypeError, ValueError: records that are not nested as the tokens are, or that fit no router (`replay`).
            NotImplementedError: with sequence parallelism, where a rank runs a part of each sequence.
        """
        rows = self._rows(micro_batch)
        with nullcontext() if rows is None else replay.replay(self.module, rows) as report:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if report is not None:  # verl has synchronized with the device already, for the loss
            output["metrics"]["replay/flipped_share"] = report.flipped_share
            output["metrics"]["replay/tokens"] = report.tokens
        return loss, output

    def _rows(self, micro_batch: Any) -> torch.Tensor | None:
        """[T, layers, top_k] for every position that the model runs, MISSING where there is no record."""
        records, tokens = micro_batch.get("routed_experts", None), micro_batch["input_ids"]
        if records is None:
            return None
        if not records.is_nested:
            raise TypeError("routed_experts: expected a nested tensor, as left_right_2_no_padding makes it")
        if not torch.equal(records.offsets(), tokens.offsets()):
            raise ValueError(
                f"routed_experts: expected one row per token of input_ids, {tokens.offsets().diff().tolist()} by "
                f"sequence, got {records.offsets().diff().tolist()}"
            )
        if self.use_ulysses_sp:
            raise NotImplementedError(
                "routed_experts: replay knows whole sequences only; set ulysses_sequence_parallel_size to 1, or "
                "rollout.enable_rollout_routing_replay to False"
            )
        values = records.values().to(get_device_id())
        if values.shape[-1] > 1:  # of one expert per token, 0 is a record
            values = values.masked_fill((values == 0).all(-1, keepdim=True), MISSING)
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", True):
            return F.pad(values, (0, 0, 0, 0, 0, self._get_packed_pad_size(len(values))), value=MISSING)
        sequences = values.split(records.offsets().diff().tolist())
        return pad_sequence(sequences, batch_first=True, padding_value=MISSING).flatten(0, 1)

    def get_per_tensor_param(self, *arguments: Any, **options: Any) -> tuple[Iterator[tuple[str, torch.Tensor]], Any]:
        """(iterator of (name, tensor), None): with `served_build` of weights and scales, equal to that build's files.

        Files of the checkpoint in the dtype in which the policy computes, `mixed_precision.param_dtype`; verl itself
        saves masters, so a build of its checkpoint differs where BF16 rounds. Collective: all ranks iterate, to the
        end. Names, memory and errors as `ornith_moe.sync.served_weights`.
        """
        if self.served_build is None:
            return super().get_per_tensor_param(*arguments, **options)
        # masters are rounded as the forward pass rounds them, which in fp32 it does not
        saved_as = None if self._autocast_dtype == torch.float32 else self._autocast_dtype
        return self._served(plan_sync(self.module, self.served_build, saved_as=saved_as)), None

    def _served(self, sync: Sync) -> Iterator[tuple[str, torch.Tensor]]:
        if self.is_param_offload_enabled:
            self.to(get_device_name(), model=True, optimizer=False, grad=False)
        try:
            yield from named_tensors(sync)
        finally:
            if self.is_param_offload_enabled:
                self.to("cpu", model=True, optimizer=False, grad=False)

    def get_per_tensor_param_shard(self, **options: Any) -> Any:
        """verl's, for its delta checkpoint engines.

        Raises:
            NotImplementedError: with `served_build`: their deltas are of BF16, and would be added to FP8.
        """
        if self.served_build is not None:
            raise NotImplementedError(
                f"{SERVED_BUILD}: delta checkpoint engines send BF16; choose another backend, or leave it out"
            )
        return super().get_per_tensor_param_shard(**options)
