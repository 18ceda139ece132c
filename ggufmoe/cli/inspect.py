"""``ggufmoe inspect``: what is in a GGUF file, for people or as JSON, and whether it still is what it was.

Owns the tables only; what they say comes from ``runtime.inspect`` and ``manifest``. Everything that a file says is
shown without control characters, so that it cannot play with the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggufmoe import manifest as manifests
from ggufmoe.errors import GGUFError
from ggufmoe.ggufheader import read_model_header
from ggufmoe.runtime.inspect import ModelReport, Share, inspect_model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROW_COLUMNS = 64
_MAX_TEXT = 200


def inspect_command(
    model: Annotated[Path, typer.Argument(help="A GGUF file, or any shard of a split one.")],
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with the manifest beside it.")] = False,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Compare with this manifest.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what is in a GGUF file: architecture, experts, bytes by part and type, tokenizer, template, provenance.

    Reads the header only; --verify reads all of it and ends with exit code 1 if anything differs.
    """
    report = inspect_model(model)
    checked = _verify(model, manifest) if verify or manifest is not None else None
    if as_json:
        print(json.dumps(report.as_dict() | ({} if checked is None else {"verification": checked.as_dict()})))
    else:
        _show(report, checked)
    if checked is not None and checked.differences:
        raise GGUFError(
            f"{model}: differs from {checked.manifest.name} in {len(checked.differences)} places, first: "
            f"{_printable(checked.differences[0])}; download or make it again"
        )


@dataclass(frozen=True)
class _Verification:
    manifest: Path
    n_tensors: int
    differences: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"manifest": str(self.manifest), "tensors": self.n_tensors, "differences": list(self.differences)}


def _verify(model: Path, given: Path | None) -> _Verification:
    paths = read_model_header(model).paths
    where = manifests.default_path(paths[0]) if given is None else given
    expected = manifests.read_manifest(where)
    differences = _with_progress(paths, expected)
    return _Verification(where, sum(len(file.tensors) for file in expected.files), tuple(differences))


def _with_progress(paths: Sequence[Path], expected: manifests.Manifest) -> list[str]:
    from ggufmoe.cli.progress import progress_display

    with progress_display("verify") as display:
        return manifests.verify(paths, expected, lambda *step: display.update(_Step(*step)))


@dataclass(frozen=True)
class _Step:
    done_bytes: int
    total_bytes: int
    tensor: str
    phase: str = "verify"


def _show(report: ModelReport, checked: _Verification | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    narrow = console.width < _NARROW_COLUMNS
    _print_facts(console, "", _overview(report))
    _print_shares(console, "part", report.parts, narrow)
    _print_shares(console, "type", report.types, narrow)
    _print_facts(console, "network", _network(report))
    _print_facts(console, "tokenizer", _tokenizer(report))
    _print_facts(console, "provenance", _provenance(report))
    for warning in report.warnings:
        console.print(f"note: {_printable(warning)}", style="yellow")
    if checked is not None:
        _print_verification(console, checked)


def _print_verification(console: Console, checked: _Verification) -> None:
    name = _printable(checked.manifest.name)
    if checked.differences:
        for difference in checked.differences:
            console.print(f"differs: {_printable(difference)}", style="red")
    else:
        console.print(f"verified: header and all {checked.n_tensors} tensors are as {name} says", style="green")


def _print_facts(console: Console, title: str, facts: Iterable[tuple[str, str | None]]) -> None:
    from rich.table import Table

    rows = [(label, text) for label, text in facts if text]
    if not rows:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, _printable(text))
    if title:
        console.print(title, style="bold")
    console.print(table)
    console.print()


def _print_shares(console: Console, title: str, shares: Sequence[Share], narrow: bool) -> None:
    if not shares:
        return
    table = _share_table(title, narrow)
    total = sum(share.n_bytes for share in shares)
    for share in shares:
        cells = [share.name, str(share.n_tensors), _count(share.n_parameters), _size(share.n_bytes)]
        cells += [f"{100 * share.n_bytes / total:.1f} %", f"{share.bits_per_weight:.2f}"]
        table.add_row(*(cell for index, cell in enumerate(cells) if not narrow or index != 1))
    console.print(table)
    console.print()


