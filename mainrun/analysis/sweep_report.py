"""The report of a sweep: its best trials, what each setting did, what failed, what it took."""

import itertools
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from mainrun.analysis import ablation, ablation_plots, sweep_plots
from mainrun.analysis.ablation import Panel
from mainrun.analysis.document import (
    Block,
    Code,
    Details,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Strong,
    Table,
    Text,
    facts,
)
from mainrun.analysis.importance import caveat, importances
from mainrun.analysis.quantities import bytes_text, loss, number, setting, settings_text
from mainrun.analysis.trials import Parameter, Sweep, Trial
from mainrun.summary import duration

_SHOWN_TRIALS = 15
_BEST_SHARE = 0.1


def report(sweep: Sweep) -> Document:
    shares = importances(sweep)
    blocks = itertools.chain(
        _headline(sweep),
        _best_trials(sweep),
        _facts(sweep),
        _settings(sweep, shares),
        _importance(sweep, shares),
        _ablation(sweep),
        _failures(sweep),
        _all_trials(sweep),
        _commands(sweep),
    )
    return Document(f"{sweep.name}: {sweep.status}", tuple(blocks))


def _headline(sweep: Sweep) -> Iterator[Block]:
    metric = sweep.space.metric
    if reason := sweep.told.get("reason"):
        yield Paragraph((Strong("Reason:"), f" {reason}"))
    ranked = sweep.ranking()
    if not ranked:
        yield Paragraph("No trial has come to its end with a value of the metric.")
        return
    word = "lowest" if metric.goal == "minimize" else "highest"
    best = ranked[0]
    yield Paragraph(
        (Code(metric.name), " ", Strong(loss(best.value, best.stderr)),
         f" in trial {best.number}, the {word} of {len(ranked)}: ",
         Code(settings_text({p.name: best.values[p.name] for p in sweep.parameters})))
    )  # fmt: skip
    if len(ranked) > 1 and best.stderr and best.value is not None and ranked[1].value is not None:
        close = [t for t in ranked[1:] if abs((t.value or 0.0) - best.value) < 2 * best.stderr]
        if close:
            yield Paragraph(
                f"{len(close)} more within two standard errors of its evaluation: which of these "
                "is best, one seed each does not say."
            )


def _best_trials(sweep: Sweep) -> Iterator[Block]:
    ranked = sweep.ranking()
    drawn = sweep_plots.best_so_far(sweep)
    if ranked:
        yield Heading("Best trials")
        yield _table(sweep, ranked[:_SHOWN_TRIALS])
    if drawn:
        yield drawn


def _table(sweep: Sweep, trials: Sequence[Trial], *, told: bool = False) -> Table:
    """With `told`, also what became of them."""
    header: list[Text] = ["trial", *(["status"] if told else []), sweep.space.metric.name,
                          "at step", *(Code(p.name) for p in sweep.parameters), "time"]  # fmt: skip
    rows: list[list[Text]] = []
    for trial in trials:
        value = "" if trial.value is None else loss(trial.value, trial.stderr)
        rows.append(
            [
                f"{trial.number}", *([trial.status] if told else []), value,
                "" if trial.step is None else f"{trial.step:,}",
                *(setting(trial.values[p.name]) for p in sweep.parameters),
                "" if trial.seconds is None else duration(trial.seconds),
            ]
        )  # fmt: skip
    return Table(header, rows)


def _facts(sweep: Sweep) -> Iterator[Block]:
    counts = Counter(trial.status for trial in sweep.trials)
    wanted = (sweep.told.get("trials") or {}).get("wanted")
    seconds = sum(trial.seconds or 0.0 for trial in sweep.trials)
    spans = [span for trial in sweep.trials if trial.run and (span := trial.run.span())]
    elapsed = 0.0
    if spans:
        elapsed = (max(end for _, end in spans) - min(begin for begin, _ in spans)).total_seconds()
    address = (sweep.told.get("wandb") or {}).get("url")
    told = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    yield Heading("Facts")
    yield facts(
        [
            ("sweep folder", Code(str(sweep.folder))),
            ("search", f"{sweep.space.method} over {len(sweep.parameters)} settings"),
            ("trials", (told or "none yet") + (f"; {wanted:,} wanted" if wanted else "")),
            ("time in all trials", duration(seconds)),
            ("from the first to the last event", duration(elapsed) if spans else ""),
            ("trials per hour", f"{3600 * len(spans) / elapsed:,.1f}" if elapsed > 0 else ""),
            ("Weights & Biases", Link(str(address)) if address else ""),
        ]
    )


