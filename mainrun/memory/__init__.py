"""What a training step needs of the device's memory, by part and by the compiler's count."""

from mainrun.memory.advice import check_fits, check_possible, explained
from mainrun.memory.cards import CARDS, Card, named
from mainrun.memory.compiled import executable_bytes, fits, gibibytes
from mainrun.memory.peak import Estimate, estimate
from mainrun.memory.report import Report, as_dict, by_part, examine, table
from mainrun.memory.settle import settled
from mainrun.memory.target import Target

__all__ = [
    "CARDS", "Card", "Estimate", "Report", "Target", "as_dict", "by_part", "check_fits",
    "check_possible", "estimate", "examine", "executable_bytes", "explained", "fits", "gibibytes",
    "named", "settled", "table",
]  # fmt: skip
