"""Weight sync: the bytes of a build, from a live policy straight to an engine.

served.py    served_weights, plan_sync: Served(name, tensor, scale, scale_name) per weight
policy.py    which tensor of a model holds which weight of its checkpoint
held.py      gathering: FSDP2, tensor and expert parallelism
engines.py   vLLM, SGLang, a callback
check.py     whether a build on disk is this policy
"""

from ornith_moe.sync.served import Served, Sync, named_tensors, plan_sync, served_weights

__all__ = ["Served", "Sync", "named_tensors", "plan_sync", "served_weights"]
