"""Grammars and schemas: what is refused before llama.cpp sees it, and that it takes what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufmoe import Engine, EngineError, InputError, SamplingOptions
from ggufmoe.runtime.grammar import check_grammar, gbnf_of_schema, grammar_of
from tests.runtime.test_engine import text_of
from tests.scripted import Scripted
from tests.stories import ONE_THREAD

GOOD = [
    'root ::= "a"',
    'root ::= (\n "a" | "b" # either\n)+ [^\\n\\x41-\\u00ff-] item{2,3}\r\nitem ::= .? "\\"" {2} | ""',
    'root ::= "a" |\n  "b"\n\n# the end',
    "root ::= [a-z]{0,} | item*\nitem ::= <[5]> !<[6]>",
    'root ::= "ä😀" (("x"?))*',
    'root ::= (("a"{100}){100}){20}',
]
BAD = [
    ("", "no rule 'root'"),
    ('a ::= "x"', "no rule 'root'"),
    ('root = "x"', "line 1: ::= is expected"),
    ('root ::= "x"\nb ::= nothing', "line 2: there is no rule 'nothing'"),
    ('root ::= "x', "not closed"),
    ("root ::= [a-z", "not closed"),
    ('root ::= ("a"', "a bracket is not closed"),
    ('root ::= "a")', r"'\)' is not expected"),
    ('root ::= "\\q"', "unknown escape"),
    ("root ::= * ", "nothing before"),
    ('root ::= "" +', "nothing before"),
    ('root ::= "a"{5,2}', "less than the first"),
    ('root ::= "a"{3000}', "at most 2000"),
    ('root ::= (("a"{0,100}){0,100}){0,100}', "at most 2000"),
    ('root ::= "a"{2,x}', "N,M}"),
    ("root ::= " + "(" * 100_000, "more than 500 deep"),
    ("root ::= <think>", "a token is written"),
    ('root ::= "a\0"', "code 0"),
    ('root ::= "\ud83d"', "surrogate"),
    ("x" * 300_000, "more than 262144 characters"),
    ("\n".join(f'r{i} ::= "a"' for i in range(6000)), "more than 5000 rules"),
]


@pytest.mark.parametrize("grammar", GOOD)
def test_grammars_that_both_take(story: Engine, grammar: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_grammar(grammar)
    story.generate([1], SamplingOptions(grammar=grammar))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("grammar", "why"), BAD)
def test_grammars_that_are_refused(grammar: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        check_grammar(grammar)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("grammar", ['root ::= root "a"', "root ::= a\na ::= b?\nb ::= a"])
def test_rules_that_begin_with_themselves(story: Engine, grammar: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="begin with itself"):
        story.generate([1], SamplingOptions(grammar=grammar))
    assert capfd.readouterr() == ("", "")


def test_a_grammar_binds_the_model(story: Engine) -> None:
    for seed in range(3):
        options = SamplingOptions(seed=seed, grammar='root ::= " two" " three"')
        assert text_of(story.generate(story.tokenize(" dice"), options)) == " two three"


def test_a_dead_end_is_an_error_and_no_crash(write_model: Callable[[Scripted], Path]) -> None:
    spec = Scripted({" on": " on"}, metadata={})
    with Engine(write_model(spec), ONE_THREAD) as engine:
        options = SamplingOptions(temperature=0, grammar="root ::= <[0]> <[9999]>", logit_bias=("0-inf",))
        with pytest.raises(EngineError, match="dead end"):
            list(engine.generate(engine.tokenize(" on"), options))
        assert text_of(engine.generate(engine.tokenize(" on"), SamplingOptions(temperature=0, n_predict=2))) == " on on"


def test_a_schema_binds_the_model(story: Engine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text = text_of(story.generate(story.tokenize(" dice"), SamplingOptions(seed=1, json_schema=json.dumps(schema))))
    assert isinstance(json.loads(text)["a"], bool)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "must be an object"),
        ('{"type": "nonsense"}', "cannot be followed"),
        ('{"type": "array", "items": {}, "minItems": 1000000000}', "minItems must be a number from 0 to 400"),
        ('{"type": "string", "maxLength": "x"}', "maxLength must be"),
        ('{"type": "string", "pattern": "^a{1,999999}$"}', "pattern is too long"),
        ('{"$ref": "http://localhost/x"}', "only what is in the schema itself"),
        ('{"$ref": "#/nowhere"}', "cannot be followed"),
    ],
)
def test_schemas_that_are_refused(schema: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        gbnf_of_schema(schema)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "a"')
    (tmp_path / "s.json").write_text('{"type": "integer"}')
    assert grammar_of(SamplingOptions(grammar_file=tmp_path / "g.gbnf")) == 'root ::= "a"'
    assert "root ::=" in (grammar_of(SamplingOptions(json_schema_file=tmp_path / "s.json")) or "")
    with pytest.raises(InputError, match="cannot be read"):
        grammar_of(SamplingOptions(grammar_file=tmp_path / "no"))


def test_strings_of_a_schema_hold_no_control_characters(write_model: Callable[[Scripted], Path]) -> None:
    with Engine(write_model(Scripted({'"': "<0x0A>", "<0x0A>": "\u00e9"})), ONE_THREAD) as engine:
        for schema in ({"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^.[^x]$"}):
            options = SamplingOptions(temperature=0, json_schema=json.dumps(schema), n_predict=20)
            assert isinstance(json.loads(text_of(engine.generate(engine.tokenize(" on"), options))), str)


def test_constants_of_a_schema_are_written_as_json(story: Engine) -> None:
    for value in ('a\n"b"\\', "\u00e9", "a\\n"):
        options = SamplingOptions(seed=1, json_schema=json.dumps({"const": value}))
        assert json.loads(text_of(story.generate(story.tokenize(" dice"), options))) == value


def test_definitions_of_one_name_in_two_places() -> None:
    places = {place: {"$defs": {"city": {"enum": [place]}}} for place in ("Oslo", "Bern")}
    fields = {place: {"$ref": f"#/$defs/{place}/$defs/city"} for place in places}
    grammar = gbnf_of_schema(json.dumps({"type": "object", "properties": fields, "$defs": places}))
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
    assert {rules[f"json-ref-{n}-is"] for n in range(2)} == {r'"\"Oslo\""', r'"\"Bern\""'}


def test_a_schema_that_refers_to_itself(write_model: Callable[[Scripted], Path]) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}
    options = SamplingOptions(temperature=0, json_schema=json.dumps({"$ref": "#/$defs/tree", "$defs": {"tree": tree}}))
    with Engine(write_model(Scripted({"<0x7B>": "<0x7D>"})), ONE_THREAD) as engine:
        assert json.loads(text_of(engine.generate(engine.tokenize(" on"), options))) == {}
    assert "json-ref-0-is-left ::= json-ref-0\n" in gbnf_of_schema(options.json_schema or "")
