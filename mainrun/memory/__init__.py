"""What a training step needs of the device's memory, by part and by the compiler's count."""

from mainrun.memory.compiled import check_fits, executable_bytes, fits, gibibytes
from mainrun.memory.peak import Estimate, estimate
from mainrun.memory.report import Report, as_dict, by_part, examine, table
from mainrun.memory.settle import settled

__all__ = [
    "Estimate", "Report", "as_dict", "by_part", "check_fits", "estimate", "examine",
    "executable_bytes", "fits", "gibibytes", "settled", "table",
]  # fmt: skip
