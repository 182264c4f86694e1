"""Text and token ids: streamed pieces join to the whole text, and stop strings never show."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flashformer.engine.detokenizer import byte_level_table, token_bytes
from flashformer.engine.stop_strings import StopStrings
from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import CheckpointError, UsageError

TEXTS = [
    "Grüße, 世界! 👩‍👩‍👧‍👦 family, e\u0301 combining, नमस्ते, flags 🇩🇪🇯🇵.",
    "   leading spaces, tabs\t\tand\n\nnew lines   ",
    "<|user|> looks special but is text; \ufffd is a real replacement character",
    "\U0001d518\U0001d52b \U0010ffff \x00 nul",
]


def byte_level(special=("<s>", "</s>")):
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    library.add_tokens(["<added é>", " plain"])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(library.to_str(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def sentencepiece(strip=True):
    """The shape of Llama 2's tokenizer: spaces as U+2581, bytes for characters outside of it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁Hello", "Hello", "▁world", "世", "!", "a", "▁▁", "\ufffd"]
    library = Library(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    library.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(library.to_str(), {})


def metaspace():
    library = Library(models.BPE({p: i for i, p in enumerate(["<unk>", "▁", "▁a", "b", "▁▁"])}, []))
    library.decoder = decoders.Metaspace()
    return Tokenizer(library.to_str(), {})


def without_decoder():
    return Tokenizer(Library(models.BPE({p: i for i, p in enumerate("abc")}, [])).to_str(), {})


KINDS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece_unstripped": sentencepiece(strip=False),
    "metaspace": metaspace(),
    "none": without_decoder(),
}


def streamed(tokenizer, ids, *, skip=True):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("skip", [True, False])
def test_streamed_pieces_join_to_the_decoding_of_all_tokens(kind, skip):
    """2,000 random sequences a kind, most of them with characters cut by tokens or broken bytes."""
    tokenizer = KINDS[kind]
    rng = random.Random(kind)
    for _ in range(1000):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(24))]
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(streamed(tokenizer, ids, skip=skip)) == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_a_part_of_a_character(kind, text):
    tokenizer = KINDS[kind]
    text = text.replace("\ufffd", "?")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    # sentencepiece puts a space before the text and takes it away again
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_its_characters_are_complete():
    tokenizer = KINDS["byte_level"]
    table = {byte: char for char, byte in byte_level_table().items()}
    ids = [tokenizer.token_id(table[byte]) for byte in "a👍b".encode()]
    assert streamed(tokenizer, ids) == ["a", "", "", "", "👍", "b", ""]


def test_a_run_of_bytes_waits_until_it_is_known_to_be_text():
    tokenizer = KINDS["sentencepiece"]
    byte = {b: tokenizer.token_id(f"<0x{b:02X}>") for b in range(256)}
    word = tokenizer.token_id("Hello")
    good = [byte[b] for b in "é".encode()]
    assert streamed(tokenizer, [word, *good, word]) == ["Hello", "", "", "éHello", ""]
    assert streamed(tokenizer, [word, *good, byte[255], word])[-2] == "\ufffd\ufffd\ufffdHello"


@pytest.mark.parametrize(("kind", "name"), [("byte_level", "Ģ"), ("sentencepiece", "<0x80>")])
def test_a_long_run_of_broken_bytes_is_not_decoded_again_for_every_token(kind, name):
    tokenizer = KINDS[kind]
    lengths = []

    class Counting(Tokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            lengths.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    ids = [tokenizer.token_id(name)] * 5000
    pieces = streamed(Counting(tokenizer._backend.to_str(), {}), ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "\ufffd" * 5000
    assert sum(lengths) <= 2 * len(ids)


def test_the_post_processor_decides_about_the_bos_token():
    tokenizer = KINDS["byte_level"]
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id == 0
    assert tokenizer.encode("hi", add_special_tokens=False)[0] != 0
    assert KINDS["sentencepiece"].encode("Hello world!")[0] != 1
    assert tokenizer.eos_token_id == 1


def test_a_training_run_s_truncation_and_padding_are_ignored():
    library = Library.from_str(byte_level()._backend.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=10)
    tokenizer = Tokenizer(library.to_str(), {})
    assert 10 < len(tokenizer.encode(TEXTS[0])) == len(byte_level().encode(TEXTS[0]))


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(UsageError, match="surrogate pair at character 2"):
        KINDS["byte_level"].encode("ab\ud800")


def test_bytes_of_a_byte_level_token():
    assert token_bytes("Ġhi") == b" hi"
    assert token_bytes("世") == "世".encode()


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


def test_a_folder_s_special_tokens_come_from_either_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level()._backend.to_str())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "null"])
def test_a_damaged_tokenizer_is_refused_with_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="UTF-8"):
        Tokenizer.from_folder(tmp_path)


def cut_by_definition(text, strings, include):
    """The first character whose arrival completes a stop string; of several the longest."""
    for end in range(1, len(text) + 1):
        matches = [s for s in strings if text[:end].endswith(s)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab世", max_size=30),
    strings=st.lists(st.text("ab世", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
def test_a_stop_string_ends_the_text_however_it_is_cut(text, strings, cuts, include):
    stop = StopStrings(strings, include=include)
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    shown, found = "", None
    for start, end in itertools.pairwise(edges):
        piece, found = stop.add(text[start:end])
        shown += piece
        if found is not None:
            break
        expected_so_far, _ = cut_by_definition(text, strings, include)
        assert expected_so_far.startswith(shown)
    if found is None:
        shown += stop.finish()
    assert (shown, found) == cut_by_definition(text, strings, include)
