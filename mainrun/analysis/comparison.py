"""The report of several runs: what they came to, in what they differ, and whether by chance."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mainrun import config
from mainrun.analysis import comparison_plots, significance
from mainrun.analysis.document import (
    Block,
    Code,
    Document,
    Heading,
    Paragraph,
    Strong,
    Table,
    Text,
)
from mainrun.analysis.figures import COLORS
from mainrun.analysis.quantities import bytes_text, loss, number, probability, setting
from mainrun.analysis.run_folder import Run
from mainrun.analysis.run_report import same
from mainrun.analysis.significance import CONFIDENCE, Group, Welch
from mainrun.summary import duration

_ABSENT = "—"
_MOST_SETTINGS = 40


def report(runs: Sequence[Run]) -> Document:
    groups = significance.groups(runs)
    names = group_names(groups)
    blocks = itertools.chain(
        _headline(runs, groups, names),
        _runs(runs),
        _curves(groups, names),
        _differences(runs),
        _groups(groups, names),
        _tests(groups, names),
        _single(runs, groups, names),
    )
    return Document(f"{len(runs)} runs compared", tuple(blocks))


def group_names(groups: Sequence[Group]) -> list[str]:
    """What the runs of a group share: its run's name alone, else what no other group has."""
    telling = _telling(groups)
    names = []
    for group in groups:
        if len(group.runs) + len(group.left_out) == 1:
            names.append(group.runs[0].name)
            continue
        values = [f"{path.rpartition('.')[2]}={setting(group.runs[0].settings.get(path))}"
                  for path in telling]  # fmt: skip
        names.append(" ".join(values) or f"{group.runs[0].name} and others")
    repeated = {name for name in names if names.count(name) > 1}
    return [
        f"{name} ({place})" if name in repeated else name
        for place, name in enumerate(names, start=1)
    ]


def _telling(groups: Sequence[Group]) -> list[str]:
    """Few settings by which each group is known from every other."""
    firsts = [group.runs[0] for group in groups]
    chosen: list[str] = []
    known = 1
    for path in filter(config.is_effect, _varied(firsts)):
        found = {tuple(_value(run, p) for p in (*chosen, path)) for run in firsts}
        if len(found) > known:
            chosen, known = [*chosen, path], len(found)
    return chosen


def _headline(
    runs: Sequence[Run], groups: Sequence[Group], names: Sequence[str]
) -> Iterator[Block]:
    finished = [run for run in runs if significance.result(run) is not None]
    if finished:
        best = min(finished, key=lambda run: significance.result(run) or math.inf)
        assert best.best is not None
        value = Strong(loss(best.best["value"], best.best["stderr"]))
        yield Paragraph((Code("val/loss"), " ", value, f" is the lowest, of {best.name}."))
    else:
        yield Paragraph("None of these runs came to its end with an evaluation.")
    seeds = sum(len(group.losses) for group in groups)
    yield Paragraph(
        f"{len(runs)} runs, {len(finished)} of them finished; {len(groups)} different configs, "
        f"{seeds} seeds of them in all. Losses are the best val/loss of a run, in nats per "
        "character of the validation text."
    )
    prints = {run.environment.get("data_fingerprint") for run in runs} - {None}
    if len(prints) > 1:
        yield Paragraph(
            (Strong("The data differ. "), _data_note(groups),)
        )  # fmt: skip


def _data_note(groups: Sequence[Group]) -> str:
    if any(len(_fingerprints(group)) > 1 for group in groups):
        return (
            "A seed also draws the documents and their split into training and validation text: "
            "the spread over seeds includes the text's."
        )
    return (
        "The fingerprints of the runs' data are not the same: part of a difference is the text's."
    )


def _fingerprints(group: Group) -> set[Any]:
    return {run.environment.get("data_fingerprint") for run in group.runs}


def _runs(runs: Sequence[Run]) -> Iterator[Block]:
    rows = [
        [
            run.name, run.status, _point(run.best), _at(run.best), _point(run.last),
            setting(run.settings.get("seed")), number(run.result["parameters"]),
            number(run.result["tokens_seen"]), duration(run.result["training_seconds"]),
            number(run.result["tokens_per_second"]), bytes_text(run.peak_bytes),
        ]
        for run in sorted(runs, key=_rank)
    ]  # fmt: skip
    header = ["run", "status", "best val/loss", "at step", "last val/loss", "seed", "parameters",
              "tokens seen", "training", "tokens/s", "peak memory"]  # fmt: skip
    yield Heading("Runs")
    yield Table(header, rows)
    yield Paragraph(
        "± is the standard error of the evaluation: how much the loss would move on another "
        "validation text of this size. It does not know what another seed would do."
    )


def _rank(run: Run) -> float:
    value = run.best["value"] if run.best else None
    return math.inf if value is None else float(value)


def _point(point: Any) -> str:
    return "" if point is None else loss(point["value"], point["stderr"])


def _at(point: Any) -> str:
    return "" if point is None else f"{point['step']:,}"


def _curves(groups: Sequence[Group], names: Sequence[str]) -> Iterator[Block]:
    drawn = comparison_plots.curves(groups, names)
    if drawn:
        yield Heading("Curves")
        if len(groups) > len(COLORS):
            yield Paragraph("The best groups have colours; all others are grey.")
        yield from drawn
    summary = comparison_plots.results(groups, names)
    if summary:
        yield summary


