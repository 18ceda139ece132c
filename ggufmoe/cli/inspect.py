"""``ggufmoe inspect``: what is in a GGUF file, for people or as JSON, and whether it still fits its manifest.

Owns the tables; ``inspection`` and ``gguf.manifest`` read the files. Text from a file is shown without control
characters, which would steer the terminal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggufmoe.cli.console import make_console, printable
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import model_names, with_options
from ggufmoe.cli.progress import ProgressLine, progress_display
from ggufmoe.cli.wanted_model import found_file
from ggufmoe.errors import GGUFError, InputError
from ggufmoe.gguf import manifest as manifests
from ggufmoe.gguf.model import read_model_header
from ggufmoe.inspection.inspect import MemoryNeed, MergeReport, ModelReport, Share, inspect_header, inspect_model
from ggufmoe.options import ContextOptions
from ggufmoe.placement.devices import this_host
from ggufmoe.sizes import counted, file_size, memory_size, short_count
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ggufmoe.inspection.experts import ExpertSimilarity
    from ggufmoe.writing.plan import WritePlan

_NARROW_COLUMNS = 64
_SHOWN_RECIPE_LINES = 24
_MAX_ITEMS = 200
_MATRIX_OF_EXPERTS = 8
"""With more of them, only the pairs that are most and least alike are named."""


@with_options(ContextOptions)
def inspect_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a stored model, a checkpoint, a recipe, or one on the hub: org/name[:QUANT|/FILE.gguf].",
            autocompletion=model_names,
        ),
    ],
    *,
    context: ContextOptions,
    experts: Annotated[
        bool, typer.Option("--experts", help="Compare the experts with each other (reads a sample of their weights).")
    ] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the merge recipe that the file was made from, and nothing else.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with the manifest beside it.")] = False,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Compare with this manifest.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what is in a GGUF file: architecture, experts, bytes by part and type, memory, tokenizer, template, origin.

    Reads the header only; --verify reads all of it and ends with exit code 1 if anything differs. The memory is that of
    the CPU; `ggufmoe plan` shows what goes where with GPUs. Of a file on the hub only the header is fetched.

    Of a checkpoint or a recipe, here or on the hub, it shows the file that `ggufmoe convert` would make by default.
    """
    model = found_file(source)
    with ProgressLine("inspect", phase="inspect", waiting="reading the header"):
        report, origin = _inspected(source, model, context)
    if model is None and (experts or verify or manifest is not None):
        raise InputError(f"{source}: --experts, --verify and --manifest read the whole file; download or make it first")
    model = model or Path(source)
    if recipe:
        _print_recipe_alone(model, report.merge)
        return
    similarity = _compare_experts(model) if experts else None
    checked = _verify(model, manifest) if verify or manifest is not None else None
    if as_json:
        print(json.dumps(_as_dict(report, origin, similarity, checked)))
    else:
        _show(report, origin, similarity, checked)
    if checked is not None and checked.differences:
        raise GGUFError(
            f"{model}: differs from {checked.manifest.name} in {len(checked.differences)} places, first: "
            f"{printable(checked.differences[0])}; download or make it again"
        )


@dataclass(frozen=True)
class _Unconverted:
    """A checkpoint or a recipe of which only headers were read: where it is, and how its weights are stored."""

    source: str
    commits: dict[str, str]
    n_bytes: int
    """Of the tensor files."""
    stored: dict[str, int]
    """By dtype, weights that the conversion reads."""
    converts_to: str

    @classmethod
    def of(cls, source: str, plan: WritePlan) -> _Unconverted:
        stored: Counter[str] = Counter()
        for part in (part for tensor in plan.tensors for part in tensor.parts):
            stored[part.type.name] += part.n_rows * part.rows.shape[-1]
        here = sum(path.stat().st_size for path in plan.input_paths if path.suffix == ".safetensors")
        away = 0 if plan.network is None else plan.network.file_bytes
        return cls(source, plan.commits, here + away, dict(stored), plan.file_type)

    def facts(self) -> list[tuple[str, str | None]]:
        """What is shown of it."""
        stored = ", ".join(f"{short_count(count)} {name}" for name, count in self.stored.items())
        command = f"ggufmoe convert {self.source} -q {self.converts_to}"
        return [
            ("source", self.source),
            ("commit", ", ".join(dict.fromkeys(self.commits.values())) or None),
            ("weights", f"{file_size(self.n_bytes)}: {stored}"),
            ("below", f"the file that `{command}` would make; `ggufmoe plan {self.source}` shows other types"),
        ]


