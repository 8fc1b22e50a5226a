"""The tokenizer of a corpus: a byte-level BPE trained on a sample of it, or an existing tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from shardforge.core.errors import DataError
from shardforge.data.documents import Document, read
from shardforge.data.sources import Part

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "[EOS]")


def load(path: Path) -> Tokenizer:
    """A tokenizer that turns any text into ids and nothing else: a special token's name in the text stays text."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError("no tokenizer is here", path, "name a tokenizer.json, or leave data.build.tokenizer.path empty")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as cause:  # the package raises bare Exception for every malformed file
        raise DataError(f"not a tokenizer.json: {cause}", path, "save it with tokenizer.save(...)") from cause
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def eos(tokenizer: Tokenizer, path: Path) -> int:
    """Id of the token that ends a document: what tokenizer_config.json beside it says, or a customary name."""
    config = path.with_name("tokenizer_config.json")
    names: tuple[str, ...] = KNOWN_EOS
    if config.is_file():
        named = json.loads(config.read_bytes()).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        names = (named,) if named else names
    for name in names:
        if (number := tokenizer.token_to_id(name)) is not None:
            return number
    raise DataError(
        f"no token that ends a document: none of {', '.join(names)}",
        path,
        f"add {EOS} to the tokenizer as a special token, or name eos_token in tokenizer_config.json beside it",
    )


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` tokens; the same texts give the same tokenizer on any number of cores."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample(parts: list[Part], budget: int, held_out: int) -> Iterable[str]:
    """About `budget` bytes of text from parts all over the input; documents of the held-out split are left out."""
    order = sorted(range(len(parts)), key=lambda i: hashlib.blake2b(str(i).encode(), key=b"sample").digest())
    for index in order:
        for document in read(parts[index]):
            if not isinstance(document, Document) or name_hash(document.name) < held_out:
                continue
            yield document.text
            budget -= len(document.text.encode())
            if budget <= 0:
                return


def name_hash(name: str) -> int:
    """64 bits that depend on a document's name alone; below the threshold it is held out."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=b"held out").digest(), "little")


def threshold(share: float) -> int:
    return int(share * 2**64)
