from __future__ import annotations

from random import Random

import pytest
import torch

from smartclip_kernels.train.captions import (
    DRAWS,
    Captions,
    Encoder,
    byte_tokenizer,
    draw,
    kinds,
    word_tokenizer,
)

CAPTIONS = Captions(("king", "red", "gold"), "a crown: {short}. jewels")


def test_every_policy_says_two_things() -> None:
    for policy in ("short", "long", "mixed", "both"):
        assert len(kinds(policy, Random(0))) == DRAWS
    assert kinds("both", Random(0)) == ["long", "short"]
    assert {tuple(kinds("mixed", Random(seed))) for seed in range(40)} == {
        (a, b) for a in ("long", "short") for b in ("long", "short")
    }


def test_long_captions_tell_all_in_any_order() -> None:
    assert CAPTIONS.whole() == "a crown: king, red, gold. jewels"
    drawn = {draw(CAPTIONS, "long", Random(seed)) for seed in range(60)}
    assert len(drawn) == 6
    assert all(
        set(CAPTIONS.short) <= set(text.replace(".", ",").replace(": ", ", ").split(", ")) | {"gold"} for text in drawn
    )


def test_short_captions_are_drawn_alike() -> None:
    drawn = [draw(CAPTIONS, "short", Random(seed)) for seed in range(600)]
    assert set(drawn) == set(CAPTIONS.short)
    assert all(140 < drawn.count(text) < 260 for text in CAPTIONS.short)


def test_a_plain_text_falls_into_clauses() -> None:
    assert Captions.of_text("A dog, asleep. It snores!").short == ("A dog", "asleep", "It snores")
    assert Captions.of_text("...").short == ("...",)
    assert Captions.of_text("A dog, asleep.").whole() == "A dog, asleep."


def test_words_drop_what_is_between_them_and_pad() -> None:
    encode = Encoder(word_tokenizer(["A man, a caña!", "man-eater"]), context=4)
    tokens = encode(["MAN caña", "unheard", "a a a a a a a"])
    vocabulary = encode.tokenizer.get_vocab()
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [2, vocabulary["man"], vocabulary["caña"], 0],
        [2, 1, 0, 0],
        [2] + [vocabulary["a"]] * 3,
    ]


def test_a_vocabulary_does_not_depend_on_the_order_of_texts() -> None:
    texts = ["b a", "c b", "a b"]
    assert word_tokenizer(texts).get_vocab() == word_tokenizer(reversed(texts)).get_vocab()
    assert set(word_tokenizer(texts, size=4).get_vocab()) == {"[pad]", "[unk]", "[start]", "b"}


@pytest.mark.parametrize("text", ["hello", "caña", "火", ""])
def test_bytes_are_utf8(text: str) -> None:
    encode = Encoder(byte_tokenizer(), context=32)
    tokens = encode([text])
    assert encode.size == 259
    assert tokens.shape == (1, 1 + len(text.encode()))
    assert tokens.min() > 1
