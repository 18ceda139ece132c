"""The merged model: every tensor from where the recipe says, rounded and changed; sources compared beforehand."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import yaml

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.opening import Checkpoint
from ggufmoe.checkpoint.source import RouterReport
from ggufmoe.errors import RecipeError
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.merged import MergedModel, open_recipe
from ggufmoe.merge.router import warn_of_router
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import Dtype
from tests.merge.bases import MERGE_CASES, make_models, make_recipe
from tests.tiny import make_checkpoint

_Model = TypeVar("_Model", MergedModel, Checkpoint)

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


_OPEN: list[Any] = []


def opened(model: _Model) -> _Model:
    """``model``, closed after the test."""
    _OPEN.append(model)
    return model


@pytest.fixture(autouse=True)
def close_models() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


def write_recipe(directory: Path, *sources: str, experts: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
    prompts = [["use common sense"], ["solve for x"], ["write a poem"]]
    listed = [
        {"source_model": source, "positive_prompts": prompts[i], **(experts[i] if experts else {})}
        for i, source in enumerate(sources)
    ]
    path = directory / "mixture.yaml"
    path.write_text(yaml.safe_dump({"base_model": sources[0], "experts": listed, **fields}), encoding="utf-8")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "base", arch="mistral", seed=1)
    make_checkpoint(tmp_path / "math", arch="mistral", seed=2)
    return tmp_path


def tensor(model: Any, name: str) -> Any:
    return read_f32(model.tensors[name])


def test_every_tensor_comes_from_where_the_recipe_says(pair: Path) -> None:
    model = opened(open_recipe(write_recipe(pair, "base", "math")))
    model.prepare()
    base, math = opened(open_checkpoint(pair / "base")), opened(open_checkpoint(pair / "math"))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(tensor(model, name), tensor(base, name))
    for expert, source in enumerate((base, math)):
        for part, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            np.testing.assert_array_equal(
                tensor(model, f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"),
                tensor(source, f"model.layers.1.mlp.{projection}.weight"),
            )
    assert not [name for name in model.tensors if ".mlp." in name]


def test_the_config_is_a_mixtrals(pair: Path) -> None:
    model = opened(open_recipe(write_recipe(pair, "base", "math", name="Mini", dtype="float16")))
    assert (model.config.architecture, model.config.n_expert, model.config.n_expert_used) == (
        "MixtralForCausalLM",
        2,
        2,
    )
    raw = model.config.raw
    assert raw["model_type"] == "mixtral"
    assert (raw["num_local_experts"], raw["num_experts_per_tok"]) == (2, 2)
    assert raw["torch_dtype"] == raw["dtype"] == "float16"
    assert raw["sliding_window"] is None
    assert model.provenance.name == "Mini"
    assert [base.name for base in model.provenance.base_models] == ["base", "math"]
    assert "base_model: base" in model.provenance.extra["ggufmoe.recipe"]
    assert {tensor.dtype for tensor in model.tensors.values()} == {Dtype.F16}
    json.dumps(dict(raw))


def test_rope_scaling_is_told_in_the_words_of_both_versions_of_transformers(tmp_path: Path) -> None:
    case = next(case for case in MERGE_CASES if case.name == "byte-level")
    make_models(tmp_path, case)
    raw = opened(open_recipe(make_recipe(tmp_path, case, "random"))).config.raw
    assert raw["rope_parameters"]["rope_theta"] == raw["rope_theta"] == 5e5
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    for key, value in raw["rope_scaling"].items():
        assert raw["rope_parameters"][key] == value
    assert isinstance(raw["rope_scaling"]["original_max_position_embeddings"], int)


def test_the_base_is_opened_once_and_keeps_its_dtype(pair: Path) -> None:
    model = opened(open_recipe(write_recipe(pair, "base", "math", "base")))
    assert len(model.input_paths) == len(set(model.input_paths))
    assert model.provenance.name == "mixture"
    assert {tensor.dtype for tensor in model.tensors.values()} == {Dtype.BF16}


def test_rows_are_rounded_to_the_recipes_dtype(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral", dtype="F32")
    make_checkpoint(tmp_path / "other", arch="mistral", dtype="F32", seed=3)
    model = opened(open_recipe(write_recipe(tmp_path, "base", "other", dtype="bfloat16")))
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = tensor(opened(open_checkpoint(tmp_path / "base")), name)
    rounded = tensor(model, name)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=2**-8)
    assert not (rounded.view(np.uint32) & 0xFFFF).any()


def test_noise_depends_on_the_seed_and_not_on_how_rows_are_read(pair: Path) -> None:
    changes = [{}, {"noise_scale": 0.01}]
    name = "model.layers.1.block_sparse_moe.experts.1.w1.weight"

    def rows(seed: int) -> MergedModel:
        return opened(open_recipe(write_recipe(pair, "base", "math", experts=changes, seed=seed)))

    whole = tensor(rows(1), name)
    pieces = np.concatenate([read_f32(rows(1).tensors[name], start, start + 128) for start in (0, 128, 256, 384)])
    np.testing.assert_array_equal(whole, pieces)
    assert not np.array_equal(whole, tensor(rows(2), name))
    plain = tensor(opened(open_checkpoint(pair / "math")), "model.layers.1.mlp.gate_proj.weight")
    assert float((whole - plain).std()) == pytest.approx(0.01, rel=0.05)
    other = tensor(rows(1), name.replace("w1", "w3")) - tensor(
        opened(open_checkpoint(pair / "math")), "model.layers.1.mlp.up_proj.weight"
    )
    assert abs(float(np.corrcoef(other.ravel(), (whole - plain).ravel())[0, 1])) < 0.02


def test_the_residual_scale_changes_the_down_projection_alone(pair: Path) -> None:
    model = opened(open_recipe(write_recipe(pair, "base", "math", experts=[{}, {"residual_scale": 0.5}])))
    math = opened(open_checkpoint(pair / "math"))
    expert = "model.layers.0.block_sparse_moe.experts.1."
    np.testing.assert_array_equal(
        tensor(model, expert + "w2.weight"), tensor(math, "model.layers.0.mlp.down_proj.weight") / 2
    )
    np.testing.assert_array_equal(
        tensor(model, expert + "w3.weight"), tensor(math, "model.layers.0.mlp.up_proj.weight")
    )


def test_experts_that_are_all_the_base_answer_like_the_base(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="llama", dtype="F32")
    path = write_recipe(tmp_path, "base", "base", "base")
    model = opened(open_recipe(path, allow_identical_experts=True))
    model.prepare()
    prompts = [[1, 20, 30, 40, 50]]
    dense = ForwardPass(opened(open_checkpoint(tmp_path / "base"))).logits(prompts)
    np.testing.assert_allclose(ForwardPass(model).logits(prompts), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"n_layer": 3}, "num_hidden_layers is 3, the base has 2"),
        ({"n_ff": 768}, "intermediate_size is 768, the base has 512"),
        ({"n_head": 8}, "num_attention_heads is 8, the base has 4"),
        ({"n_head_kv": 4}, "num_key_value_heads is 4, the base has 2"),
        ({"arch": "llama"}, "architecture is LlamaForCausalLM, the base has MistralForCausalLM"),
        ({"tokenizer": "bpe"}, "its vocabulary differs from the base's in"),
    ],
)
def test_sources_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, Any], difference: str) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "other", **{"arch": "mistral", "seed": 2, **fields})
    with pytest.raises(RecipeError) as caught:
        opened(open_recipe(write_recipe(tmp_path, "base", "other")))
    assert "the models do not fit together: expert 1 (other): " in str(caught.value)
    assert difference in str(caught.value)


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "other", arch="mistral", n_layer=1, n_ff=768)
    with pytest.raises(RecipeError, match=r"num_hidden_layers.*; expert 1 \(other\): intermediate_size"):
        opened(open_recipe(write_recipe(tmp_path, "base", "other")))


def test_differences_that_may_be_meant_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral", chat_template=TEMPLATE)
    longer = {"max_position_embeddings": 4096, "eos_token_id": 5}
    other = make_checkpoint(tmp_path / "other", arch="mistral", seed=2, chat_template="other", config=longer)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"7": {"content": "<|extra|>"}}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    model = opened(open_recipe(write_recipe(tmp_path, "base", "other")))
    text = "\n".join(model.warnings)
    assert "context of 4096, the base for 2048" in text
    assert "its EOS token is 5, the base's is 2" in text
    assert "its chat template differs" in text
    assert "<|extra|>" in text
    assert set(model.warnings) <= {record.getMessage() for record in caplog.records}


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"rope_theta": 1e6}, "its rope_theta is 1e+06, the base's is 10000; the base's is kept, with its attention"),
        ({"config": {"rms_norm_eps": 1e-6}}, "its rms_norm_eps is 1e-06, the base's is 1e-05"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "its rope scaling is linear (factor 2, original_max_position_embeddings 2048), the base's is none",
        ),
    ],
)
def test_what_only_the_base_needs_may_differ(tmp_path: Path, fields: dict[str, Any], warning: str) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "other", arch="mistral", seed=2, **fields)
    model = opened(open_recipe(write_recipe(tmp_path, "base", "other")))
    assert [text for text in model.warnings if warning in text] == list(model.warnings)
    assert (model.config.rope_theta, model.config.rope_scaling.kind) == (10000.0, "none")
    assert model.config.rms_norm_eps == 1e-5


def test_extra_vocabulary_rows_are_a_warning(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "other", arch="mistral", seed=2, n_vocab=416)
    model = opened(open_recipe(write_recipe(tmp_path, "base", "other")))
    assert model.warnings == ("expert 1 (other): has 416 vocabulary rows, the base 400; the base's are kept",)


def test_a_base_without_a_template_gets_the_first_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "chatty", arch="mistral", seed=2, chat_template=TEMPLATE)
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        model = opened(open_recipe(write_recipe(tmp_path, "base", "chatty")))
    assert model.chat_template == TEMPLATE
    assert "the base model has no chat template; using that of expert 1" in caplog.text


def test_the_recipe_may_choose_the_template_and_the_tokenizer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral", chat_template="base's")
    make_checkpoint(tmp_path / "other", arch="mistral", seed=2, chat_template=TEMPLATE)
    (tmp_path / "mine.jinja").write_text("mine")

    def template(**fields: Any) -> str | None:
        return opened(open_recipe(write_recipe(tmp_path, "base", "other", **fields))).chat_template

    assert template() is None
    assert template(chat_template="base") is None
    assert template(chat_template="expert:1") == TEMPLATE
    assert template(chat_template="mine.jinja") == "mine"
    with pytest.raises(RecipeError, match="the chat template cannot be read"):
        template(chat_template="missing.jinja")
    model = opened(open_recipe(write_recipe(tmp_path, "base", "other", tokenizer_source="expert:1")))
    assert model.tokenizer_dir == (tmp_path / "other").resolve()


def test_a_recipe_may_not_take_any_file_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "other", arch="mistral", seed=2)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "other" / "mine.jinja").write_text("of a source")
    (folder / "below").mkdir()
    (folder / "below" / "mine.jinja").write_text("of the recipe")
    (folder / "link.jinja").symlink_to(tmp_path / "secret")
    (folder / "pointer.jinja").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (tmp_path / "other" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "other" / "link.jinja").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to("circle")

    def template(choice: str, *, allow_outside_files: bool = False) -> str | None:
        path = write_recipe(folder, "../base", "../other", chat_template=choice)
        return opened(open_recipe(path, allow_outside_files=allow_outside_files)).chat_template

    assert template("below/mine.jinja") == "of the recipe"
    assert template("../other/mine.jinja") == template(str(tmp_path / "other" / "mine.jinja")) == "of a source"
    outside = ["../secret", "../other/../secret", "below/../../secret", "link.jinja"]
    outside += ["../other/link.jinja", "../other/linked/secret", "../other/linked/../secret", str(tmp_path / "secret")]
    for choice in outside:
        with pytest.raises(RecipeError, match="lies outside of the recipe's folder and its models' folders"):
            template(choice)
        assert template(choice, allow_outside_files=True) == "secret"
    with pytest.raises(RecipeError, match=r"pointer.jinja: the chat template cannot be read .it is a git-lfs pointer"):
        template("pointer.jinja")
    for choice in ("/dev/zero", "below", "circle"):
        with pytest.raises(RecipeError, match="there is no such file"):
            template(choice, allow_outside_files=True)


def test_a_template_that_the_chosen_expert_lacks_is_an_error(pair: Path) -> None:
    with pytest.raises(RecipeError, match="expert 1 has none"):
        opened(open_recipe(write_recipe(pair, "base", "math", chat_template="expert:1")))


def test_a_mixture_is_no_expert(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral")
    make_checkpoint(tmp_path / "moe", arch="mixtral")
    with pytest.raises(RecipeError, match="moe is a mixture of experts already"):
        opened(open_recipe(write_recipe(tmp_path, "base", "moe")))


def test_router_rows_that_hardly_differ_are_reported(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = [{"positive_prompts": ["solve for x"]}] * 2
    path = write_recipe(pair, "base", "math", experts=same)
    model = opened(open_recipe(path, allow_identical_experts=True))
    model.prepare()
    model.prepare()
    assert "the router hardly tells the experts apart in all layers" in caplog.text


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.0, 9.0, 2.0, 5.0), "in layer 1;"),
        ((9.0, 1.0, np.inf, 1.0), "in layers 0, 2;"),
        ((9.0, np.nan), "in all layers;"),
    ],
)
def test_layers_in_which_router_rows_hardly_differ_are_named(
    caplog: pytest.LogCaptureFixture, numbers: tuple[float, ...], said: str
) -> None:
    warn_of_router(RouterReport("hidden", (), numbers, ()))
    assert f"the router hardly tells the experts apart {said} use prompts that differ more" in caplog.text
