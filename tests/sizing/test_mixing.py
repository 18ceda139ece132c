"""Files of a given size: never larger, nearly all of it used, better by prediction than the standard mix."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.errors import InputError, OptionError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.requantize import plan_requantize
from ggufmoe.export.unmixed import UnmixedModel
from ggufmoe.gguf.header import Header, read_header
from ggufmoe.gguf.own_keys import MIX
from ggufmoe.gguf.types import GGMLType
from ggufmoe.inspection.inspect import inspect_model
from ggufmoe.options import SizeTarget
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.policy import ModelShape, TypePolicy
from ggufmoe.quant.type_sets import FAST_TYPES
from ggufmoe.quant.type_speeds import TypeSpeeds
from ggufmoe.quantize import plan_quantize
from ggufmoe.sizing.mixing import SizeMixer
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.sizing.timing import token_clock
from ggufmoe.work import Progress
from ggufmoe.writing.plan import PlannedTensor, WritePlan
from tests.quant.llama_quantize import Specimen, write_model
from tests.sizing.drawn import saved
from tests.tiny import make_checkpoint

MODEL = Specimen(n_layer=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sized") / "in.gguf", MODEL, MODEL.weights())


@pytest.fixture(scope="module")
def sensitivity(source: Path) -> Path:
    return saved(source.with_name("s.gguf"), {tensor.name: tensor.shape for tensor in MODEL.tensors()})


def types_of(header: Header) -> dict[str, GGMLType]:
    return {tensor.name: tensor.type for tensor in header.tensors}


def test_a_file_is_as_large_as_asked_and_says_what_it_is(source: Path, sensitivity: Path, tmp_path: Path) -> None:
    output, size = tmp_path / "out.gguf", 600_000
    result = ggufmoe.quantize(
        source, output, size="600K", sensitivity=sensitivity, types="k", threads=1, quantizer="ggml"
    )
    assert 0.995 * size <= output.stat().st_size == result.n_bytes <= size
    header = read_header(output)
    mix = json.loads(header.metadata[MIX].value)
    assert mix == result.to_dict()["mix"]
    assert mix["target"] == "600K"
    assert mix["types"] == "k"
    assert mix["sensitivity"] == {"source": "drawn", "datasets": ["no text"], "tokens": 512}
    bits = 8 * sum(tensor.n_bytes for tensor in header.tensors) / result.plan.n_weights
    assert mix["name"] == f"{bits:.2f} bpw" == result.plan.file_type == inspect_model(output).file_type
    weights: dict[str, int] = {}
    for tensor in header.tensors:
        weights[tensor.type.name] = weights.get(tensor.type.name, 0) + tensor.n_elements
    most = max(weights, key=lambda name: weights[name])
    assert FileType.from_id(header.metadata["general.file_type"].value).default_type.name == most
    assert mix["predicted_kl"] < mix["standard"]["predicted_kl"]
    assert mix["standard"]["bytes"] <= size


def test_bits_a_weight_are_those_of_all_tensors(source: Path, sensitivity: Path, tmp_path: Path) -> None:
    for bits in (3.0, 4.5, 6.2):
        plan = plan_quantize(
            source, tmp_path / "out.gguf", f"{bits}bpw", sensitivity=sensitivity, types="k", quantizer="ggml"
        )
        assert 0.995 * bits <= plan.bits_per_weight <= bits
        again = plan_quantize(
            source, tmp_path / "out.gguf", target_bpw=bits, sensitivity=sensitivity, types="k", quantizer="ggml"
        )
        assert plan.files[0].header == again.files[0].header


def test_a_checkpoint_gets_the_same_types_as_its_gguf_file(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", n_layer=1, n_ff=256)
    ggufmoe.convert(checkpoint, tmp_path / "plain.gguf", "BF16", threads=1, quantizer="ggml")
    shapes = {tensor.name: tensor.shape for tensor in read_header(tmp_path / "plain.gguf").tensors}
    sensitivity = saved(tmp_path / "s.gguf", shapes)
    ggufmoe.convert(
        checkpoint, tmp_path / "a.gguf", "4.5bpw", sensitivity=sensitivity, types="k", threads=1, quantizer="ggml"
    )
    plan = plan_quantize(tmp_path / "plain.gguf", tmp_path / "b.gguf", "4.5bpw", sensitivity=sensitivity, types="k")
    assert types_of(read_header(tmp_path / "a.gguf")) == {tensor.name: tensor.type for tensor in plan.tensors}


def test_another_size_reads_no_weights_and_another_sensitivity_does(source: Path, tmp_path: Path) -> None:
    shapes = {tensor.name: tensor.shape for tensor in MODEL.tensors()}
    phases: list[str] = []

    def note(progress: Progress) -> None:
        phases.append(progress.phase)

    def plan(seed: int, bits: float) -> None:
        phases.clear()
        sensitivity = saved(tmp_path / "s.gguf", shapes, seed)
        plan_quantize(source, tmp_path / "o.gguf", f"{bits}bpw", sensitivity=sensitivity, types="k", on_progress=note)

    plan(7, 4.0)
    assert "errors" in phases
    plan(7, 5.0)
    assert phases == []
    plan(8, 5.0)
    assert "errors" in phases


def test_the_standard_mix_of_just_this_size_is_compared(source: Path, sensitivity: Path, tmp_path: Path) -> None:
    standard = plan_quantize(source, tmp_path / "out.gguf", "Q4_K_M", imatrix=sensitivity)
    plan = plan_quantize(source, tmp_path / "o.gguf", size=str(standard.n_bytes), sensitivity=sensitivity, types="k")
    assert plan.mix is not None
    assert plan.mix.standard is not None
    assert (plan.mix.standard.name, plan.mix.standard.n_bytes) == ("Q4_K_M", standard.n_bytes)
    assert plan.mix.predicted_kl < plan.mix.standard.predicted_kl


def test_types_that_are_given_stay(source: Path, sensitivity: Path, tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("blk.0.attn_q=q3_k\nattn_q=q2_k ffn_down=q6_k\n")
    plan = plan_quantize(
        source,
        tmp_path / "out.gguf",
        "5bpw",
        sensitivity=sensitivity,
        types="k",
        tensor_types=("blk.1.attn_q=q8_0",),
        tensor_type_file=tmp_path / "types.txt",
        output_tensor_type="q5_k",
    )
    types = {tensor.name: tensor.type.name for tensor in plan.tensors}
    assert [types[f"blk.{i}.attn_q.weight"] for i in range(2)] == ["Q3_K", "Q8_0"]
    assert {types[f"blk.{i}.ffn_down_exps.weight"] for i in range(2)} == {"Q6_K"}
    assert types["output.weight"] == "Q5_K"
    assert plan.bits_per_weight <= 5


def test_rows_that_superblocks_do_not_divide_fall_back(tmp_path: Path) -> None:
    model = Specimen(n_expert=0, n_layer=2, n_embd=96, n_ff=256, tied=True)
    source = write_model(tmp_path / "in.gguf", model, model.weights())
    sensitivity = saved(tmp_path / "s.gguf", {tensor.name: tensor.shape for tensor in model.tensors()})
    plan = plan_quantize(source, tmp_path / "out.gguf", "5.5bpw", sensitivity=sensitivity, types="k")
    short = {tensor.type.name for tensor in plan.tensors if tensor.n_cols == 96 and len(tensor.shape) > 1}
    assert short <= {"Q4_0", "Q5_0", "Q5_1", "Q8_0"}
    assert plan.bits_per_weight <= 5.5


def test_a_plain_mix_of_a_sized_file_is_not_called_by_bits(source: Path, sensitivity: Path, tmp_path: Path) -> None:
    sized, plain = tmp_path / "a.gguf", tmp_path / "b.gguf"
    ggufmoe.quantize(source, sized, "6bpw", sensitivity=sensitivity, types="k", threads=1, quantizer="ggml")
    ggufmoe.quantize(sized, plain, "Q2_K", allow_requantize=True, threads=1, quantizer="ggml")
    ggufmoe.quantize(sized, tmp_path / "copy.gguf", "COPY", threads=1, quantizer="ggml")
    assert inspect_model(plain).file_type == "Q2_K"
    assert MIX not in read_header(plain).metadata
    assert inspect_model(tmp_path / "copy.gguf").file_type == inspect_model(sized).file_type
    with pytest.raises(OptionError, match="is quantized already"):
        plan_quantize(sized, plain, "3bpw", sensitivity=sensitivity)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"quant": "1.5bpw", "types": "k"},
            "1.5bpw is too small: the smallest file .* --types all",
        ),
        ({"quant": "99bpw"}, "expected 1 to 16 bits per weight, not 99"),
        ({"quant": "4.5bpw", "size": "1G"}, "give one of them"),
        ({"quant": "Q5_K_M", "size": "1G"}, "give one of them"),
        ({"size": "6"}, "'6' is not a size"),
        ({"size": "big"}, "'big' is not a size"),
        ({"quant": "4bpw", "pure": True}, "--pure means one type"),
        ({"quant": "Q4_K_M", "types": "k"}, "are for a size"),
    ],
)
def test_what_cannot_be_met_is_refused(
    source: Path, sensitivity: Path, tmp_path: Path, words: dict[str, object], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        plan_quantize(source, tmp_path / "out.gguf", sensitivity=sensitivity, **words)  # type: ignore[arg-type]


def test_a_size_needs_a_sensitivity_of_this_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="needs --sensitivity FILE, which `ggufmoe sensitivity` makes, or --sensitivity-text TEXT"
    ):
        plan_quantize(source, tmp_path / "out.gguf", "4bpw")
    other = saved(tmp_path / "s.gguf", {tensor.name: tensor.shape for tensor in Specimen(n_ff=512).tensors()})
    with pytest.raises((InputError, OptionError), match="ffn_down_exps"):
        plan_quantize(source, tmp_path / "out.gguf", "4bpw", sensitivity=other)


def test_a_dry_run_shows_the_mix_beside_the_standard_one(
    source: Path, sensitivity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(source), "-q", "5bpw", "--sensitivity", str(sensitivity), "--types", "k", "--dry-run"]
    assert exit_code(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("in-5bpw.gguf: ")
    assert "the mix by part and layer:" in lines
    assert any(line.startswith("  ffn_down_exps  Q") and line.endswith("1") for line in lines)
    ours, standard = [line for line in lines if line.startswith("predicted KL divergence ")]
    assert " bpw, " in ours
    assert standard.endswith("the best standard mix that is no larger")
    assert float(ours.split()[3].rstrip(":")) < float(standard.split()[3].rstrip(":"))
    assert exit_code([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mix"]["target"] == "5bpw"


def test_fast_is_as_fast_as_the_standard_mix_by_the_measured_speeds(
    source: Path, sensitivity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where all types but Q4_K and Q6_K are slow, only these are left to Q4_K_M's size."""
    output, quick = tmp_path / "o.gguf", {GGMLType.Q4_K: 1e-11, GGMLType.Q6_K: 1.5e-11}
    seconds = {kind: quick.get(kind, 9e-11) for kind in FAST_TYPES}
    speeds = TypeSpeeds("a machine", seconds, seconds)
    size = plan_quantize(source, output, "Q4_K_M", imatrix=sensitivity).n_bytes
    free = plan_quantize(source, output, size=str(size), types="k", sensitivity=sensitivity).mix
    mixer = SizeMixer(SizeTarget("it", n_bytes=size), Sensitivity.load(sensitivity), sensitivity, "k", speeds)
    with contextlib.closing(GGUFSource(source)) as model:
        policy, imatrix = TypePolicy(FileType.Q4_K_M), Imatrix.load(sensitivity)
        fast = plan_requantize(model, output, policy, imatrix=imatrix, mixer=mixer).mix
    assert free is not None
    assert free.seconds is None
    assert fast is not None
    assert fast.seconds is not None
    assert fast.standard is not None
    assert fast.standard.name == "Q4_K_M"
    assert fast.standard.seconds is not None
    assert fast.seconds <= 1.05 * fast.standard.seconds
    assert free.predicted_kl < fast.predicted_kl <= fast.standard.predicted_kl
    met = {tensor.name: math.prod(tensor.shape) for tensor in MODEL.tensors() if tensor.name != "token_embd.weight"}
    by_hand = sum(met[name] * seconds[kind] for name, kind in fast.types.items() if name in met)
    assert fast.seconds == pytest.approx(by_hand)
    assert fast.to_dict()["ms_per_token"] == round(fast.seconds * 1e3, 4)
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    with pytest.raises(OptionError, match=r"measure it once with ggufmoe.type_speeds\(\)"):
        plan_quantize(source, output, size=str(size), types="fast", sensitivity=sensitivity)


