"""SparseK attention: the newest keys, and the few of the rest that a learned score selects.

Lou et al. 2024 (arXiv:2406.16747). A key farther back than the window is a candidate; of a query's
candidates the `num_selected` with the largest scores are seen, key and value multiplied by the gate
that `sparsek` gives them. Selection and gates are those of the query's own prefix, so nothing later
is ever looked at. Projections and scores are made elsewhere.
"""
# ruff: noqa: F401 - the names that the rest of the package uses

from mainrun.model.sparsek.attention import attend, decode
from mainrun.model.sparsek.gates import sparsek
