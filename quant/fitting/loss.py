"""What a model loses by noise in its tensors, in nats per token: KL(source || build), predicted.

    KL = HEAD * x_head + noise^EXPONENT        noise = sum over the other tensors of weight * x
    x = error / energy of a tensor in its type (sensitivity.py); of a layer, weight = LAYER[kind] / layers

Noise of different tensors adds up: it is independent, and small. After the head nothing follows but a softmax, and KL
is quadratic in a perturbation, so linear in x. Before it stand routers, whose experts flip at once however small the
noise that moves a token over the edge, so KL falls slower than noise does.

The figures are measured: one kind of tensor of all layers of a trained model (demo/nano.py, 200 steps) in Q3_K, Q2_K
and IQ4_XS, all else as it was, 1,792 held-out positions. HEAD was 0.17, 0.19 and 0.18 in these; a kind's weight is the
geometric mean of (KL^(1/EXPONENT) / x). With an EXPONENT of 3/4 the sum gives the KL of all kinds together within 9 %
in each of the three (0.0098 | 0.0091, 0.0290 | 0.0318, 0.0033 | 0.0034).

A sensitivity with `effects` (ornith_moe/effects.py) has KL measured of this very model: the weight of each tensor is
then KL^(1/EXPONENT) over the sum of x of the tensors that were changed together, geometric mean over the types tried,
and of the head KL over x. Tensors without an effect (an MTP layer) keep the constants, times what measured weights are
of theirs on average. The figures below are the default where nothing was measured.

What carries over to other models is the order: which kinds matter, and that a layer of many matters less than one of
few. KL itself does not: a model that is trained longer, or is dense, loses another multiple. So read a prediction
beside those of the named mixes of the same model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ornith_moe.quant.fitting.sensitivity import Sensitivity
from ornith_moe.quant.fitting.types import PLAIN, standing
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD

HEAD_WEIGHT, EXPONENT = 0.18, 0.75
EMBEDDING_WEIGHT = 0.019
LAYER_WEIGHTS = {  # of a kind in all layers, if all have it
    "attn_qkv": 0.0076, "attn_gate": 0.0047, "ssm_out": 0.0098, "ssm_beta": 0.0005, "ssm_alpha": 0.0001,
    "attn_q": 0.0009, "attn_k": 0.0009, "attn_v": 0.0029, "attn_output": 0.0022,
    "ffn_gate_exps": 0.0028, "ffn_up_exps": 0.0027, "ffn_down_exps": 0.0093,
    "ffn_gate_shexp": 0.0028, "ffn_up_shexp": 0.0024, "ffn_down_shexp": 0.0055,
}  # fmt: skip
# of a dense model, whose one stands for experts and shared expert, whose noise adds up
LAYER_WEIGHTS |= {
    kind: LAYER_WEIGHTS[f"{kind}_exps"] + LAYER_WEIGHTS[f"{kind}_shexp"] for kind in ("ffn_gate", "ffn_up", "ffn_down")
}
OTHER = 0.005  # kinds that nobody has measured


def kind_of(name: str) -> str:
    """What a tensor is, whatever its layer."""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


@dataclass(frozen=True)
class Loss:
    """KL as a sum over the head and a power of the sum over the rest, for the tensors of a sensitivity."""

    sensitivity: Sensitivity
    layers: int

    @cached_property
    def _measured(self) -> dict[str, float]:
        """Weights of the tensors whose effect on KL was measured; a tied embedding has all of its effect as a head."""
        found: dict[str, list[float]] = {}
        for effect in self.sensitivity.effects:
            power = 1.0 if self.head in effect.tensors else 1 / EXPONENT
            noise = sum(self._share(name, self._stands_for(name, effect.type)) for name in effect.tensors)
            for name in effect.tensors if noise > 0 and effect.kl > 0 else ():
                found.setdefault(name, []).append(effect.kl**power / noise)
        return {name: math.exp(sum(map(math.log, weights)) / len(weights)) for name, weights in found.items()}

    @cached_property
    def _unit(self) -> float:
        """Measured weights over the constants: what those of tensors that were not measured are multiplied with."""
        ratios = [math.log(w / self._constant(name)) for name, w in self._measured.items() if name != self.head]
        return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0

    def _stands_for(self, name: str, kind: str) -> str:
        return standing(kind, self.sensitivity.by_name[name].shape[-1])

    @property
    def head(self) -> str:
        """The tensor that is multiplied last: the embedding where the two are tied."""
        return HEAD if HEAD in self.sensitivity.by_name else EMBEDDING

    def weight(self, name: str) -> float:
        """Noise of a tensor that is noise and nothing else."""
        if name in self._measured:
            return 0.0 if name == self.head else self._measured[name]
        return self._unit * self._constant(name)

    def _constant(self, name: str) -> float:
        if name == EMBEDDING:
            return EMBEDDING_WEIGHT
        return LAYER_WEIGHTS.get(kind_of(name), OTHER) / max(self.layers, 1)

    def noise(self, name: str, kind: str) -> float:
        """What tensor `name` adds in type `kind`; nothing in one that holds it as it was."""
        return self.weight(name) * self._share(name, kind)

    def of_head(self, kind: str) -> float:
        """KL of the head in type `kind`."""
        return self._measured.get(self.head, HEAD_WEIGHT) * self._share(self.head, kind)

    def _share(self, name: str, kind: str) -> float:
        return 0.0 if kind in PLAIN else self.sensitivity.by_name[name].relative(kind)

    def kl(self, types: Mapping[str, str]) -> float | None:
        """Of a model whose tensors have these types; None if one is of a type that was not measured."""
        of_rest = head = 0.0
        for tensor in self.sensitivity.tensors:
            kind = types.get(tensor.name, "F32")
            if kind not in (*PLAIN, *tensor.errors):
                return None
            if tensor.name == self.head:
                head = self.of_head(kind)
            if tensor.name != HEAD:  # a tied embedding is both
                of_rest += self.noise(tensor.name, kind)
        return head + of_rest**EXPONENT
