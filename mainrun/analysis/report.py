"""`mainrun report`: what the folders are, and where the report of them goes.

One run, one sweep, or several runs to be compared; a sweep folder among several is a mistake. Only
folders are read, never a study, a lock or a server, and only the report's own files are written.
"""

from collections.abc import Sequence
from pathlib import Path

from mainrun.analysis import document_files, run_folder
from mainrun.analysis.document import Document
from mainrun.errors import UserError


def report(folders: Sequence[Path], output: Path | None) -> Path:
    """The path of the HTML file that was written. Raises UserError for what cannot be reported."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: name a run or a sweep, as runs/NAME")
    path = output or _place(folders)
    document_files.check(path)
    return document_files.write(_document(folders), path)


def _place(folders: Sequence[Path]) -> Path:
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html")


def _document(folders: Sequence[Path]) -> Document:
    sweeps = [folder for folder in folders if (folder / "sweep.yaml").is_file()]
    if sweeps and len(folders) > 1:
        raise UserError(
            f"{sweeps[0]} is a sweep: report it alone, or name its trials, "
            f"{sweeps[0]}/trials/*/, to compare them"
        )
    # What one kind of report needs, the others shall not wait for.
    if sweeps:
        from mainrun.analysis import sweep_report, trials

        return sweep_report.report(trials.read(sweeps[0]))
    runs = [run_folder.read(folder) for folder in _once_each(folders)]
    if len(runs) == 1:
        from mainrun.analysis import run_report

        return run_report.report(runs[0])
    from mainrun.analysis import comparison

    return comparison.report(runs)


def _once_each(folders: Sequence[Path]) -> list[Path]:
    """Without repetitions, which would count one run as two."""
    return list({folder.resolve(): folder for folder in folders}.values())
