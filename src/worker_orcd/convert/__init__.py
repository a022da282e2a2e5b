"""From one GGUF file to another: the same model in other weight formats."""

from worker_orcd.convert.rewrite import PlannedTensor, plan, requantize, tensor_bytes

__all__ = ["PlannedTensor", "plan", "requantize", "tensor_bytes"]
