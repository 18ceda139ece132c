"""Importance matrices: both file kinds, llama-quantize's arithmetic, and files that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray

from ggufmoe.errors import ImatrixError
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.importances import Imatrix, save
from ggufmoe.quant.policy import TypePolicy, choose_types
from tests.quant.llama_quantize import Specimen

EXPERTS = "blk.0.ffn_down_exps.weight"
PLAIN = "blk.0.attn_q.weight"


def gguf_file(path: Path, tensors: Mapping[str, NDArray[Any]], *, without: str = "") -> Path:
    """An imatrix as llama-imatrix writes it, by PyPI's gguf."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    if without != "imatrix.datasets":
        writer.add_array("imatrix.datasets", ["wiki.txt", "code.txt"])
    if without != "imatrix.chunk_count":
        writer.add_uint32("imatrix.chunk_count", 7)
    if without != "imatrix.chunk_size":
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_entry(name: bytes, calls: int, values: list[float]) -> bytes:
    head = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
    return head + struct.pack(f"<{len(values)}f", *values)


def legacy_file(path: Path, *entries: bytes, trailer: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<i", len(entries)) + b"".join(entries) + trailer)
    return path


def sums(experts: int, cols: int) -> NDArray[np.float32]:
    return np.random.default_rng(experts * cols).gamma(1.0, 30.0, (experts, cols)).astype(np.float32)


class TestGguf:
    def test_sums_over_counts_for_each_expert_in_single_precision(self, tmp_path: Path) -> None:
        values, counts = sums(3, 8), np.array([[7], [3], [11]], np.float32)
        path = gguf_file(tmp_path / "i.gguf", {f"{EXPERTS}.in_sum2": values, f"{EXPERTS}.counts": counts})
        imatrix = Imatrix.load(path)
        weights = imatrix.weights(EXPERTS, 3, 8)
        assert weights is not None
        assert weights.dtype == np.float32
        assert weights.tobytes() == (values / counts).tobytes()
        assert imatrix.names == {EXPERTS}
        assert imatrix.coverage == {}
        assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("wiki.txt", "code.txt"), 7, 512)
        assert not imatrix.is_legacy

    def test_an_expert_that_was_never_reached_counts_as_ones(self, tmp_path: Path) -> None:
        values, counts = sums(3, 4), np.array([[2], [0], [0.4]], np.float32)
        path = gguf_file(tmp_path / "i.gguf", {f"{EXPERTS}.in_sum2": values, f"{EXPERTS}.counts": counts})
        imatrix = Imatrix.load(path)
        weights = imatrix.weights(EXPERTS, 3, 4)
        assert weights is not None
        assert weights.tolist() == [(values[0] / 2).tolist(), [1.0] * 4, [1.0] * 4]
        assert imatrix.coverage == {EXPERTS: (1, 2)}

    def test_counts_round_as_lround_does(self, tmp_path: Path) -> None:
        values, counts = sums(3, 4), np.array([[2.5], [0.5], [3.4]], np.float32)
        path = gguf_file(tmp_path / "i.gguf", {f"{EXPERTS}.in_sum2": values, f"{EXPERTS}.counts": counts})
        weights = Imatrix.load(path).weights(EXPERTS, 3, 4)
        assert weights is not None
        assert weights.tobytes() == (values / np.array([[3], [1], [3]], np.float32)).tobytes()

    def test_one_count_for_a_plain_matrix_and_other_tensors_are_left(self, tmp_path: Path) -> None:
        tensors = {f"{PLAIN}.in_sum2": sums(1, 4), f"{PLAIN}.counts": np.full((1, 1), 5, np.float32)}
        path = gguf_file(tmp_path / "i.gguf", {**tensors, "note": np.zeros(2, np.float32)})
        imatrix = Imatrix.load(path)
        weights = imatrix.weights(PLAIN, 1, 4)
        assert weights is not None
        assert weights.tobytes() == (sums(1, 4) / np.float32(5)).tobytes()
        assert imatrix.names == {PLAIN}
        assert imatrix.weights("blk.0.attn_k.weight", 1, 4) is None

    @pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
    def test_a_gguf_of_another_kind(self, key: str, tmp_path: Path) -> None:
        tensors = {f"{PLAIN}.in_sum2": sums(1, 4), f"{PLAIN}.counts": np.ones((1, 1), np.float32)}
        with pytest.raises(ImatrixError, match=f"not an importance matrix: it lacks {key}"):
            Imatrix.load(gguf_file(tmp_path / "i.gguf", tensors, without=key))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"x.in_sum2": sums(1, 4)}, "x has sums but no counts"),
            ({"x.counts": np.ones((1, 1), np.float32)}, "x has counts but no sums"),
            ({"x": sums(1, 4)}, "without entries"),
            ({"x.in_sum2": sums(1, 4).astype(np.float16), "x.counts": np.ones((1, 1), np.float32)}, "found F16, F32"),
            ({"x.in_sum2": sums(1, 4), "x.counts": np.ones((3, 1), np.float32)}, "4 sums cannot be shared among 3"),
            ({"x.in_sum2": sums(1, 4), "x.counts": np.full((1, 1), np.nan, np.float32)}, "a count is negative"),
            ({"x.in_sum2": sums(1, 4), "x.counts": np.full((1, 1), -1, np.float32)}, "a count is negative"),
            ({"x.in_sum2": np.full((1, 4), np.inf, np.float32), "x.counts": np.ones((1, 1), np.float32)}, "infinite"),
            ({"x.in_sum2": np.full((1, 4), np.nan, np.float32), "x.counts": np.ones((1, 1), np.float32)}, "x: an impo"),
            ({"x.in_sum2": -sums(1, 4), "x.counts": np.ones((1, 1), np.float32)}, "an importance is negative"),
        ],
    )
    def test_inconsistent_entries(self, tensors: dict[str, NDArray[Any]], message: str, tmp_path: Path) -> None:
        with pytest.raises(ImatrixError, match=message):
            Imatrix.load(gguf_file(tmp_path / "i.gguf", tensors))

    def test_a_chunk_count_that_is_no_number(self, tmp_path: Path) -> None:
        writer = GGUFWriter(tmp_path / "i.gguf", "imatrix")
        writer.add_array("imatrix.datasets", ["wiki.txt"])
        writer.add_string("imatrix.chunk_count", "seven")
        writer.add_uint32("imatrix.chunk_size", 512)
        writer.add_tensor("x.in_sum2", sums(1, 4))
        writer.add_tensor("x.counts", np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ImatrixError, match=r"imatrix\.chunk_count is not a number"):
            Imatrix.load(tmp_path / "i.gguf")

    def test_a_cut_file(self, tmp_path: Path) -> None:
        tensors = {f"{PLAIN}.in_sum2": sums(1, 64), f"{PLAIN}.counts": np.ones((1, 1), np.float32)}
        path = gguf_file(tmp_path / "i.gguf", tensors)
        path.write_bytes(path.read_bytes()[:-64])
        with pytest.raises(ImatrixError, match=r"i\.gguf"):
            Imatrix.load(path)


