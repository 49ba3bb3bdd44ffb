"""W&B's early termination: its bands, as `sweeps` 0.3.0, W&B's own, has them; and bad input."""

import pytest

from mainrun.errors import UserError
from mainrun.sweep import hyperband


def test_bands_are_those_of_wandb(subtests: pytest.Subtests) -> None:
    cases = [  # recorded from `sweeps.stop_runs`, as are the four hundred that were compared once
        ({"min_iter": 3}, (3, 9, 27, 81)),
        ({"min_iter": 1, "eta": 2}, (1, 2, 4, 8)),
        ({"min_iter": 3, "eta": 1.5}, (3, 4, 6, 10)),
        ({"min_iter": 1, "eta": 1.5}, (1, 2, 3, 5)),
        ({"max_iter": 81, "s": 3}, (3, 9, 27)),
        ({"max_iter": 18, "s": 2, "eta": 3}, (2, 6)),
        ({"max_iter": 243, "s": 5}, (1, 3, 9, 27, 81)),
        ({"max_iter": 20, "s": 9}, (2, 6)),
        ({"max_iter": 5, "s": 2, "eta": 2}, (1, 2)),
    ]
    for spec, bands in cases:
        with subtests.test(spec=spec, bands=bands):
            found = hyperband.read({"type": "hyperband", **spec}, "x.yaml:1")
            assert found is not None
            assert found.bands[:4] == bands[:4]
            if "max_iter" in spec:
                assert found.bands == bands
            assert (found.min_iter, found.eta, found.strict) == (bands[0], spec.get("eta", 3), True)


def test_a_sweep_without_it_has_none() -> None:
    assert hyperband.read(None, "x.yaml:1") is None


def test_what_is_no_hyperband_is_refused_with_its_place(subtests: pytest.Subtests) -> None:
    cases = [
        ("hyperband", "`early_terminate` is a mapping, such as {type: hyperband, min_iter: 3}"),
        ({}, "early_terminate.type=None: accepted is hyperband"),
        ({"type": "median", "min_iter": 1}, "early_terminate.type='median': accepted is hyperband"),
        ({"type": "hyperband"}, "has either min_iter, or max_iter and s"),
        ({"type": "hyperband", "min_iter": 1, "max_iter": 9, "s": 2}, "has either min_iter, or"),
        ({"type": "hyperband", "min_iter": 1, "s": 2}, "s goes with max_iter, not with min_iter"),
        ({"type": "hyperband", "max_iter": 9}, "max_iter needs `s`, the number of bands below it"),
        ({"type": "hyperband", "max_iter": 2, "s": 1}, "max_iter=2: the first band below it"),
        ({"type": "hyperband", "min_iter": 0}, "min_iter=0: a whole number above 0 is expected"),
        ({"type": "hyperband", "min_iter": 1.5}, "min_iter=1.5: a whole number above 0"),
        ({"type": "hyperband", "min_iter": True}, "min_iter=True: a whole number above 0"),
        ({"type": "hyperband", "max_iter": 9, "s": 0}, "s=0: a whole number above 0 is expected"),
        ({"type": "hyperband", "min_iter": 1, "eta": 1}, "eta=1: a number above 1 is expected"),
        ({"type": "hyperband", "min_iter": 1, "eta": "3"}, "eta='3': a number above 1"),
        ({"type": "hyperband", "min_iter": 1, "strict": 1}, "strict=1: true or false is expected"),
        ({"type": "hyperband", "miniter": 1}, "unknown key `miniter`; did you mean `min_iter`?"),
    ]
    for spec, said in cases:
        with subtests.test(spec=spec):
            with pytest.raises(UserError) as caught:
                hyperband.read(spec, "x.yaml:7")
            assert str(caught.value).startswith("x.yaml:7: ")
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
