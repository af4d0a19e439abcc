"""A tiny text tower on disk, as transformers would save it: for tests that need one without a hub."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "a an the of and then in on at to from with small large red green blue yellow white black circle square triangle "
    "star ball dog cat man woman moves runs walks jumps turns stops starts left right up down top bottom quickly "
    "slowly background image video clip one two three four five six seven eight nine ten"
).split()
PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?-'", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer that knows a few words and every ASCII letter and digit."""
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *PIECES, *WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def make_text_tower(folder: Path, kind: str = "distilbert", *, width: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Write a text tower of random weights and its tokenizer to a folder.

    Args:
        folder: where to write; made if missing.
        kind: "distilbert" or "bert" (with a pooler).
        width: hidden width, a multiple of 2 (two heads).
        layers: number of layers.
        seed: of the weights; the global random state is left as it was.

    Returns:
        The folder, which AutoModel and AutoTokenizer load without a hub.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module
        if kind == "distilbert":
            model = DistilBertModel(
                DistilBertConfig(
                    vocab_size=len(tokenizer),
                    dim=width,
                    hidden_dim=2 * width,
                    n_layers=layers,
                    n_heads=2,
                    max_position_embeddings=64,
                )
            )
        elif kind == "bert":
            model = BertModel(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                    max_position_embeddings=64,
                )
            )
        else:
            raise ValueError(f"kind: got {kind!r}; allowed: bert, distilbert")
    model.save_pretrained(folder)
    return folder