class TestLegacy:
    def test_sums_over_calls_and_the_trailer(self, tmp_path: Path) -> None:
        values = [float(value) for value in sums(1, 6)[0]]
        trailer = struct.pack("<ii", 20, 8) + b"wiki.txt"
        path = legacy_file(
            tmp_path / "i.dat",
            legacy_entry(PLAIN.encode(), 20, values),
            legacy_entry(b"output.weight", 0, values),
            trailer=trailer,
        )
        imatrix = Imatrix.load(path)
        weights, raw = imatrix.weights(PLAIN, 1, 6), imatrix.weights("output.weight", 1, 6)
        assert weights is not None
        assert raw is not None
        assert weights.tobytes() == (np.array(values, np.float32) / np.float32(20)).tobytes()
        assert raw[0].tolist() == values
        assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("wiki.txt",), 20, 0)
        assert imatrix.is_legacy
        assert imatrix.coverage == {}

    @pytest.mark.parametrize(
        ("trailer", "chunks"), [(b"", 0), (b"\x05\0\0\0", 5), (b"\x05\0\0\0\0\0\0\0", 5), (b"\1\2", 0)]
    )
    def test_the_trailer_is_optional(self, trailer: bytes, chunks: int, tmp_path: Path) -> None:
        imatrix = Imatrix.load(legacy_file(tmp_path / "i.dat", legacy_entry(b"x", 1, [1.0]), trailer=trailer))
        assert (imatrix.chunk_count, imatrix.datasets) == (chunks, ())

    def test_experts_share_one_count(self, tmp_path: Path) -> None:
        path = legacy_file(tmp_path / "i.dat", legacy_entry(EXPERTS.encode(), 2, [2.0, 4.0, 6.0, 8.0]))
        weights = Imatrix.load(path).weights(EXPERTS, 2, 2)
        assert weights is not None
        assert weights.tolist() == [[1.0, 2.0], [3.0, 4.0]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "ends before the number of entries"),
            (b"\0\0\0\0", "neither a GGUF file nor a .dat"),
            (b"\xff\xff\xff\xff", "neither a GGUF file nor a .dat"),
            (b"\1\0\0\0", "ends before the name of entry 1"),
            (struct.pack("<ii", 1, -5), "the name of entry 1 claims -5 bytes, 0 are left"),
            (struct.pack("<ii", 1, 1 << 30) + b"abc", "3 are left in the file"),
            (struct.pack("<ii", 1, 2) + b"\xff\xfe", "is not text"),
            (struct.pack("<ii", 1, 1) + b"x", "ends before the calls of x"),
            (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<i", 1), "ends before the size of x"),
            (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 0), "x claims 0 values"),
            (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**31 - 1), "claims 2147483647 values, 0 bytes"),
            (struct.pack("<i", 2) + legacy_entry(b"x", 1, [1.0]), "ends before the name of entry 2"),
            (struct.pack("<i", 2) + 2 * legacy_entry(b"x", 1, [1.0]), "two entries for x"),
            (struct.pack("<i", 1) + legacy_entry(b"x", 1, [float("nan")]), "NaN or infinite"),
            (struct.pack("<i", 1) + legacy_entry(b"x", 1, [-1.0]), "negative"),
            (struct.pack("<i", 1) + legacy_entry(b"x", 1, [1.0]) + struct.pack("<ii", 1, 99), "the name of the text"),
        ],
    )
    def test_files_that_lie(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "i.dat").write_bytes(content)
        with pytest.raises(ImatrixError, match=message):
            Imatrix.load(tmp_path / "i.dat")