def _share_table(title: str, narrow: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(title, min_width=12, overflow="fold")
    for heading in ("tensors", "weights", "size", "share", "bits/w"):
        if not (narrow and heading == "tensors"):
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def _overview(report: ModelReport) -> list[tuple[str, str | None]]:
    hyper = report.hyper
    files = report.files[0] if len(report.files) == 1 else f"{report.files[0]} and {len(report.files) - 1} more"
    experts = f"{hyper.n_expert}, {hyper.n_expert_used} for each token" if hyper.n_expert else None
    active = f", {_count(report.n_active_parameters)} active for each token" if hyper.n_expert else ""
    return [
        ("file", files),
        ("name", report.name),
        ("architecture", report.architecture),
        ("experts", experts),
        ("parameters", _count(report.n_parameters) + active),
        ("size", f"{_size(report.n_bytes)}, {report.bits_per_weight:.2f} bits per weight"),
        ("file type", report.file_type),
        ("format", f"GGUF version {report.gguf_version}, {report.n_tensors} tensors"),
    ]


def _network(report: ModelReport) -> list[tuple[str, str | None]]:
    hyper = report.hyper
    return [
        ("context", _with_unit(hyper.n_ctx_train, "tokens")),
        ("layers", _number(hyper.n_layer)),
        ("width", _number(hyper.n_embd)),
        ("feed-forward", _number(hyper.n_ff)),
        ("heads", _heads(report)),
        ("window", _with_unit(hyper.sliding_window, "tokens")),
        ("rope", _rope(report)),
    ]


def _heads(report: ModelReport) -> str | None:
    hyper = report.hyper
    if hyper.n_head is None:
        return None
    key_value = "" if hyper.n_head_kv is None else f", {_number(hyper.n_head_kv)} for keys and values"
    width = "" if hyper.key_length is None else f", {hyper.key_length} wide"
    return f"{_number(hyper.n_head)}{key_value}{width}"


def _rope(report: ModelReport) -> str | None:
    hyper = report.hyper
    theta = None if hyper.rope_theta is None else f"theta {hyper.rope_theta:g}"
    dimensions = None if hyper.rope_dimensions is None else f"{hyper.rope_dimensions} dimensions"
    factor = "" if hyper.rope_scaling_factor is None else f" by {hyper.rope_scaling_factor:g}"
    scaling = None if hyper.rope_scaling in (None, "none") else f"{hyper.rope_scaling} scaling{factor}"
    return ", ".join(part for part in (theta, dimensions, scaling) if part)


def _tokenizer(report: ModelReport) -> list[tuple[str, str | None]]:
    tokenizer, template = report.tokenizer, report.template
    model = " / ".join(part for part in (tokenizer.model, tokenizer.pre) if part)
    special = ", ".join(
        f"{name} {number}" + (f" {tokenizer.special_text[name]}" if name in tokenizer.special_text else "")
        for name, number in tokenizer.special.items()
    )
    stated = (("BOS", tokenizer.add_bos), ("EOS", tokenizer.add_eos), ("space", tokenizer.add_space_prefix))
    adds = ", ".join(f"{name} {'yes' if value else 'no'}" for name, value in stated if value is not None)
    shown = (
        None if template.first_line is None else f"{template.n_chars} characters: {_printable(template.first_line, 60)}"
    )
    return [
        ("model", model),
        ("vocabulary", _with_unit(tokenizer.n_vocab, "tokens")),
        ("special", special),
        ("adds", adds),
        ("template", shown),
        ("templates", ", ".join(template.names)),
        ("sampling", ", ".join(f"{key} {_text(value)}" for key, value in report.sampling.items())),
    ]


def _provenance(report: ModelReport) -> list[tuple[str, str | None]]:
    facts = [(key, _text(value)) for key, value in report.provenance.items()]
    facts += [("base model", _base_model(base)) for base in report.base_models]
    facts += [(key, _text(value)) for key, value in report.other.items()]
    return [(_printable(key, 40), text) for key, text in facts]


def _base_model(base: dict[str, Any] | Any) -> str:
    name = " / ".join(str(base[key]) for key in ("organization", "name", "version") if base.get(key))
    url = base.get("repo_url") or base.get("url")
    return f"{name} ({url})" if url else name


def _text(value: Any) -> str:
    return ", ".join(map(str, value[:_MAX_TEXT])) if isinstance(value, list) else str(value)


def _printable(text: str, limit: int = _MAX_TEXT) -> str:
    """One line without anything that a terminal would obey or cannot encode, cut to ``limit`` characters."""
    plain = "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def _size(n_bytes: int) -> str:
    """Bytes in decimal units, as model pages state them: 7.78 GB."""
    return _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def _count(number: int) -> str:
    return _scaled(number, ("", "K", "M", "B", "T"))


def _scaled(number: int, units: Sequence[str]) -> str:
    scaled, step = float(number), 0
    while scaled >= 999.5 and step < len(units) - 1:
        scaled, step = scaled / 1000, step + 1
    digits = 0 if step == 0 or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {units[step]}".rstrip()


def _number(value: int | tuple[int, ...] | None) -> str | None:
    if not isinstance(value, tuple):
        return None if value is None else str(value)
    return f"{min(value)} to {max(value)}" if value else None


def _with_unit(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value} {unit}"
