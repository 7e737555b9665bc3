import json
import re
import subprocess
import sys

import pytest
import torch

from engine.errors import GuideFailed
from engine.inference.guide_grammars import MAX_TEXT
from engine.inference.guides import GuideCompiler
from engine.inference.request import RequestInvalid
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import Guide, GuideKind, SamplingParams
from engine.inference.text import TextCodec
from tests.tiny_llama import save_tiny_llama

VOCABULARY = 300
"""More than the tokenizer has."""
LATE = "[bc]{5}(a?){300}a{300}"
"""Becomes too much work behind its sixth token."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.from_directory(save_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compiler(codec):
    return GuideCompiler(codec)


def schema_guide(schema):
    return Guide(kind=GuideKind.JSON_SCHEMA, text=json.dumps(schema))


def allowed_by(matcher):
    row = torch.full((-(-VOCABULARY // 32),), -1, dtype=torch.int32)
    matcher.fill(row)
    bits = (row[:, None] >> torch.arange(32)) & 1
    return bits.flatten().nonzero()[:, 0].tolist()


def walk(compiler, codec, guide, seed):
    """An answer of tokens drawn evenly from those that may follow, and its matcher."""
    matcher, ids = compiler.start(guide), []
    generator = torch.Generator().manual_seed(seed)
    while not matcher.is_finished:
        allowed = allowed_by(matcher)
        token_id = allowed[int(torch.randint(len(allowed), (), generator=generator))]
        if token_id in codec.eos_ids:
            break
        ids.append(token_id)
        matcher.accept(token_id)
        assert len(ids) < 500
    return codec.decode(ids), matcher


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drawn_is_a_document_of_the_schema(compiler, codec, seed):
    found = json.loads(walk(compiler, codec, schema_guide(SCHEMA), seed)[0])

    assert list(found) == ["name", "size", "kind"]
    assert len(found["name"]) <= 3
    assert 0 <= found["size"] <= 99
    assert found["kind"] in {"cat", "dog"}


@pytest.mark.parametrize("expression", [r"[A-Z]{2,4}-\d{3}(x|yz)?", "a/b\n\\/\\w\\+", r"ä|\"|#"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drawn_matches_the_expression(compiler, codec, expression, seed):
    text, _ = walk(compiler, codec, Guide(kind=GuideKind.REGEX, text=expression), seed)

    assert re.fullmatch(expression, text, re.ASCII)


def test_a_grammar_is_followed(compiler, codec):
    guide = Guide(kind=GuideKind.GRAMMAR, text='start: "(" start ")" | "x"')

    text, _ = walk(compiler, codec, guide, 1)

    assert re.fullmatch(r"\(*x\)*", text)
    assert text.count("(") == text.count(")")


def test_any_object_may_come_but_nothing_else(compiler, codec):
    matcher = compiler.start(Guide(kind=GuideKind.JSON_OBJECT))

    first = codec.decode(allowed_by(matcher))

    assert "{" in first
    assert not set(first) & set('["a1')


def test_behind_the_end_only_an_end_token_may_follow(compiler, codec):
    guide = Guide(kind=GuideKind.REGEX, text="no?")
    matcher = compiler.start(guide)
    matcher.accept(*codec.encode("n"))
    open_ended = allowed_by(matcher)
    matcher.accept(*codec.encode("o"))

    assert set(open_ended) == {*codec.encode("o"), *codec.eos_ids}
    assert matcher.is_finished
    assert allowed_by(matcher) == sorted(codec.eos_ids)


@pytest.mark.parametrize(
    ("guide", "field", "reason"),
    [
        (Guide(kind=GuideKind.REGEX, text="("), "guided_regex", "unclosed group"),
        (Guide(kind=GuideKind.REGEX, text="(?=a)b"), "guided_regex", "look-around"),
        (Guide(kind=GuideKind.REGEX, text="x" * (MAX_TEXT + 1)), "guided_regex", "characters"),
        (Guide(kind=GuideKind.GRAMMAR, text="start: x"), "guided_grammar", "unknown name"),
        (Guide(kind=GuideKind.JSON_SCHEMA, text="{"), "response_format", "cannot be read"),
        (Guide(kind=GuideKind.JSON_SCHEMA, text="[1]"), "response_format", "no object"),
        (
            Guide(kind=GuideKind.JSON_SCHEMA, text='{"items":' * 5000 + "{}" + "}" * 5000),
            "response_format",
            "cannot be read",
        ),
        (Guide(kind=GuideKind.REGEX, text="a\ud800"), "guided_regex", "Unicode"),
        (Guide(kind=GuideKind.REGEX, text="(" * 9000 + ")" * 9000), "guided_regex", "nest"),
        (schema_guide({"not": {}}), "response_format", "Unimplemented"),
        (schema_guide({"type": "size"}), "response_format", "size"),
        (schema_guide({"$ref": "http://example.org/x"}), "response_format", "example.org"),
        (
            schema_guide({"type": "integer", "minimum": 2, "maximum": 1}),
            "response_format",
            "Unsatisfiable",
        ),
        (Guide(kind=GuideKind.REGEX, text=r"[^\s\S]"), "guided_regex", "no text follows it"),
        (schema_guide({"$ref": "#"}), "response_format", "no text follows it"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_field_and_reason(compiler, guide, field, reason):
    with pytest.raises(RequestInvalid, match=reason) as caught:
        compiler.check(guide)

    assert caught.value.field == field
    assert len(caught.value.message) < 700


@pytest.mark.parametrize(
    ("guide", "field"),
    [
        (Guide(kind=GuideKind.REGEX, text="a{100000}"), "guided_regex"),
        (Guide(kind=GuideKind.REGEX, text="(a?){300}a{300}"), "guided_regex"),
        (
            schema_guide(
                {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(800)}}
            ),
            "response_format",
        ),
    ],
)
def test_what_is_too_much_work_behind_its_first_token_is_refused(compiler, guide, field):
    with pytest.raises(RequestInvalid, match="make it simpler") as caught:
        compiler.check(guide)

    assert caught.value.field == field


@pytest.mark.parametrize("expression", ["", "a", "a?", "é"])
def test_a_guide_may_end_at_its_first_token_or_before(compiler, expression):
    compiler.check(Guide(kind=GuideKind.REGEX, text=expression))


def test_references_as_deep_as_a_text_can_hold_do_not_overflow_a_stack(compiler, codec):
    depth = 1600
    chain = {f"{i:x}": {"items": {"$ref": f"#/d/{i + 1:x}"}} for i in range(depth)}
    guide = schema_guide({"type": "array", "d": {**chain, f"{depth:x}": {}}, "$ref": "#/d/0"})
    assert len(guide.text) > 0.9 * MAX_TEXT

    matcher = compiler.start(guide)

    assert codec.decode(allowed_by(matcher)) == "["


def test_a_guide_that_takes_too_long_is_refused(compiler, monkeypatch):
    monkeypatch.setattr("engine.inference.guides.MAX_COMPILE_S", 0.0)

    with pytest.raises(RequestInvalid, match="simpler"):
        compiler.check(Guide(kind=GuideKind.REGEX, text="slow"))


def test_no_guide_is_compiled_again_while_as_many_wait_as_may(codec, monkeypatch):
    compiled = []
    compile_guide = GuideCompiler._compile  # noqa: SLF001  counted as it runs
    monkeypatch.setattr(
        GuideCompiler,
        "_compile",
        lambda compiler, guide: compiled.append(guide) or compile_guide(compiler, guide),
    )
    waiting = [Guide(kind=GuideKind.REGEX, text=f"a{{{count}}}") for count in range(1, 41)]
    compiler = GuideCompiler(codec, kept=40)

    for guide in waiting:
        compiler.check(guide)
    for guide in waiting:
        compiler.start(guide)

    assert compiled == waiting


def test_a_tokenizer_whose_bytes_are_unknown_follows_no_guide(codec):
    damaged = TextCodec(codec.tokenizer, frozenset({10**6}))

    with pytest.raises(RequestInvalid, match="tokens are unknown"):
        GuideCompiler(damaged).check(Guide(kind=GuideKind.REGEX, text="a"))


def test_answers_under_one_guide_do_not_share_their_place(compiler, codec):
    guide = Guide(kind=GuideKind.REGEX, text="ab")
    first, second = compiler.start(guide), compiler.start(guide)

    first.accept(*codec.encode("a"))

    assert codec.decode(allowed_by(first)) == "b"
    assert codec.decode(allowed_by(second)) == "a"


def test_a_token_that_may_not_follow_is_the_end_of_a_guide(compiler, codec):
    matcher = compiler.start(Guide(kind=GuideKind.REGEX, text="ab"))

    with pytest.raises(GuideFailed, match="satisfy"):
        matcher.accept(*codec.encode("b"))
    # not the end token, which would pass for an answer
    row = torch.full((10,), -1, dtype=torch.int32)
    with pytest.raises(GuideFailed):
        matcher.fill(row)
    assert not row.any()


def guided_state(compiler, text, drawn_ids=()):
    state = SamplerState(2, VOCABULARY, "cpu", guides=compiler)
    guide = Guide(kind=GuideKind.REGEX, text=text)
    state.open(1, SamplingParams(seed=3, guide=guide), (1, 2), drawn_ids)
    state.open(0, SamplingParams(seed=3, temperature=0.0), (1, 2))
    return state


def answer(state, steps):
    """Tokens of slot 1, beside a slot without a guide that must not notice."""
    tokens, slots = [], torch.tensor([0, 1])
    for step in range(steps):
        logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(step))
        state.send_guides([0, 1])
        free, token_id = state.draw(logits, slots, full=True).tolist()
        assert free == int(logits[0].argmax())
        state.accept(0, [free])
        state.accept(1, [token_id])
        tokens.append(token_id)
    return tokens


def test_a_slot_draws_what_its_guide_allows_and_then_ends(compiler, codec):
    tokens = answer(guided_state(compiler, "[a-c]{3}-[xy]"), 6)

    assert re.fullmatch("[a-c]{3}-[xy]", codec.decode(tokens[:5]))
    assert tokens[5] in codec.eos_ids


def test_a_preempted_slot_goes_on_where_its_guide_stood(compiler, codec):
    drawn = codec.encode("abc-")

    (token_id,) = answer(guided_state(compiler, "[a-c]{3}-[xy]", drawn), 1)

    assert codec.decode([token_id]) in {"x", "y"}


def test_a_guide_that_fails_draws_nothing_more(compiler, codec):
    state = guided_state(compiler, "ab")

    state.accept(1, codec.encode("q"))

    assert answer(state, 2) == [-1, -1]


def test_a_slot_tells_why_its_guide_failed_until_it_is_closed(compiler, codec):
    state = guided_state(compiler, LATE)
    drawn = answer(state, 7)

    failure = state.accept(1, drawn[-1:])
    state.close(1)

    assert re.fullmatch("[bc]{5}a", codec.decode(drawn[:-1]))
    assert drawn[-1] == -1
    assert isinstance(failure, GuideFailed)
    assert "expressions" in failure.message
    assert failure.message.endswith("make it simpler")
    assert state.accept(1, [-1]) is None


def test_a_token_that_no_guide_withheld_fails_without_a_reason(compiler):
    state = guided_state(compiler, "ab")

    assert state.accept(1, [-1]) is None
    assert state.accept(0, [-1]) is None


def test_the_next_sequence_of_a_slot_is_free(compiler):
    state = guided_state(compiler, "ab")
    answer(state, 1)
    state.close(1)
    state.open(1, SamplingParams(seed=3, temperature=0.0), (1, 2))
    logits = torch.randn(1, VOCABULARY)

    state.send_guides([1])

    assert int(state.draw(logits, torch.tensor([1]), full=True)) == int(logits.argmax())


def test_draws_without_guides_need_no_parser():
    code = "import sys, engine.inference.sampler_state as _; sys.exit('llguidance' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
