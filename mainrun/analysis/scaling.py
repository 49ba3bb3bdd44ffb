"""The report of a scaling study: what its runs say of size, tokens and compute, and how surely.

`report` reads run folders and sweep folders and writes one HTML page, Markdown beside it. Every
number has its interval; a law that the runs do not determine is said to be missing, and why.
"""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from mainrun.analysis import document_files, scaling_fits, scaling_plot, scaling_runs
from mainrun.analysis.document import (
    Block,
    Details,
    Document,
    Heading,
    Paragraph,
    Table,
    Text,
)
from mainrun.analysis.scaling_fits import Estimate, Fits, Frontier, Joint
from mainrun.analysis.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN
from mainrun.analysis.scaling_runs import Found, Run

_KAPLAN = {"N": "eq. 1.1", "D": "eq. 1.2", "C": "eq. 1.3"}
_WORDS = {"N": "a larger model", "D": "more tokens", "C": "more compute"}
_BEYOND = (1, 10, 100)  # times the most compute that was trained
_MANY_EPOCHS = 4.0
"""Up to which repeated tokens were worth nearly as much as new ones in Muennighoff et al. 2023."""


def report(folders: Sequence[Path], output: Path | None) -> Path:
    """The HTML file: `output`, or `scaling.html` in the first folder.

    Raises UserError where the folders hold too few runs for any law, or runs that do not compare.
    """
    path = output or folders[0] / "scaling.html"
    document_files.check(path)
    return document_files.write(document(scaling_runs.read(folders), _title(folders)), path)


def document(found: Found, title: str) -> Document:
    """The report, not yet a page."""
    fits = scaling_fits.fit(found.runs)
    blocks: list[Block] = [Paragraph(_summary(found.runs))]
    blocks += [Paragraph(text) for text in _warnings(found.runs)]
    if fits.frontiers:
        blocks += _frontiers(fits.frontiers, found.runs)
    if fits.joint is not None:
        blocks += _joint(fits.joint, found.runs)
    blocks += [Paragraph(f"{name} is not fitted: it {why}.") for name, why in fits.missing]
    blocks.append(Details("How this was computed", [Paragraph(text) for text in _method(fits)]))
    blocks.append(Details("All runs", [_runs(found.runs)]))
    if found.left_out:
        blocks.append(Details("Left out", [Table(("run", "why"), found.left_out)]))
    return Document(title, blocks)


def _title(folders: Sequence[Path]) -> str:
    first = folders[0].resolve().name
    return f"Scaling: {first}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")


def _summary(runs: Sequence[Run]) -> str:
    def ends(values: Sequence[int] | Sequence[float]) -> str:
        return f"{min(values):.3g} to {max(values):.3g}"

    return (
        f"{len(runs)} runs: {len({r.parameters for r in runs})} sizes of "
        f"{ends([r.parameters for r in runs])} parameters "
        f"({ends([r.non_embedding for r in runs])} without embeddings), "
        f"{len({r.tokens for r in runs})} numbers of tokens from {ends([r.tokens for r in runs])}, "
        f"{len({r.seed for r in runs})} seeds; final losses of "
        f"{ends([r.last for r in runs])} nats per token."
    )


def _warnings(runs: Sequence[Run]) -> list[str]:
    found = []
    epochs = max(run.epochs for run in runs)
    if epochs > _MANY_EPOCHS:
        found.append(
            f"Some runs have read their text {epochs:.1f} times. D counts repeated tokens, and "
            f"beyond {_MANY_EPOCHS:.0f} epochs they are worth less than new ones: L(D) bends."
        )
    if len({run.num_documents for run in runs}) > 1:
        found.append(
            "data.num_documents differs between runs, and with it the validation text and the "
            "tokenizer: losses compare only roughly. training.max_steps varies D without that."
        )
    worse = [run.name for run in runs if run.last > 1.01 * run.best]
    if worse:
        found.append(
            f"{len(worse)} of {len(runs)} runs ended more than 1 % above their own best evaluation "
            "(they overfit, or their rate was too high); the last is what is fitted here."
        )
    return found


def _frontiers(frontiers: Sequence[Frontier], runs: Sequence[Run]) -> list[Block]:
    rows = [
        (
            f"L({found.quantity})", _KAPLAN[found.quantity], str(found.points),
            _interval(found.exponent), _scale(found.log_scale),
        )
        for found in frontiers
    ]  # fmt: skip
    header = ("law", "Kaplan et al. 2020", "points", "exponent", "scale, log10")
    blocks: list[Block] = [
        Heading("Power laws: L(x) = (scale/x)^exponent"),
        Table(header, rows),
    ]
    blocks += [
        Paragraph(_includes_zero(f"L({found.quantity})'s exponent", _WORDS[found.quantity]))
        for found in frontiers
        if found.exponent.includes_zero
    ]
    return [*blocks, *(scaling_plot.frontier(found, runs) for found in frontiers)]


