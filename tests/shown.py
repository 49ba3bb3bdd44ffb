"""Which cases of a test `task test` runs, and which `task test-all` alone."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest


def shown(names: str, cases: Mapping[str, Any], is_shown: Callable[[str], bool]) -> Any:
    """Parametrises by these cases; those that are not shown are slow.

    `names` are the test's arguments, as pytest takes them; of several, a case is a tuple.
    """
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(case if "," in names else (case,)),
                id=name,
                marks=[] if is_shown(name) else [pytest.mark.slow],
            )
            for name, case in cases.items()
        ],
    )