def _inspected(source: str, file: Path | None, context: ContextOptions) -> tuple[ModelReport, _Unconverted | None]:
    """The report of a file that is there, of one on the hub, or of the one that a conversion would make."""
    from ggufmoe.hub.hub_gguf import read_hub_header
    from ggufmoe.hub.hub_models import list_repository
    from ggufmoe.store.wanted import DEFAULT_QUANT, hub_name, planned_model

    if file is not None:
        return inspect_model(file, context, this_host()), None
    name = hub_name(source)
    if name is not None:
        listing = list_repository(name.repo_id, name.revision)
        if name.quant or name.file or listing.gguf_models or not listing.has_checkpoint:
            return inspect_header(read_hub_header(listing.choose(name)), context, this_host()), None
    from ggufmoe.convert import plan_convert
    from ggufmoe.export.naming import model_name

    plan = plan_convert(source, f"{model_name(source, DEFAULT_QUANT)}.gguf", DEFAULT_QUANT)
    return inspect_header(planned_model(plan), context, this_host()), _Unconverted.of(source, plan)


def _as_dict(
    report: ModelReport, origin: _Unconverted | None, similarity: ExpertSimilarity | None, checked: _Verification | None
) -> dict[str, Any]:
    found = report.to_dict()
    if origin is not None:
        found["source"] = asdict(origin)
    if similarity is not None:
        found["experts"] = similarity.to_dict()
    if checked is not None:
        found["verification"] = checked.to_dict()
    return found


def _print_recipe_alone(model: Path, merge: MergeReport | None) -> None:
    if merge is None:
        raise InputError(f"{model}: contains no recipe: `ggufmoe convert RECIPE.yaml` records it, other tools do not")
    for line in merge.recipe.splitlines():
        print(printable(line, len(line)))


def _compare_experts(model: Path) -> ExpertSimilarity:
    def job(show: OnProgress, cancel: CancelFlag) -> ExpertSimilarity:
        from ggufmoe.inspection.experts import compare_experts

        return compare_experts(model, on_progress=show, cancel=cancel)

    return run_job(job, progress_display("compare experts", phase="compare experts"))


@dataclass(frozen=True)
class _Verification:
    manifest: Path
    n_tensors: int
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"manifest": str(self.manifest), "tensors": self.n_tensors, "differences": list(self.differences)}


def _verify(model: Path, given: Path | None) -> _Verification:
    paths = read_model_header(model).paths
    where = manifests.default_path(paths[0]) if given is None else given
    expected = manifests.read_manifest(where)
    differences = run_job(
        lambda show, cancel: manifests.verify(paths, expected, on_progress=show, cancel=cancel),
        progress_display("verify", phase="hash"),
    )
    return _Verification(where, sum(len(file.tensors) for file in expected.files), tuple(differences))


def _show(
    report: ModelReport, origin: _Unconverted | None, similarity: ExpertSimilarity | None, checked: _Verification | None
) -> None:
    console = make_console()
    narrow = console.width < _NARROW_COLUMNS
    _print_facts(console, "", () if origin is None else origin.facts())
    _print_facts(console, "", _overview(report))
    _print_shares(console, "part", report.parts, narrow)
    _print_shares(console, "type", report.types, narrow)
    _print_memory(console, report.memory)
    _print_facts(console, "network", _network(report))
    _print_facts(console, "tokenizer", _tokenizer(report))
    _print_facts(console, "provenance", _provenance(report))
    if report.merge is not None:
        _print_recipe(console, report.merge)
    if similarity is not None:
        _print_similarity(console, similarity)
    for warning in report.warnings:
        console.print(f"note: {printable(warning)}", style="yellow")
    if checked is not None:
        _print_verification(console, checked)


def _print_verification(console: Console, checked: _Verification) -> None:
    name = printable(checked.manifest.name)
    if checked.differences:
        for difference in checked.differences:
            console.print(f"differs: {printable(difference)}", style="red")
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
        table.add_row(label, printable(text))
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
        cells = [share.name, str(share.n_tensors), short_count(share.n_parameters), file_size(share.n_bytes)]
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


def _print_memory(console: Console, needs: Sequence[MemoryNeed]) -> None:
    if not needs:
        return
    table = _number_table(["memory for", *(f"{need.n_ctx} tokens" for need in needs)])
    rows = [
        ("weights", [need.weight_bytes for need in needs]),
        ("rearranged copy", [need.repacked_bytes for need in needs]),
        ("KV cache", [need.kv_bytes for need in needs]),
        ("compute, about", [need.compute_bytes for need in needs]),
        ("in all", [need.n_bytes for need in needs]),
    ]
    for label, sizes in rows:
        if any(sizes):
            table.add_row(label, *map(memory_size, sizes))
    console.print(table)
    console.print()


def _print_recipe(console: Console, merge: MergeReport) -> None:
    lines = merge.recipe.splitlines()
    facts = [
        f"router {merge.gate_mode}" if merge.gate_mode else "",
        f"ggufmoe {merge.ggufmoe_version}" if merge.ggufmoe_version else "",
    ]
    _print_title(console, "recipe", "".join(f", {printable(fact, 40)}" for fact in facts if fact))
    for line in lines[:_SHOWN_RECIPE_LINES]:
        console.print("  " + printable(line), soft_wrap=False)
    if len(lines) > _SHOWN_RECIPE_LINES:
        rest = counted(len(lines) - _SHOWN_RECIPE_LINES, "more line")
        console.print(f"  and {rest}; --recipe prints all of it", style="dim")
    console.print()


