"""CLIP's tokenizer against open_clip's own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from frozen_fast.models.clip.clip_tokenizer import ClipTokenizer

open_clip = pytest.importorskip("open_clip", reason="needs the extra clip")

CAPTIONS = [
    "a man is playing a guitar on stage",
    "",
    "It's the dog's ball; they'll WON'T we've I'd, I'm you're",
    "  3 people -- 120 cats & 2.5 dogs!!! (fast)  ",
    "a caf\u00e9 in Z\u00fcrich \u00abna\u00efve\u00bb \u4f60\u597d \U0001f600",
    "fish &amp;amp; chips &lt;b&gt;",
    "broken mojibake: cafÃ© â€œquotesâ€\x9d",
    "tabs\tand\nnew lines",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "!!! ! <end> #hash_tag under_score",
    "word " * 100,
]


@pytest.mark.parametrize("max_tokens", [77, 32])
def test_ids_equal_open_clips(max_tokens: int) -> None:
    theirs = open_clip.tokenizer.SimpleTokenizer(context_length=max_tokens)(CAPTIONS)
    ours = ClipTokenizer.build(max_tokens)(CAPTIONS)
    assert ours["input_ids"].shape[1] == max_tokens, "the longest caption fills it"
    expected = theirs.clone()
    assert ours["input_ids"].tolist() == expected.tolist()
    lengths = (theirs == 49407).int().argmax(dim=1) + 1
    assert ours["attention_mask"].sum(dim=1).tolist() == lengths.tolist()


def test_it_can_be_sent_to_workers_and_saved(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.build(32)
    tokenizer.save(tmp_path)
    for copy in (pickle.loads(pickle.dumps(tokenizer)), ClipTokenizer.load(tmp_path, 32)):
        assert copy(CAPTIONS)["input_ids"].equal(tokenizer(CAPTIONS)["input_ids"])
    with pytest.raises(ValueError, match="allowed: a list of strings"):
        tokenizer("one string")
