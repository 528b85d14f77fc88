"""The text that an open-vocabulary detector looks for: its tokens, its classes, and the inputs made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError, suggest
from act_pipeline.families.wordpiece import CLS, SEP, Vocabulary

# Token ids of BERT's uncased English vocabulary, which GroundingDINO uses: [CLS], [SEP], "." and "?".
_BERT_ENDS = (101, 102)
_BERT_SEPARATORS = (1012, 1029)
_SEPARATORS = (".", "?")
_KEYS = ("text", "input_ids", "classes")
# Names of the inputs in transformers' and in the original implementation.
_IDS = ("input_ids",)
_SEGMENTS = ("token_type_ids",)
_TEXT_MASKS = ("attention_mask",)
PIXEL_MASKS = ("pixel_mask",)
TEXT_INPUTS = (*_IDS, *_SEGMENTS, *_TEXT_MASKS)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the section ``prompt`` of ``infer_cfg.yml`` holds it.

    Attributes:
        text: the prompt, phrases separated by dots: ``red blood cell . platelet .``.
        input_ids: its token ids from [CLS] to [SEP], without padding.
        classes: class name -> positions of the class's tokens in ``input_ids``, in the order of the class indices.
    """

    text: str
    input_ids: tuple[int, ...]
    classes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, infer_cfg: Mapping[str, Any], where: str) -> Prompt | None:
        """Read the section ``prompt`` of an ``infer_cfg.yml``; None: there is none.

        Args:
            infer_cfg: content of the file.
            where: its path, for messages.

        Raises:
            UserError: the section has a wrong key, type or position, or ``label_list`` names other classes.
        """
        if infer_cfg.get("prompt") is None:
            return None
        section, where = infer_cfg["prompt"], f"{where}: prompt"
        if not isinstance(section, Mapping) or not all(section.get(key) for key in _KEYS):
            raise UserError(
                f"{where} is {section!r}, expected a mapping with {', '.join(_KEYS)}; import the model again"
            )
        unknown = next((str(key) for key in section if key not in _KEYS), None)
        if unknown is not None:
            raise UserError(
                f"{where}.{unknown} is not a known key, expected {', '.join(_KEYS)}{suggest(unknown, _KEYS)}"
            )
        ids = _token_ids(section["input_ids"], f"{where}.input_ids")
        classes = section["classes"]
        if not isinstance(classes, Mapping):
            raise UserError(f"{where}.classes is {classes!r}, expected class name: [positions of its tokens]")
        found = {str(name): _positions(value, len(ids), f"{where}.classes.{name}") for name, value in classes.items()}
        labels = infer_cfg.get("label_list")
        if labels and [str(label) for label in labels] != list(found):
            raise UserError(
                f"{where}.classes are {', '.join(found)}, but label_list has {', '.join(map(str, labels))}; write the "
                "same names in the same order"
            )
        return cls(str(section["text"]), ids, found)

    def section(self) -> dict[str, Any]:
        """Return the section ``prompt`` of ``infer_cfg.yml``."""
        classes = {name: list(positions) for name, positions in self.classes.items()}
        return {"text": self.text, "input_ids": list(self.input_ids), "classes": classes}

    def inputs(
        self, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str], where: object
    ) -> dict[str, np.ndarray]:
        """Return the inputs of a model that the prompt determines, and the mask that marks no pixel as padding.

        Args:
            shapes: input name -> shape, -1 for a dynamic dimension; all inputs of the model.
            dtypes: input name -> dtype.
            where: the model, for messages.

        Returns:
            Name -> [1, ...] of the model's dtype. Token ids are padded with 0 to the model's length.

        Raises:
            UserError: the prompt is longer than the model takes.
        """
        found = {}
        for name in (*TEXT_INPUTS, *PIXEL_MASKS):
            if name not in shapes:
                continue
            sizes = tuple(shapes[name])[1:]
            if name in PIXEL_MASKS:
                # An open height and width broadcast in no graph: only a mask of a fixed size is made here.
                if min(sizes, default=1) < 1:
                    raise UserError(f"{where} takes {name} {list(shapes[name])}, expected a fixed height and width")
                found[name] = np.ones((1, *sizes), dtypes[name])
                continue
            length = sizes[0] if sizes and sizes[0] > 0 else len(self.input_ids)
            check_length(self.input_ids, length, where)
            row = np.zeros((1, length), dtypes[name])
            if name in _IDS:
                row[0, : len(self.input_ids)] = self.input_ids
            elif name in _TEXT_MASKS:
                row[0, : len(self.input_ids)] = 1
            found[name] = row
        return found


