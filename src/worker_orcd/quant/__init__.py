"""Weight formats, one file each: layout and numpy reference. No torch."""

from worker_orcd.quant.bf16 import BF16
from worker_orcd.quant.f16 import F16
from worker_orcd.quant.f32 import F32
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.iq4_nl import IQ4_NL
from worker_orcd.quant.mxfp4 import MXFP4
from worker_orcd.quant.q2_k import Q2_K
from worker_orcd.quant.q3_k import Q3_K
from worker_orcd.quant.q4_0 import Q4_0
from worker_orcd.quant.q4_1 import Q4_1
from worker_orcd.quant.q4_k import Q4_K
from worker_orcd.quant.q5_0 import Q5_0
from worker_orcd.quant.q5_1 import Q5_1
from worker_orcd.quant.q5_k import Q5_K
from worker_orcd.quant.q6_k import Q6_K
from worker_orcd.quant.q8_0 import Q8_0

# The one list of what we can execute. A new format is one file and one line here.
ALL: tuple[WeightFormat, ...] = (
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    MXFP4,
)

FORMATS: dict[int, WeightFormat] = {f.ggml_type: f for f in ALL}  # by ggml type id
BY_NAME: dict[str, WeightFormat] = {f.name: f for f in ALL}

__all__ = ["ALL", "BY_NAME", "FORMATS", "WeightFormat"]