def _joint(found: Joint, runs: Sequence[Run]) -> list[Block]:
    estimates = {name: found.estimate(attrgetter(name)) for name in ("E", "alpha", "beta")}
    estimates["E"] = estimates["E"].within(0.0, min(run.last for run in runs))
    estimates |= {name: found.positive(attrgetter(name)) for name in ("A", "B")}
    rows = [(name, _interval(estimate)) for name, estimate in estimates.items()]
    blocks: list[Block] = [
        Heading("Joint law: L(N, D) = E + A/N^alpha + B/D^beta"),
        Table(("", "value, 95 % interval"), rows),
    ]
    blocks += [
        Paragraph(_includes_zero(name, what))
        for name, what in (("alpha", _WORDS["N"]), ("beta", _WORDS["D"]))
        if estimates[name].includes_zero
    ]
    if estimates["E"].includes_zero:
        blocks.append(
            Paragraph(
                "The interval of E includes 0: these runs are too small, or too few, to tell what "
                "loss would be left for a very large model. The law then only describes them."
            )
        )
    misses = np.array([found.law.loss(r.parameters, r.tokens) / r.last - 1 for r in runs])
    blocks.append(
        Paragraph(
            f"The law misses the runs' losses by {100 * np.sqrt(np.mean(misses**2)):.2f} % (root "
            f"mean square), at most by {100 * np.abs(misses).max():.2f} %."
        )
    )
    blocks.append(scaling_plot.joint(found, runs))
    blocks += _optimum(found, runs)
    return blocks


def _optimum(found: Joint, runs: Sequence[Run]) -> list[Block]:
    most = max(FLOPS_PER_PARAMETER_AND_TOKEN * run.parameters * run.tokens for run in runs)
    heading = Heading("Compute-optimal size and tokens")
    without = found.without_optimum()
    if not np.isfinite(found.law.optimum(most)).all():
        return [heading, Paragraph("The law has none: an exponent is not above 0.")]
    rows: list[Sequence[Text]] = []
    for times in _BEYOND:
        C = times * most
        N, D = found.optimum(C)
        rows.append([
            f"{C:.3g}", "the most trained here" if times == 1 else f"{times} times that",
            _interval(N), _interval(D), _beyond(N.value, D.value, runs),
        ])  # fmt: skip
    blocks: list[Block] = [heading, Table(("C", "", "N*", "D*", ""), rows)]
    if without:
        blocks.append(
            Paragraph(
                f"{without} of {len(found.resampled):,} resamples have no optimum: these runs do "
                "not determine it, and no interval is given."
            )
        )
    blocks.append(scaling_plot.optimum(found, np.geomspace(most / 100, 10 * most, 25), most))
    return blocks


def _method(fits: Fits) -> list[str]:
    return [
        "N is the parameters without token embedding, position table and head in the power laws "
        "(Kaplan et al. 2020), and all parameters in the joint law (Hoffmann et al. 2022); all "
        "experts of a mixture count. D is the tokens seen in training, repeated ones again. "
        "C = 6·N·D with the same N. Losses are val/nats_per_token after the last step.",
        "Power laws: least squares of logarithms, through the frontier: of each N the best D, of "
        "each D the best N, of C what nothing cheaper beats. They have no irreducible loss, and "
        "are L(N) and L(D) of the paper only where the other side is plenty.",
        "Joint law: approach 3 of Hoffmann et al. 2022, Huber loss (δ = 0.001) of log L, L-BFGS "
        "from a grid of starts.",
        f"Intervals: 95 %, of {scaling_fits.RESAMPLES:,} resamples of the runs (cells of equal "
        "size and tokens, then seeds within), widened for few points. They tell the noise and "
        "misfit of these runs, not whether the law holds beyond.",
        f"A power law needs {scaling_fits.LEAST_POINTS} points, the joint law "
        f"{scaling_fits.LEAST_CELLS} different pairs of size and tokens.",
    ]


def _beyond(N: float, D: float, runs: Sequence[Run]) -> str:
    """Whether the runs say so themselves."""
    outside = [
        name
        for name, value, seen in (
            ("N*", N, [run.parameters for run in runs]),
            ("D*", D, [run.tokens for run in runs]),
        )
        if not min(seen) <= value <= max(seen)
    ]
    return (
        f"extrapolated: no run has such {' and '.join(outside)}" if outside else "within the runs"
    )


def _includes_zero(exponent: str, what: str) -> str:
    return f"The interval of {exponent} includes 0: these runs do not tell that {what} helps."


def _runs(runs: Sequence[Run]) -> Table:
    header = (
        "run", "seed", "N", "N, all", "D", "epochs", "C", "last loss", "best loss",
    )  # fmt: skip
    rows = [
        (
            run.name, str(run.seed), f"{run.non_embedding:,}", f"{run.parameters:,}",
            f"{run.tokens:,}", f"{run.epochs:.2f}", f"{scaling_fits.compute(run):.3g}",
            f"{run.last:.4f}", f"{run.best:.4f}",
        )
        for run in sorted(runs, key=lambda run: (run.parameters, run.tokens, run.seed))
    ]  # fmt: skip
    return Table(header, rows)


def _interval(estimate: Estimate) -> str:
    if np.isnan(estimate.low):
        return f"{estimate.value:.3g} [not determined]"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _scale(log_scale: Estimate) -> str:
    """Of base 10; where the exponent may be 0, the scale may be anything."""
    ten = np.log(10)
    return _interval(Estimate(log_scale.value / ten, log_scale.low / ten, log_scale.high / ten))