def make_prompt(
    text: str,
    classes: Mapping[str, str | Sequence[int]] | Sequence[str] | None = None,
    *,
    input_ids: Sequence[int] | None = None,
    vocab: Path | None = None,
    length: int | None = None,
) -> Prompt:
    """Return a prompt of a text.

    Args:
        text: phrases separated by dots.
        classes: class name -> its phrase, or the positions of its tokens; or names that are phrases; None: every phrase
            is a class.
        input_ids: the token ids from [CLS] to [SEP], if ``vocab`` is not given; zeros at the end are padding.
        vocab: ``vocab.txt`` of a BERT tokenizer, which makes the ids.
        length: the largest number of tokens that the model takes; None: no limit.

    Raises:
        UserError: neither ids nor vocabulary are given, the ids do not fit the text, the prompt is longer than
            ``length``, or a class has no phrase in the prompt.
    """
    # The last phrase ends with a dot too, as in training.
    text = " ".join(text.split())
    text = text if text.endswith(_SEPARATORS) else f"{text} ."
    separators: tuple[int, ...]
    if input_ids is not None:
        ids, separators = _token_ids(input_ids, "the prompt's input_ids"), _BERT_SEPARATORS
        ends = _BERT_ENDS
    elif vocab is not None:
        vocabulary = Vocabulary.read(vocab)
        ids = tuple(vocabulary.encode(text))
        separators = tuple(vocabulary.ids[mark] for mark in _SEPARATORS if mark in vocabulary.ids)
        ends = (vocabulary.ids[CLS], vocabulary.ids[SEP])
    else:
        raise UserError(
            f"the prompt {text!r} has no token ids; give the vocab.txt of the model's tokenizer, which makes them "
            "(--vocab, vocab=), or the ids (--input_ids, input_ids=)"
        )
    if length is not None:
        check_length(ids, length, f"the prompt {text!r}")
    phrases = _phrases(text, ids, separators, ends)
    wanted: Mapping[str, str | Sequence[int]]
    if classes is None:
        wanted = {phrase: phrase for phrase in phrases}
    elif isinstance(classes, Mapping):
        wanted = classes
    else:
        wanted = {name: name for name in classes}
    found = {}
    for name, phrase in wanted.items():
        if not isinstance(phrase, str):
            found[str(name)] = _positions(phrase, len(ids), f"the class {name}")
            continue
        if _plain(phrase) not in phrases:
            raise UserError(
                f"the class {name!r} is the phrase {phrase!r}, which is none of the prompt's: {', '.join(phrases)}"
                f"{suggest(_plain(phrase), list(phrases))}; write it into the prompt, or correct it"
            )
        found[str(name)] = phrases[_plain(phrase)]
    return Prompt(text, ids, found)


def check_length(ids: Sequence[int], length: int, where: object) -> None:
    """Check that a prompt is not longer than a model takes.

    Raises:
        UserError: it is.
    """
    if len(ids) > length:
        raise UserError(
            f"{where}: the prompt has {len(ids)} tokens, expected at most the {length} that the model was exported "
            "for; shorten the prompt, or export the model for more tokens"
        )


def _phrases(
    text: str, ids: Sequence[int], separators: Sequence[int], ends: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return phrase -> positions of its tokens: those between two separators."""
    names = [_plain(phrase) for phrase in text.replace("?", ".").split(".") if phrase.strip()]
    groups: list[list[int]] = [[]]
    for position, token in enumerate(ids):
        if token in separators:
            groups.append([])
        elif token not in ends:
            groups[-1].append(position)
    found = [tuple(group) for group in groups if group]
    if len(found) != len(names):
        raise UserError(
            f"the prompt {text!r} has {len(names)} phrases, but its token ids have {len(found)} between dots; give the "
            "ids of this text"
        )
    return dict(zip(names, found))


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not _are_counts(value):
        raise UserError(f"{where} is {value!r}, expected a list of token ids")
    ids = list(value)
    while ids and ids[-1] == 0:
        ids.pop()
    if not ids:
        raise UserError(f"{where} has padding only, expected token ids")
    return tuple(ids)


def _positions(value: Any, length: int, where: str) -> tuple[int, ...]:
    if not _are_counts(value) or not value or max(value) >= length:
        raise UserError(f"{where} is {value!r}, expected positions of tokens from 0 to {length - 1}")
    return tuple(value)


def _are_counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value
    )
