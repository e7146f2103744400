# SPDX-License-Identifier: Apache-2.0
"""A front as a folder of files: names that sort along it, and a README.md for whoever gets it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_subnet._messages import did_you_mean, warn
from lightning_subnet.errors import ExportError, ExportWarning, SearchError
from lightning_subnet.export.exporting import EXPORTERS, NEEDS, Exported
from lightning_subnet.export.formats.base import library
from lightning_subnet.export.loading import SUFFIXES
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation

if TYPE_CHECKING:
    from lightning_subnet.results.result import SearchResult

_ALONE = {
    "onnx": (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("{file}")\n'
        "outputs = session.run(None, {{{arrays}}})  # NumPy arrays"
    ),
    "torch": (
        "import torch\n"
        'net = torch.export.load("{file}").module()\n'
        "outputs = net({names})  # tensors"
    ),
    "openvino": (
        "import openvino\n"
        'net = openvino.compile_model("{file}", "CPU")\n'
        "outputs = net({{{arrays}}})  # NumPy arrays"
    ),
}


@dataclass
class _Entry:
    """One subnet of the folder.

    Args:
        stem: The name of its files.
        subnet: Which it is.
        evaluation: What was measured of it, if it was.
        written: Its files.
        refused: Why a format could not take it, by format.
    """

    stem: str
    subnet: Subnet
    evaluation: Evaluation | None
    written: list[Exported] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class FrontExport:
    """One export of a front; what is wrong with the request shows before anything is converted.

    Args:
        result: What a search found.
        directory: A folder that is new or empty.
        formats: As in `SearchResult.export`.
        subnets: As in `SearchResult.export`.
        example_input: As in `SearchResult.export`.

    Raises:
        ExportError: See `SearchResult.export`.
        SearchError: See `SearchResult.export`.
    """

    def __init__(
        self,
        result: SearchResult,
        directory: Path,
        formats: Sequence[str],
        subnets: Iterable[Evaluation | Subnet] | None,
        example_input: Any,
    ) -> None:
        formats = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
        for name in formats:
            if name not in EXPORTERS:
                msg = f"{name!r} is no format.{did_you_mean(name, EXPORTERS)} "
                raise ExportError(msg + f"Known are {', '.join(map(repr, EXPORTERS))}.")
            for needed in NEEDS[name]:
                library(needed)
        if not formats:
            raise ExportError("formats=() names nothing to write. Write formats=('onnx',).")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            what = "holds files already" if directory.is_dir() else "is a file"
            raise ExportError(f"{directory} {what}. Name a folder that is new or empty.")
        chosen = list(result.front if subnets is None else subnets)
        if not chosen:
            msg = "There is nothing to export: the front is empty. result.best() says what is near."
            raise ExportError(msg)
        self._result, self._directory, self._formats = result, directory, formats
        self._entries = [_entry(result, item, i, len(chosen)) for i, item in enumerate(chosen)]
        self._example = result.example_input() if example_input is None else example_input

    def run(self, *, dynamic_batch: bool, tolerance: float) -> list[Exported]:
        """Write everything.

        Raises:
            ExportError: Nothing could be written.
        """
        about = {
            "study": self._result.name,
            "objectives": {o.name: o.direction for o in self._result.objectives},
            "measures": self._result.measures,
            "space_fingerprint": self._result.history.space.fingerprint,
        }
        new = not self._directory.exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        for entry in self._entries:
            net = self._result.extract(entry.subnet)
            for name in self._formats:
                path = self._directory / f"{entry.stem}{SUFFIXES[name]}"
                try:
                    entry.written.append(
                        EXPORTERS[name](
                            net, path, self._example, evaluation=entry.evaluation or entry.subnet,
                            about=about, dynamic_batch=dynamic_batch, tolerance=tolerance,
                        )
                    )  # fmt: skip
                except ExportError as error:
                    entry.refused[name] = str(error)
        written = [exported for entry in self._entries for exported in entry.written]
        refused = [reason for entry in self._entries for reason in entry.refused.values()]
        if not written:
            if new:
                self._directory.rmdir()
            raise ExportError(f"None of {len(refused)} files could be written: {refused[0]}")
        self._write_readme()
        if refused:
            msg = (
                f"{len(refused)} of {len(refused) + len(written)} files could not be written; "
                f"{self._directory / 'README.md'} says why. The first: {refused[0]}"
            )
            warn(msg, ExportWarning)
        return written

    def _write_readme(self) -> None:
        picture = self._draw()
        parts = [
            _head(self._result, self._entries),
            "![The front among all that was measured](front.png)" if picture else "",
            _subnets(self._result, self._entries),
            _files(self._entries),
            _loading(self._entries),
            _conditions(self._result, self._entries),
        ]
        text = "\n\n".join(part for part in parts if part) + "\n"
        (self._directory / "README.md").write_text(text, encoding="utf-8")

    def _draw(self) -> bool:
        try:
            figure, _ = self._result.plot()
        except SearchError:  # no matplotlib
            return False
        figure.savefig(self._directory / "front.png", dpi=120)
        return True


def _entry(result: SearchResult, item: Evaluation | Subnet, at: int, n: int) -> _Entry:
    evaluation = item if isinstance(item, Evaluation) else result.final.get(item)
    subnet = result.history.space.subnet(item.subnet if isinstance(item, Evaluation) else item)
    known = f"evaluation-{evaluation.number}" if evaluation else subnet.key[:8]
    return _Entry(f"{at:0{len(str(n - 1))}d}-{known}", subnet, evaluation)


def _head(result: SearchResult, entries: list[_Entry]) -> str:
    goals = ", ".join(
        f"{o.name} ({'more' if o.direction == 'max' else 'less'} is better)"
        for o in result.objectives
    )
    size = f"{result.history.space.size:,}"
    front = {evaluation.subnet for evaluation in result.front}
    text = (
        f"# {len(entries)} sub-networks of the search {result.name!r}\n\n"
        f"The search measured {len(result.history)} of {size} sub-networks of one super-network. "
        f"Its objectives: {goals}."
    )
    if {entry.subnet for entry in entries} == front:
        text += (
            f" These are all of its best trade-offs, the best by {result.objectives[0].name} "
            "first: what is better than one of them in one objective is worse in another."
        )
    return text


def _subnets(result: SearchResult, entries: list[_Entry]) -> str:
    measured = [e.evaluation for e in entries if e.evaluation is not None]
    names = list(dict.fromkeys([*result.problem.names, *(k for e in measured for k in e.values)]))
    units = {name: result.measures.get(name, {}).get("unit", "") for name in names}
    heads = [f"{name} [{units[name]}]" if units[name] else name for name in names]
    rows = [
        [
            entry.stem,
            *(_value(entry.evaluation, name) for name in names),
            f"`{repr(entry.subnet)[7:-1]}`",
        ]
        for entry in entries
    ]
    table = _table(["files", *heads, "choices"], rows)
    noisy = any(e.errors.get(name) for e in measured for name in names)
    return f"## What they are\n\n{table}" + ("\n\n± is one standard error." if noisy else "")


def _value(evaluation: Evaluation | None, name: str) -> str:
    if evaluation is None or name not in evaluation.values:
        return "not measured"
    value, error = evaluation.values[name], evaluation.errors.get(name, 0.0)
    shown = f"{value:,.0f}" if abs(value) >= 1000 and value.is_integer() else f"{value:.4g}"  # noqa: PLR2004 - counts are read in full, with separators
    return f"{shown} ± {error:.2g}" if error else shown


def _files(entries: list[_Entry]) -> str:
    rows = [
        [
            f"[{e.path.name}]({e.path.name})",
            e.format,
            f"{e.size_mb:.3g}",
            "any" if e.dynamic_batch else f"{e.metadata['parity']['batches'][0]} only",
            f"{e.parity:.1e}",
            f"{e.metadata['parity']['relative']:.1e}",
        ]
        for entry in entries
        for e in entry.written
    ]
    heads = ["file", "format", "size [MB]", "batch", "difference", "share of scale"]
    text = (
        f"## The files\n\n{_table(heads, rows)}\n\n"
        "Each file was run in its own runtime. The difference is the largest absolute one of its "
        "outputs to those of the network in PyTorch; the last column has it as a share of the "
        "largest output. Beside each file, its `.json` has choices, values, inputs and versions; "
        "an .xml file needs its .bin."
    )
    missing = [
        f"- {entry.stem}{SUFFIXES[name]}: {' '.join(reason.split())}"
        for entry in entries
        for name, reason in entry.refused.items()
    ]
    if missing:
        text += "\n\nCould not be written:\n\n" + "\n".join(missing)
    if any(e.metadata["sliced"] is False for entry in entries for e in entry.written):
        text += (
            "\n\nThe super-network cannot be cut apart, so each file holds all of its weights, "
            "with the sub-network in force."
        )
    return text


def _loading(entries: list[_Entry]) -> str:
    written = [e for entry in entries for e in entry.written]
    inputs: Sequence[Mapping[str, Any]] = written[0].metadata["inputs"]
    names = ", ".join(item["name"] for item in inputs)
    told = "; ".join(
        f"`{item['name']}` {item['dtype']} ({', '.join(map(str, item['shape']))})"
        for item in inputs
    )
    lines = [
        f"## How to load one\n\nInputs: {told}.",
        "```python\nfrom lightning_subnet.export import load_exported\n"
        f'net = load_exported("{written[0].path.name}")\n'
        f"outputs = net({names})  # tensors; net.subnet, net.values and net.metadata say what it is"
        "\n```",
        "Or without this package:",
    ]
    for form in dict.fromkeys(e.format for e in written):
        first = next(e for e in written if e.format == form)
        arrays = ", ".join(f'"{item["name"]}": {item["name"]}' for item in inputs)
        code = _ALONE[form].format(file=first.path.name, names=names, arrays=arrays)
        lines.append(f"```python\n{code}\n```")
    return "\n\n".join(lines)


def _conditions(result: SearchResult, entries: list[_Entry]) -> str:
    told = [
        f"- `{name}` was measured on: {about['conditions']}."
        for name, about in result.measures.items()
        if "conditions" in about
    ]
    versions: dict[str, str] = {}
    for entry in entries:
        for exported in entry.written:
            versions |= exported.metadata["versions"]
    told.append(f"- Written with {', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}.")
    return "## Conditions\n\n" + "\n".join(told)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