class TestFit:
    @pytest.fixture
    def imatrix(self, tmp_path: Path) -> Imatrix:
        entries = (legacy_entry(name, 1, [1.0, 2.0, 3.0, 4.0]) for name in (b"token_embd.weight", PLAIN.encode()))
        return Imatrix.load(legacy_file(tmp_path / "i.dat", *entries))

    def test_names_that_get_weights(self, imatrix: Imatrix) -> None:
        shapes = {"token_embd.weight": (9, 4), PLAIN: (2, 4), "output.weight": (9, 4), "output_norm.weight": (4,)}
        assert imatrix.fit(shapes) == {"token_embd.weight", PLAIN}

    def test_an_embedding_of_another_size_is_left_out(self, imatrix: Imatrix) -> None:
        assert imatrix.fit({"token_embd.weight": (9, 5), PLAIN: (2, 4)}) == {PLAIN}
        assert imatrix.weights("token_embd.weight", 1, 5) is None

    @pytest.mark.parametrize("shape", [(2, 5), (2, 2, 4)])
    def test_any_other_tensor_of_another_size_is_an_error(self, imatrix: Imatrix, shape: tuple[int, ...]) -> None:
        with pytest.raises(ImatrixError, match=rf"{PLAIN} has 4 importances, expected \d x \d for this model"):
            imatrix.fit({PLAIN: shape})
        with pytest.raises(ImatrixError, match="has 4 importances"):
            imatrix.weights(PLAIN, 1, 5)

    def test_of_another_model_altogether(self, imatrix: Imatrix) -> None:
        with pytest.raises(ImatrixError, match="no entry for any tensor of this model"):
            imatrix.fit({"blk.7.attn_q.weight": (4, 4)})

    def test_an_embedding_without_weights_is_refused_while_planning(self, imatrix: Imatrix) -> None:
        shape = Specimen(n_expert=0)
        names = set(shape.matrices()) - {"token_embd.weight"}
        with pytest.raises(ImatrixError, match=r"no entry for token_embd\.weight"):
            choose_types(shape.tensors(), shape.model, TypePolicy(FileType.IQ1_S, pure=True), names)


class TestSave:
    def test_round_trip(self, tmp_path: Path) -> None:
        entries = {
            EXPERTS: (sums(3, 8), np.array([4, 0, 9], np.float32)),
            PLAIN: (sums(1, 5), np.array([6], np.float32)),
        }
        save(tmp_path / "i.gguf", entries, datasets=["a.txt", "b.txt"], chunk_count=3, chunk_size=128)
        imatrix = Imatrix.load(tmp_path / "i.gguf")
        assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("a.txt", "b.txt"), 3, 128)
        assert imatrix.coverage == {EXPERTS: (1,)}
        weights, plain = imatrix.weights(EXPERTS, 3, 8), imatrix.weights(PLAIN, 1, 5)
        assert weights is not None
        assert plain is not None
        assert weights[2].tobytes() == (entries[EXPERTS][0][2] / np.float32(9)).tobytes()
        assert plain.tobytes() == (sums(1, 5) / np.float32(6)).tobytes()
        assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]

    def test_the_data_are_laid_out_as_pypis_gguf_does(self, tmp_path: Path) -> None:
        counts = np.array([4, 2, 9], np.float32)
        save(tmp_path / "ours.gguf", {EXPERTS: (sums(3, 8), counts)}, ["wiki.txt", "code.txt"], 7, 512)
        tensors = {f"{EXPERTS}.in_sum2": sums(3, 8), f"{EXPERTS}.counts": counts[:, None]}
        theirs = gguf_file(tmp_path / "theirs.gguf", tensors)
        assert (tmp_path / "ours.gguf").read_bytes()[-128:] == theirs.read_bytes()[-128:]


def test_what_stands_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    with pytest.raises(ImatrixError, match=r"imatrix.gguf: is a git-lfs pointer in the place of the file"):
        Imatrix.load(path)


def test_a_file_that_is_not_there_or_vanishes(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match=r"gone\.dat: cannot read the importance matrix"):
        Imatrix.load(tmp_path / "gone.dat")
    with pytest.raises(ImatrixError, match="cannot read the importance matrix"):
        Imatrix.load(tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["removed", "emptied"])
def test_a_file_that_changes_after_loading(damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = legacy_file(tmp_path / "i.dat", legacy_entry(b"x", 1, [1.0, 2.0]))
    imatrix = Imatrix.load(path)
    damage(path)
    with pytest.raises(ImatrixError, match="x: cannot read the sums"):
        imatrix.weights("x", 1, 2)
