# SPDX-License-Identifier: Apache-2.0
"""A front as a folder of files: names that sort along it, and a README.md for whoever gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_subnet._messages import warn
from lightning_subnet.errors import (
    ExportError,
    ExportWarning,
    FileParityError,
    ParityError,
    SearchError,
    SubnetError,
)
from lightning_subnet.export.exporting import Exported, export
from lightning_subnet.export.formats import registry
from lightning_subnet.export.formats.base import Format
from lightning_subnet.export.parity import checked_tolerance
from lightning_subnet.results.plots import draw_front
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.results.tables import choices_text
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation

_WHOLE = 0.9  # of the size of all weights, in a file that has no smaller ones


@dataclass
class _Entry:
    """One subnet of the folder.

    Args:
        stem: The name of its files.
        subnet: The subnet.
        evaluation: Its measured values; None if it was not measured.
        files: Its files.
        refusals: Why a format could not take it, by suffix.
        weights_mb: The size of all weights of its network, in 10^6 bytes.
    """

    stem: str
    subnet: Subnet
    evaluation: Evaluation | None
    files: list[Exported] = field(default_factory=list)
    refusals: dict[str, SubnetError] = field(default_factory=dict)
    weights_mb: float = 0.0


class FrontExport:
    """One export of a front; an error of the request shows before anything is converted.

    Args:
        record: The search.
        directory: A folder that is new or empty.
        formats: As in `SearchResult.export`.
        subnets: As in `SearchResult.export`.

    Raises:
        ExportError: See `SearchResult.export`.
    """

    def __init__(
        self,
        record: SearchRecord,
        directory: Path,
        formats: Sequence[str],
        subnets: Iterable[Evaluation | Subnet] | None,
    ) -> None:
        names = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
        self._formats = [registry.make(name) for name in names]
        for form in self._formats:
            form.check()
        if not names:
            raise ExportError("formats=() names nothing to write. Write formats=('onnx',).")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            what = "holds files already" if directory.is_dir() else "is a file"
            raise ExportError(f"{directory} {what}. Name a folder that is new or empty.")
        items = list(record.front if subnets is None else subnets)
        if not items:
            msg = "There is nothing to export: the front is empty. result.best() says what is near."
            raise ExportError(msg)
        self._record, self._directory = record, directory
        self._entries = [_entry(record, item, i, len(items)) for i, item in enumerate(items)]

    def run(
        self,
        extract: Callable[[Subnet], Any],
        example_input: Any,
        *,
        dynamic_batch: bool,
        tolerance: float | None,
    ) -> list[Exported]:
        """Write everything.

        Args:
            extract: Returns a subnet as a network of its own.
            example_input: As the networks take it.
            dynamic_batch: As in `export`.
            tolerance: As in `export`.

        Returns:
            The files, along the front.

        Raises:
            ExportError: Nothing could be written, or the tolerance is none.
            FileParityError: Nothing could be written, as all outputs differ from what they must be.
        """
        tolerance = checked_tolerance(tolerance)
        about = {
            "study": self._record.name,
            "objectives": {o.name: o.direction for o in self._record.objectives},
            "measures": self._record.measures,
            "space_fingerprint": self._record.history.space.fingerprint,
        }
        new = not self._directory.exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        for entry in self._entries:
            try:
                net = extract(entry.subnet)
            except ParityError as error:
                entry.refusals |= {form.suffix: error for form in self._formats}
                continue
            entry.weights_mb = _weights_mb(net)
            for form in self._formats:
                path = self._directory / f"{entry.stem}{form.suffix}"
                try:
                    entry.files.append(
                        export(
                            net, path, example_input, format=form.name, about=about,
                            evaluation=entry.evaluation or entry.subnet,
                            dynamic_batch=dynamic_batch, tolerance=tolerance,
                        )
                    )  # fmt: skip
                except ExportError as error:
                    entry.refusals[form.suffix] = error
        files = [file for entry in self._entries for file in entry.files]
        refusals = [reason for entry in self._entries for reason in entry.refusals.values()]
        if not files:
            if new:
                self._directory.rmdir()
            unequal = all(isinstance(reason, ParityError) for reason in refusals)
            msg = f"None of {len(refusals)} files could be written: {refusals[0]}"
            raise (FileParityError if unequal else ExportError)(msg) from refusals[0]
        self._write_readme()
        if refusals:
            msg = (
                f"{len(refusals)} of {len(refusals) + len(files)} files could not be written; "
                f"{self._directory / 'README.md'} says why. The first: {refusals[0]}"
            )
            warn(msg, ExportWarning)
        return files

    def _write_readme(self) -> None:
        picture = self._draw()
        parts = [
            _head(self._record, self._entries),
            "![The front among all that was measured](front.png)" if picture else "",
            _subnets(self._record, self._entries),
            _files(self._entries, self._formats),
            _loading(self._entries),
            _conditions(self._record, self._entries),
        ]
        text = "\n\n".join(part for part in parts if part) + "\n"
        (self._directory / "README.md").write_text(text, encoding="utf-8")

    def _draw(self) -> bool:
        try:
            figure, _ = draw_front(self._record)
        except SearchError:  # no matplotlib
            return False
        figure.savefig(self._directory / "front.png", dpi=120)
        return True


def _entry(record: SearchRecord, item: Evaluation | Subnet, at: int, n: int) -> _Entry:
    evaluation = item if isinstance(item, Evaluation) else record.final.get(item)
    subnet = record.history.space.subnet(item.subnet if isinstance(item, Evaluation) else item)
    label = f"evaluation-{evaluation.number}" if evaluation else subnet.key[:8]
    return _Entry(f"{at:0{len(str(n - 1))}d}-{label}", subnet, evaluation)


def _head(record: SearchRecord, entries: list[_Entry]) -> str:
    goals = ", ".join(
        f"{o.name} ({'more' if o.direction == 'max' else 'less'} is better)"
        for o in record.objectives
    )
    size = f"{record.history.space.size:,}"
    front = {evaluation.subnet for evaluation in record.front}
    text = (
        f"# {len(entries)} sub-networks of the search {record.name!r}\n\n"
        f"The search measured {len(record.history)} of {size} sub-networks of one super-network. "
        f"Its objectives: {goals}."
    )
    if {entry.subnet for entry in entries} == front:
        text += (
            f" These are all of its best trade-offs, the best by {record.objectives[0].name} "
            "first: what is better than one of them in one objective is worse in another."
        )
    return text


def _subnets(record: SearchRecord, entries: list[_Entry]) -> str:
    measured = [e.evaluation for e in entries if e.evaluation is not None]
    names = record.names_of(measured)
    units = {name: record.measures.get(name, {}).get("unit", "") for name in names}
    heads = [f"{name} [{units[name]}]" if units[name] else name for name in names]
    rows = [
        [
            entry.stem,
            *(_value(entry.evaluation, name) for name in names),
            f"`{choices_text(entry.subnet)}`",
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


def _files(entries: list[_Entry], formats: Sequence[Format]) -> str:
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
        for e in entry.files
    ]
    heads = ["file", "format", "size [MB]", "batch", "difference", "share of scale"]
    text = (
        f"## The files\n\n{_table(heads, rows)}\n\n"
        "Each file was run in its own runtime. The difference is the largest absolute one of its "
        "outputs to those of the network in PyTorch; the last column has it as a share of the "
        "largest output. Beside each file, its `.json` has choices, values, inputs and versions"
    )
    text += "".join(f"; each {f.suffix} file needs its {f.weights}" for f in formats if f.weights)
    text += "."
    missing = [
        f"- {entry.stem}{suffix}: {' '.join(str(reason).split())}"
        for entry in entries
        for suffix, reason in entry.refusals.items()
    ]
    if missing:
        text += "\n\nCould not be written:\n\n" + "\n".join(missing)
    return "\n\n".join(part for part in (text, _weights(entries)) if part)


def _weights(entries: list[_Entry]) -> str:
    """Return which files have the weights of the whole super-network, where it is not cut apart.

    A conversion may fold a slice of a weight into a smaller one, so the sizes of files decide.
    """
    frozen = [
        (e, entry.weights_mb)
        for entry in entries
        for e in entry.files
        if e.metadata["sliced"] is False
    ]
    if not frozen:
        return ""
    text = "The super-network cannot be cut apart, so "
    smaller = [(e, mb) for e, mb in frozen if e.size_mb < _WHOLE * mb]
    if not smaller:
        return f"{text}each file holds all of its weights, with the sub-network in force."
    text += "each file is of the whole of it, with the sub-network in force. "
    sizes = ", ".join(f"{e.path.name} ({e.size_mb:.3g} of {mb:.3g} MB)" for e, mb in smaller)
    text += f"Smaller than all of its weights, as conversion cut them to what is used: {sizes}."
    whole = [e.path.name for e, mb in frozen if e.size_mb >= _WHOLE * mb]
    return f"{text} As large as all of them, or larger: {', '.join(whole)}." if whole else text


def _weights_mb(net: nn.Module) -> float:
    """Return the size of the weights and buffers of a network, each counted once."""
    tensors = {id(x): x for x in (*net.parameters(), *net.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values()) / 1e6


def _loading(entries: list[_Entry]) -> str:
    files = [file for entry in entries for file in entry.files]
    ports: Sequence[Mapping[str, Any]] = files[0].metadata["inputs"]
    names = [port["name"] for port in ports]
    shapes = "; ".join(
        f"`{port['name']}` {port['dtype']} ({', '.join(map(str, port['shape']))})" for port in ports
    )
    lines = [
        f"## How to load one\n\nInputs: {shapes}.",
        "```python\nfrom lightning_subnet.export import load_exported\n"
        f'net = load_exported("{files[0].path.name}")\n'
        f"outputs = net({', '.join(names)})  # tensors; net.subnet, net.values and net.metadata say"
        " what it is\n```",
        "Or without this package:",
    ]
    for name in dict.fromkeys(file.format for file in files):
        first = next(file for file in files if file.format == name)
        lines.append(f"```python\n{registry.make(name).snippet(first.path.name, names)}\n```")
    return "\n\n".join(lines)


def _conditions(record: SearchRecord, entries: list[_Entry]) -> str:
    lines = [
        f"- `{name}` was measured on: {about['conditions']}."
        for name, about in record.measures.items()
        if "conditions" in about
    ]
    versions: dict[str, str] = {}
    for entry in entries:
        for file in entry.files:
            versions |= file.metadata["versions"]
    lines.append(f"- Written with {', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}.")
    return "## Conditions\n\n" + "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
