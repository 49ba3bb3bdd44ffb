"""`python -m benchmarks`: whole optimizer steps of mainrun against the equal PyTorch step.

On a shared machine seconds lie: it slows down two or three times for tens of seconds. Ratios
within one round lie much less. So each contestant is one process that stays, one of them computes
at a time, they take turns in an order shuffled anew each round, and what is reported is the median
over the rounds of each round's ratio. A contestant that does not learn what the reference learns
from the same tokens is refused, however fast it is.
"""
