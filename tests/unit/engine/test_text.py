import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointInvalid
from engine.inference.request import RequestInvalid
from engine.inference.text import IncrementalDecoder, StopFilter, TextCodec
from tests.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def codec(folder):
    return TextCodec.from_directory(folder)


@pytest.mark.parametrize(
    "text", ["plain words", "Grüße, 世界", "👩‍🚀 a 👍", " leading", "a  b\n\nc"]
)
def test_decoding_restores_what_was_encoded(codec, text):
    assert codec.decode(codec.encode(text)) == text


@pytest.mark.parametrize("text", ["plain words", "Grüße, 世界", "👩‍🚀 a 👍", "ends in 世"])
def test_pieces_join_to_the_whole_and_hold_whole_characters(codec, text):
    decoder = IncrementalDecoder(codec)

    pieces = [decoder.push(each) for each in codec.encode(text)] + [decoder.finish()]

    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # the tokenizer has one token a byte, so characters of several bytes were held back
    assert len(pieces) == len(text.encode()) + 1


@pytest.mark.parametrize("text", ["👩🚀", "Hi 日本🚀!", "世👍👍a", "é"])
def test_characters_that_are_spelled_out_in_bytes_are_whole_too(text):
    codec = TextCodec(byte_fallback_tokenizer(), frozenset())
    decoder = IncrementalDecoder(codec)

    pieces = [decoder.push(each) for each in codec.encode(text)] + [decoder.finish()]

    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) == len(text)


def byte_fallback_tokenizer():
    """Of Mistral's kind: what has no token is spelled out in bytes, unknown until the last one."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"Hia !"]
    model = models.BPE(
        {word: index for index, word in enumerate(words)},
        [],
        unk_token="<unk>",  # noqa: S106  a token
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_cut_off_at_the_end_is_shown_as_such(codec):
    decoder = IncrementalDecoder(codec)
    ids = codec.encode("a世")[:-1]

    text = "".join([decoder.push(each) for each in ids])

    assert text == "a"
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


def test_an_answer_keeps_the_blank_that_a_text_alone_would_lose():
    codec = TextCodec(metaspace_tokenizer("▁The", "▁capital", "▁is", "▁Paris", "."), frozenset())
    prompt, answer = codec.encode("The capital is"), codec.encode("Paris.", with_specials=False)
    alone, behind = IncrementalDecoder(codec), IncrementalDecoder(codec, prompt)

    assert "".join(alone.push(each) for each in answer) == "Paris."
    assert "".join(behind.push(each) for each in answer) == " Paris."


def test_a_character_that_a_prompt_began_is_the_answers(codec):
    *begun, last = codec.encode("a世")

    assert IncrementalDecoder(codec, begun).push(last) == "世"
    assert IncrementalDecoder(codec, begun).push(*codec.encode("x", with_specials=False)) == "x"


@pytest.mark.parametrize("kind", ["half a character", "special"])
def test_a_token_costs_the_same_however_long_nothing_whole_comes(codec, kind):
    half = codec.encode("世", with_specials=False)[1]
    token_id = half if kind == "half a character" else min(codec.eos_ids)
    sizes = []
    decode = codec.decode
    counting = TextCodec(codec.tokenizer, codec.eos_ids)
    counting.decode = lambda ids, **options: (sizes.append(len(ids)), decode(ids, **options))[1]
    decoder = IncrementalDecoder(counting)

    text = "".join(decoder.push(token_id) for _ in range(500)) + decoder.push(
        *codec.encode("x", with_specials=False)
    )

    assert max(sizes) < 40
    assert text.endswith("x")
    assert text.count("\N{REPLACEMENT CHARACTER}") == (500 if kind == "half a character" else 0)


def metaspace_tokenizer(*words):
    """Of Llama 2's kind: a blank belongs to the word behind it, and a text drops its first one."""
    vocabulary = {"<unk>": 0} | {word: index for index, word in enumerate(words, 1)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  a token of a vocabulary
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(".", "isolated"),
        ]
    )
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")  # noqa: S106  a token


