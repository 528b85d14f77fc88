"""BERT's uncased tokenizer: lower case, punctuation split off, then the longest pieces of a ``vocab.txt``."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from act_pipeline.core.errors import UserError

CLS, SEP, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
_MOST_CHARACTERS = 100


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a ``vocab.txt``.

    Attributes:
        ids: piece -> its id, the number of its line from 0 on. A piece that continues a word begins with ``##``.
    """

    ids: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read a ``vocab.txt``, one piece a line.

        Raises:
            UserError: the file cannot be read, or lacks a special token.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path} is no text in UTF-8, expected BERT's vocab.txt, one piece a line") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}), expected BERT's vocab.txt") from None
        ids = {line.rstrip("\r"): index for index, line in enumerate(lines) if line.strip()}
        missing = [token for token in (CLS, SEP, UNKNOWN) if token not in ids]
        if missing:
            raise UserError(f"{path} has no {', '.join(missing)}, expected BERT's vocab.txt, one piece a line")
        return cls(ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, between those of [CLS] and [SEP]."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self.ids[piece] for piece in (CLS, *pieces, SEP)]

    def _pieces(self, word: str) -> list[str]:
        """Return the longest known pieces of a word from the left; [UNK] alone if one is not known."""
        if len(word) > _MOST_CHARACTERS:
            return [UNKNOWN]
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                return [UNKNOWN]
            found.append(prefix + word[start:end])
            start = end
        return found


def _words(text: str) -> list[str]:
    """Return words and punctuation marks in lower case without accents; a CJK character is a word."""
    spaced = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if category == "Mn" or (category.startswith("C") and character not in "\t\n\r") or character == "\ufffd":
            continue
        alone = _is_punctuation(character, category) or _is_cjk(ord(character))
        spaced.append(f" {character} " if alone else character)
    return "".join(spaced).split()


def _is_punctuation(character: str, category: str) -> bool:
    # BERT counts all ASCII symbols, such as $ and ^, as punctuation.
    return category.startswith("P") or (character.isascii() and not character.isalnum() and not character.isspace())


def _is_cjk(code: int) -> bool:
    return (
        0x3400 <= code <= 0x4DBF or 0x4E00 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
    )
