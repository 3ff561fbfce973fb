"""Tokenizers: from a text to a row of token numbers, with a start token, an end token and padding.

The end token has the largest number of the vocabulary and occurs once per row, so `argmax` finds it. Padding is 0,
which is also the number of a real token: everything behind the end token is padding.
"""

import gzip
import html
import re
import unicodedata
from functools import lru_cache
from importlib import resources
from itertools import groupby, pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Name = Literal["clip", "bytes"]


class Tokenizer(Protocol):
    size: int
    """Entries of the vocabulary: the last but one starts a row, the last ends it."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without start and end."""
        ...


class Row(NamedTuple):
    tokens: Tensor
    """int32 (context): start, tokens, end, padding"""
    needed: int
    """Tokens of the complete text, start and end included; more than `context` if it was cut."""


def row(tokenizer: Tokenizer, text: str, context: int) -> Row:
    """Tokenize a text for a tower that reads `context` tokens. A longer text loses its end, and keeps the end token."""
    start, end = tokenizer.size - 2, tokenizer.size - 1
    found = tokenizer.encode(text)
    tokens = torch.zeros(context, dtype=torch.int32)
    kept = [start, *found[: context - 2], end]
    tokens[: len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return Row(tokens, len(found) + 2)


@lru_cache(maxsize=2)
def load(name: Name) -> Tokenizer:
    return ClipTokenizer() if name == "clip" else ByteTokenizer()


class ByteTokenizer:
    """UTF-8: a token for each byte. It needs no vocabulary."""

    size = 256 + 2

    def encode(self, text: str) -> list[int]:
        return list(" ".join(text.split()).encode())


class ClipTokenizer:
    """CLIP's byte-pair encoding (arXiv:2103.00020), 49,408 entries, lower case.

    It gives the tokens of the original (openai/CLIP, `simple_tokenizer.py`), with two differences: where the original
    repairs broken encodings with ftfy, this one normalises to NFC and straightens quotation marks; and a text cannot
    contain the start and the end token.
    """

    def __init__(self) -> None:
        packed = (resources.files("vimscale.objectives.text") / "clip_bpe.txt.gz").read_bytes()
        merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")]
        self._letters = _letters_of_bytes()
        letters = list(self._letters.values())
        words = [*letters, *(letter + _END for letter in letters), *("".join(pair) for pair in merges)]
        self._numbers = {word: number for number, word in enumerate(words)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.size = len(words) + 2
        self._known = lru_cache(maxsize=2**16)(self._pieces)

    def encode(self, text: str) -> list[int]:
        return [token for word in words_of(cleaned(text)) for token in self._known(word)]

    def _pieces(self, word: str) -> list[int]:
        """Merge a word's bytes, the pair with the lowest rank first, and return the numbers of what is left."""
        *parts, last = [self._letters[byte] for byte in word.encode()]
        parts.append(last + _END)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, at = list[str](), 0
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == best
                merged.append("".join(parts[at : at + 1 + both]))
                at += 1 + both
            parts = merged
        return [self._numbers[part] for part in parts]


_END = "</w>"
"""Marks the last letter of a word."""
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W_]+|(?:[^\w\s]|_)+", re.IGNORECASE)
_STRAIGHT = dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
"""From curly to straight quotation marks."""


def cleaned(text: str) -> str:
    """Resolve HTML entities, twice as the original does; normalise characters, blanks and case."""
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text).translate(_STRAIGHT)))
    return " ".join(text.split()).lower()


def words_of(text: str) -> list[str]:
    """Split a text into runs of letters, single digits, runs of other characters, and endings such as 's."""
    found: list[str] = []
    for word in _WORDS.findall(text):
        if not word[0].isalnum():
            found.append(word)
            continue
        for is_letter, run in groupby(word, str.isalpha):
            letters = "".join(run)
            found += [letters] if is_letter else letters
    return found


def _letters_of_bytes() -> dict[int, str]:
    """A printable character for each byte, in the vocabulary's order: printable bytes first, as themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