def _settings(sweep: Sweep, shares: dict[str, float]) -> Iterator[Block]:
    order = [*shares, *(p.name for p in sweep.parameters if p.name not in shares)]
    by_name = {parameter.name: parameter for parameter in sweep.parameters}
    drawn = [
        picture
        for place, name in enumerate(order, start=1)
        if (picture := sweep_plots.against_setting(sweep, by_name[name], f"setting_{place}"))
    ]
    if not drawn:
        return
    yield Heading("Metric by setting")
    yield from drawn
    together = sweep_plots.parallel(sweep, order)
    if together:
        yield Heading("Parallel coordinates")
        yield together


def _importance(sweep: Sweep, shares: dict[str, float]) -> Iterator[Block]:
    ranked = sweep.ranking()
    if not ranked:
        return
    yield Heading("Importance")
    if not shares:
        yield Paragraph(
            f"{len(ranked)} finished trials are too few to tell which settings mattered."
        )
        return
    drawn = sweep_plots.importance(shares)
    if drawn:
        yield drawn
    by_name = {parameter.name: parameter for parameter in sweep.parameters}
    best = ranked[: max(5, round(_BEST_SHARE * len(ranked)))]
    yield Table(
        ["setting", "share", "in the best trial", f"in the best {len(best)}"],
        [[Code(name), f"{100 * share:.0f} %", setting(ranked[0].values[name]),
          _range(by_name[name], best)] for name, share in shares.items()],
    )  # fmt: skip
    yield Paragraph(caveat(sweep))


def _range(parameter: Parameter, trials: Sequence[Trial]) -> str:
    values = [trial.values[parameter.name] for trial in trials]
    if parameter.is_numeric:
        low, high = min(values), max(values)
        return number(low) if low == high else f"{number(low)} to {number(high)}"
    counts = Counter(setting(value) for value in values)
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common(5))


def _ablation(sweep: Sweep) -> Iterator[Block]:
    found = ablation.panels(sweep)
    if not found:
        return
    metric = sweep.space.metric.name
    drawn = [ablation_plots.curves(panel, metric) for panel in found]
    remembered = ablation.memory(found)
    if remembered:
        drawn.append(ablation_plots.memory(remembered))
    yield Heading("Ablations")
    yield Paragraph(
        "Medians of the finished trials of each choice, up to the step that all of them reached; "
        "shaded is their middle half. Other settings differ between them too."
    )
    yield from [picture for picture in drawn if picture is not None]
    yield Table(
        ["choice", "", "trials", f"median {metric}", "middle half", "best", "mean peak memory"],
        [row for panel in found for row in _level_rows(sweep, panel)],
    )


def _level_rows(sweep: Sweep, panel: Panel) -> Iterator[list[Text]]:
    value_of = {id(trial.run): trial.value for trial in sweep.trials if trial.is_finished}
    choose = min if sweep.space.metric.goal == "minimize" else max
    for level, runs in panel.levels.items():
        values = [value for run in runs if (value := value_of.get(id(run))) is not None]
        sizes = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        yield [
            panel.name, level, f"{len(values)}", f"{statistics.median(values):.4f}",
            _middle_half(values), f"{choose(values):.4f}",
            bytes_text(statistics.fmean(sizes)) if sizes else "",
        ]  # fmt: skip


def _middle_half(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{lower:.4f} to {upper:.4f}"


def _failures(sweep: Sweep) -> Iterator[Block]:
    failed = [t for t in sweep.trials if t.reason or t.status in ("failed", "refused")]
    if not failed:
        return
    yield Heading("Trials without a result")
    rows: list[list[Text]] = [
        [f"{t.number}", t.status, "" if t.value is None else loss(t.value),
         Code(settings_text({p.name: t.values[p.name] for p in sweep.parameters})), t.reason]
        for t in failed
    ]  # fmt: skip
    yield Table(["trial", "status", "value so far", "settings", "reason"], rows)


def _all_trials(sweep: Sweep) -> Iterator[Block]:
    if sweep.trials:
        table = _table(sweep, sweep.trials, told=True)
        yield Details(f"All trials ({len(sweep.trials):,})", (table,))
    try:
        text = (sweep.folder / "sweep.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield Details("The search (sweep.yaml)", (Listing(text.rstrip("\n"), "yaml"),))


def _commands(sweep: Sweep) -> Iterator[Block]:
    lines = []
    if sweep.told.get("resume_command"):
        lines.append(f"{sweep.told['resume_command']}  # go on")
    if (sweep.folder / "best.yaml").is_file():
        again = shlex.join(["mainrun", "train", str(sweep.folder / "best.yaml")])
        lines.append(f"{again}  # train the best again")
    ranked = sweep.ranking()
    if ranked and ranked[0].folder is not None:
        lines.append(shlex.join(["mainrun", "generate", str(ranked[0].folder)]))
    if lines:
        yield Heading("Commands")
        yield Listing("\n".join(lines), "sh")
