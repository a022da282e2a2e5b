"""Weight formats, one file each: layout and numpy reference. No torch."""

from worker_orcd.quant.format import WeightFormat

# The one list of what we can execute. A new format is one file and one line here.
ALL: tuple[WeightFormat, ...] = ()

FORMATS: dict[int, WeightFormat] = {f.ggml_type: f for f in ALL}  # by ggml type id
BY_NAME: dict[str, WeightFormat] = {f.name: f for f in ALL}

__all__ = ["ALL", "BY_NAME", "FORMATS", "WeightFormat"]