def test_special_tokens_give_no_text(codec):
    decoder = IncrementalDecoder(codec)
    (end,) = codec.eos_ids

    assert decoder.push(end) == ""
    assert decoder.push(*codec.encode("x")) == "x"


def test_end_tokens_that_the_model_has_no_row_for_are_left_out(tmp_path):
    save_tiny_llama(tmp_path)
    known = TextCodec.from_directory(tmp_path).eos_ids
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    ends = [*known, vocabulary, -1]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    assert TextCodec.from_directory(tmp_path).eos_ids == known


def test_too_many_end_tokens_are_refused_by_their_number(tmp_path):
    save_tiny_llama(tmp_path)
    ends = list(range(40))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    with pytest.raises(CheckpointInvalid, match=r"eos_token_id names 4\d tokens: use up to 32"):
        TextCodec.from_directory(tmp_path)


def test_messages_are_rendered_up_to_where_the_assistant_answers(codec):
    ids = codec.encode_chat([{"role": "user", "content": "hi"}])

    # special tokens of the template are single ids
    assert len(ids) == 1 + 2 + 1 + 1
    assert codec.decode(ids) == "hi"


def test_a_model_without_a_template_says_so(tmp_path):
    save_tiny_llama(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    codec = TextCodec.from_directory(tmp_path)

    with pytest.raises(RequestInvalid, match="no chat template") as caught:
        codec.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 + none }}", "{% if %}"]
)
def test_a_template_that_refuses_the_messages_is_a_bad_request(tmp_path, template):
    save_tiny_llama(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    codec = TextCodec.from_directory(tmp_path)

    with pytest.raises(RequestInvalid, match="the template refuses them"):
        codec.encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    save_tiny_llama(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    codec = TextCodec.from_directory(tmp_path)

    with pytest.raises(RequestInvalid, match="unsafe"):
        codec.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("generation", "expected"), [({}, {256}), ({"eos_token_id": [3, 5]}, {3, 5, 256})]
)
def test_every_end_token_of_the_generation_config_counts(tmp_path, generation, expected):
    save_tiny_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))

    assert TextCodec.from_directory(tmp_path).eos_ids == expected


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_a_missing_or_damaged_tokenizer_is_named(tmp_path, content):
    save_tiny_llama(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)

    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json"):
        TextCodec.from_directory(tmp_path)


def test_a_tokenizer_class_of_the_checkpoint_is_not_imported(tmp_path):
    save_tiny_llama(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('was imported')")

    assert TextCodec.from_directory(tmp_path).encode("a")


def push_all(stops, pieces):
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(each) for each in pieces]
    return shown, stop_filter


@pytest.mark.parametrize(
    "pieces", [["hello END there"], ["hello E", "ND"], ["hello ", "E", "N", "D", "x"]]
)
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(pieces):
    shown, stop_filter = push_all(["END"], pieces)

    assert "".join(shown) == "hello "
    assert stop_filter.is_stopped
    assert stop_filter.finish() == ""


def test_what_could_begin_a_stop_string_is_held_until_it_cannot():
    shown, stop_filter = push_all(["END"], ["aE", "N", "x", "E"])

    assert shown == ["a", "", "ENx", ""]
    assert stop_filter.finish() == "E"
    assert not stop_filter.is_stopped


def test_the_first_of_several_stop_strings_wins():
    shown, _ = push_all(["late", "mid"], ["a mid b late"])

    assert shown == ["a "]


def test_overlapping_beginnings_are_all_considered():
    shown, stop_filter = push_all(["aab"], ["aa", "a", "b"])

    assert "".join(shown) == "a"
    assert stop_filter.is_stopped


def test_without_stop_strings_nothing_is_held():
    shown, _ = push_all([], ["a", "b"])

    assert shown == ["a", "b"]
