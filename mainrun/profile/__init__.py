"""Where the time of a training step goes: its parts, utilisation, a trace, configs side by side."""

from mainrun.profile.compare import Row, as_rows, compare, comparison, variants
from mainrun.profile.output import default_folder, opened, write
from mainrun.profile.report import as_dict, table
from mainrun.profile.timing import Chosen, Measured, measure

__all__ = [
    "Chosen", "Measured", "Row", "as_dict", "as_rows", "compare", "comparison", "default_folder",
    "measure", "opened", "table", "variants", "write",
]  # fmt: skip
