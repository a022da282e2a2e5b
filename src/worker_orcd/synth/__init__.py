"""Files of random weights in the true shapes and formats of known models, to measure and test with."""

from worker_orcd.synth.shapes import ARCHITECTURES, SHAPES, Shape, shape_named, shapes_of
from worker_orcd.synth.write import PlannedTensor, plan, tensor_bytes, write_model

__all__ = [
    "ARCHITECTURES",
    "SHAPES",
    "PlannedTensor",
    "Shape",
    "plan",
    "shape_named",
    "shapes_of",
    "tensor_bytes",
    "write_model",
]