def test_a_token_takes_the_time_of_the_weights_that_it_meets() -> None:
    seconds = {GGMLType.Q4_K: 2e-11, GGMLType.Q8_0: 3e-11}
    speeds = TypeSpeeds("a machine", seconds, seconds)
    embedding, output, experts = (
        PlannedTensor(name, GGMLType.BF16, shape, ())
        for name, shape in (
            ("token_embd.weight", (40, 256)),
            ("output.weight", (40, 256)),
            ("blk.0.ffn_up_exps.weight", (8, 512, 256)),
        )
    )

    def lay_out(policy: TypePolicy) -> WritePlan:
        raise NotImplementedError

    def clock(*tensors: PlannedTensor) -> list[float]:
        shape = ModelShape(1, 4, 2, n_expert=8)
        policy = TypePolicy(FileType.Q4_K_M)
        model = UnmixedModel(tensors, shape, policy, None, (), keeps_quantized=False, lay_out=lay_out, n_expert_used=2)
        return [token_clock(speeds, model)(tensor, GGMLType.Q4_K) for tensor in tensors]

    assert clock(embedding, output, experts) == pytest.approx([0, 40 * 256 * 2e-11, 2 * 512 * 256 * 2e-11])
    assert clock(embedding, experts) == pytest.approx([40 * 256 * 2e-11, 2 * 512 * 256 * 2e-11])