def _print_similarity(console: Console, similarity: ExpertSimilarity) -> None:
    """Print the cosines by layer and kind of matrix; with more than two experts, the mean of all pairs."""
    some = similarity.matrices[0]
    of = "mean of all pairs of experts, " if similarity.n_expert > 2 else ""
    _print_title(console, "similarity of experts", f", cosine: {of}{some.n_rows} of {some.of_rows} rows of a matrix")
    found = {(matrix.layer, matrix.kind): matrix for matrix in similarity.matrices}
    table = _number_table(["layer", *similarity.kinds])
    for layer in similarity.layers:
        cells = (found.get((layer, kind)) for kind in similarity.kinds)
        table.add_row(str(layer), *("-" if cell is None else _cosine(float(cell.pairs.mean())) for cell in cells))
    console.print(table)
    console.print()
    if similarity.n_expert > 2:
        _print_pairs(console, similarity)


def _print_pairs(console: Console, similarity: ExpertSimilarity) -> None:
    mean, n_expert = similarity.mean, similarity.n_expert
    if n_expert <= _MATRIX_OF_EXPERTS and console.width >= 8 * (n_expert + 1):
        table = _number_table(["expert", *map(str, range(n_expert))])
        for row in range(n_expert):
            table.add_row(str(row), *(_cosine(float(mean[row, column])) for column in range(n_expert)))
        console.print(table)
        console.print()
    pairs = sorted((float(mean[a, b]), a, b) for a in range(n_expert) for b in range(a + 1, n_expert))
    most, least = (f"{a} and {b} ({_cosine(cosine)})" for cosine, a, b in (pairs[-1], pairs[0]))
    console.print(f"most alike: {most}; least: {least}")
    console.print()


def _print_title(console: Console, title: str, more: str) -> None:
    from rich.text import Text

    console.print(Text.assemble((title, "bold"), (more, "dim")))


def _cosine(value: float) -> str:
    """A cosine with four digits, or more where all four would be nines."""
    if abs(value) < 0.99995:
        return f"{value:.4f}".replace("-0.0000", "0.0000")
    return "1" if value >= 1 - 1e-9 else f"{value:.7f}"


def _number_table(headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(headings[0], min_width=12 if len(headings[0]) > 6 else None)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _overview(report: ModelReport) -> list[tuple[str, str | None]]:
    hyper = report.hyper
    files = report.files[0] if len(report.files) == 1 else f"{report.files[0]} and {len(report.files) - 1} more"
    experts = f"{hyper.n_expert}, {hyper.n_expert_used} for each token" if hyper.n_expert else None
    return [
        ("file", files),
        ("name", report.name),
        ("architecture", report.architecture),
        ("experts", experts),
        ("parameters", active_parameters(report, noun="")),
        ("size", f"{file_size(report.n_bytes)}, {report.bits_per_weight:.2f} bits per weight"),
        ("file type", report.file_type),
        ("format", f"GGUF version {report.gguf_version}, {report.n_tensors} tensors"),
    ]


def active_parameters(report: ModelReport, noun: str = " parameters") -> str:
    """``46.7 B parameters, 12.9 B of them for each token``; for a dense model only the first part."""
    active = f", {short_count(report.n_active_parameters)} of them for each token" if report.hyper.n_expert else ""
    return f"{short_count(report.n_parameters)}{noun}{active}"


def _network(report: ModelReport) -> list[tuple[str, str | None]]:
    hyper = report.hyper
    return [
        ("context", _with_unit(hyper.n_ctx_train, "tokens")),
        ("layers", _number(hyper.n_layer)),
        ("width", _number(hyper.n_embd)),
        ("feed-forward", _number(hyper.n_ff)),
        ("heads", _heads(report)),
        ("window", _window(report)),
        ("recurrent", f"{report.n_recurrent_layers} layers" if report.n_recurrent_layers else None),
        ("rope", _rope(report)),
        *hyper.expert_facts(),
    ]


def _window(report: ModelReport) -> str | None:
    window = _with_unit(report.hyper.sliding_window, "tokens")
    n = report.n_windowed_layers
    return f"{window or 'that of the architecture'}, in {n} of {report.hyper.n_layer} layers" if n else window


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
        None if template.first_line is None else f"{template.n_chars} characters: {printable(template.first_line, 60)}"
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
    return [(printable(key, 40), text) for key, text in facts]


def _base_model(base: dict[str, Any] | Any) -> str:
    name = " / ".join(str(base[key]) for key in ("organization", "name", "version") if base.get(key))
    url = base.get("repo_url") or base.get("url")
    return f"{name} ({url})" if url else name


def _text(value: Any) -> str:
    return ", ".join(map(str, value[:_MAX_ITEMS])) if isinstance(value, list) else str(value)


def _number(value: int | tuple[int, ...] | None) -> str | None:
    if not isinstance(value, tuple):
        return None if value is None else str(value)
    return f"{min(value)} to {max(value)}" if value else None


def _with_unit(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value} {unit}"