def _differences(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("Settings that differ")
    varied = _varied(runs)
    if not varied:
        yield Paragraph("None.")
        return
    if unknown := [run.name for run in runs if not run.settings]:
        yield Paragraph(f"The config cannot be read of: {', '.join(unknown)}.")
    shown = varied[:_MOST_SETTINGS]
    if len(shown) < len(varied):
        yield Paragraph(f"The first {len(shown)} of {len(varied)}.")
    cells = [[_value(run, path) for path in shown] for run in runs]
    if len(runs) > len(shown):  # the longer side goes down the page, where there is room
        header: list[Text] = ["run", *(Code(path) for path in shown)]
        yield Table(header, [[run.name, *row] for run, row in zip(runs, cells, strict=True)])
    else:
        by_setting = zip(*cells, strict=True)
        rows = [[Code(path), *row] for path, row in zip(shown, by_setting, strict=True)]
        yield Table(["setting", *(run.name for run in runs)], rows)


def _varied(runs: Sequence[Run]) -> list[str]:
    """The paths whose values are not the same in all runs."""
    known = [run.settings for run in runs if run.settings]
    paths = dict.fromkeys(path for settings in known for path in settings)
    missing = object()
    return [
        path
        for path in paths
        if not all(same(s.get(path, missing), known[0].get(path, missing)) for s in known)
    ]


def _value(run: Run, path: str) -> str:
    return setting(run.settings[path]) if path in run.settings else _ABSENT


def _groups(groups: Sequence[Group], names: Sequence[str]) -> Iterator[Block]:
    if all(len(group.runs) + len(group.left_out) == 1 for group in groups):
        return
    yield Heading("Groups")
    yield Paragraph("Runs whose settings are equal but for the seed and what moves no number.")
    rows = []
    for group, name in zip(groups, names, strict=True):
        seeds = len(group.losses)
        error = group.deviation / math.sqrt(seeds) if group.deviation is not None else None
        rows.append(
            [
                name, ", ".join(run.name for run in group.runs), f"{seeds}",
                "" if group.mean is None else f"{group.mean:.4f}",
                "" if group.deviation is None else f"{group.deviation:.4f}",
                "" if error is None else f"{error:.4f}",
                ", ".join(run.name for run in group.left_out),
            ]
        )  # fmt: skip
    yield Table(
        ["group", "runs", "seeds", "mean", "deviation of seeds", "standard error of the mean",
         "left out"], rows,
    )  # fmt: skip
    if any(group.left_out for group in groups):
        yield Paragraph("Left out: runs that repeat a seed of their group. They are no new sample.")


def _tests(groups: Sequence[Group], names: Sequence[str]) -> Iterator[Block]:
    compared = significance.pairs(groups)
    if not compared:
        return
    rows = []
    for pair in sorted(compared, key=lambda pair: pair.test.p if pair.test else 1.0):
        pair_names = [names[pair.second], names[pair.first]]
        if pair.test is None:
            rows.append([*pair_names, "no spread in either group: their runs are identical",
                         *[""] * 5])  # fmt: skip
        else:
            rows.append([*pair_names, *_test_cells(pair.test)])
    yield Heading("Beyond chance?")
    interval = f"{CONFIDENCE:.0%} interval".replace("%", " %")
    yield Table(
        ["group", "less group", "difference", interval, "t", "degrees of freedom", "p",
         "p, corrected"], rows,
    )  # fmt: skip
    number_of = f"{len(compared)} pairs" if len(compared) > 1 else "one pair"
    yield Paragraph(
        "Welch's t-test over seeds, two-sided, degrees of freedom by Satterthwaite; p corrected "
        f"by Holm over {number_of}. Negative: the first group's loss is lower. With two or three "
        "seeds only large differences can show, and a large p is no proof of equality."
    )


def _test_cells(test: Welch) -> list[str]:
    return [
        f"{test.difference:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", f"{test.t:.2f}",
        f"{test.degrees_of_freedom:.1f}", probability(test.p), probability(test.corrected_p),
    ]  # fmt: skip


def _single(runs: Sequence[Run], groups: Sequence[Group], names: Sequence[str]) -> Iterator[Block]:
    """Groups of one seed, against the best of them: all that can be said without seeds."""
    alone = [(next(r for r in g.runs if significance.result(r) is not None), n)
             for g, n in zip(groups, names, strict=True) if len(g.losses) == 1]  # fmt: skip
    if not alone or len([group for group in groups if group.losses]) < 2:
        return
    yield Heading("One seed only")
    yield Paragraph(
        "No test is possible here: what another seed would have done is unknown, and it is often "
        "more than small differences between configs. Train each config with two more seeds at "
        "least (seed=1, seed=2) and compare again."
    )
    if len(alone) < 2:
        yield Paragraph(f"This is so of {alone[0][1]}.")
        return
    alone.sort(key=lambda pair: significance.result(pair[0]) or math.inf)
    best, best_name = alone[0]
    rows = [[name, *_difference(run, best)] for run, name in alone[1:]]
    yield Table(["run", f"difference to {best_name}", "± of both evaluations", "data"], rows)
    yield Paragraph(
        "± adds the squares of the two standard errors, as if they were independent. On the same "
        "validation text they are not: what is hard for one model is mostly hard for the other, "
        "and the difference is known better than this. On different texts it is right."
    )


def _difference(run: Run, best: Run) -> list[str]:
    assert run.best is not None
    assert best.best is not None
    errors = [point["stderr"] for point in (run.best, best.best)]
    both = None if None in errors else math.hypot(*errors)
    prints = [r.environment.get("data_fingerprint") for r in (run, best)]
    data = "unknown" if None in prints else ("the same" if prints[0] == prints[1] else "different")
    return [
        f"{run.best['value'] - best.best['value']:+.4f}",
        "" if both is None else f"{both:.4f}",
        data,
    ]
