"""From rows to drafts of examples: how columns are joined, and what is wrong with a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.columns import pieces
from lorakit.data.declaration import Data
from lorakit.data.examples import Example
from lorakit.data.read import Row, is_text
from lorakit.data.split import fingerprint
from lorakit.errors import BadData, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAULTS_LISTED = 8


@dataclass(frozen=True, slots=True)
class Draft:
    """An example whose label has no number yet."""

    context: str
    target: str  # "" stands for the label's word
    label: str | None  # as the row has it
    group: bytes  # drafts of one group stay on one side of the split

    def example(self, labels: tuple[str, ...]) -> Example:
        """The finished example."""
        number = None if self.label is None else label_number(self.label, labels)
        if number is None or self.target:
            return Example(self.context, self.target, number)
        return Example(*joined(self.context, labels[number]), number)


def drafts(rows: Iterable[Row], data: Data, tokenizer: PreTrainedTokenizerBase | None) -> list[Draft]:
    """Read all rows.

    Raises:
        BadData: rows that cannot be used, each with its place and column.
    """
    found: list[Draft] = []
    faults: list[str] = []
    for row in rows:
        try:
            found.append(_draft(row, data, tokenizer))
        except BadData as error:
            faults.append(str(error))
        if len(faults) > FAULTS_LISTED:
            break
    if faults:
        listed = "; ".join(faults[:FAULTS_LISTED]) + ("; and more" if len(faults) > FAULTS_LISTED else "")
        raise BadData(f"mend or remove what cannot be read: {listed}")
    return found


def _draft(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase | None) -> Draft:
    if row.fault:
        raise BadData(f"{row.place} {row.fault}")
    if data.messages:
        context, target = _chat(row, data.messages, tokenizer)
    else:
        context, target = _context(row, data), ""
        if data.target:
            context, target = joined(context, _filled(row, data.target))
    label = _filled(row, data.label) if data.label else None
    if label is not None and data.labels and label_number(label, data.labels) < 0:
        raise BadData(f"{row.place}, column {data.label!r}: {label!r} is no label; {nearest(label, data.labels)}")
    return Draft(context, target, label, fingerprint(_text(row, data.group) if data.group else context))


def _context(row: Row, data: Data) -> str:
    if data.template:
        return "".join(text + (_text(row, column) if column else "") for text, column in pieces(data.template))
    return _text(row, data.context) if data.context else ""


def _filled(row: Row, column: str) -> str:
    if not (text := _text(row, column)).strip():
        raise BadData(f"{row.place}, column {column!r}: is empty")
    return text


def _text(row: Row, column: str) -> str:
    """A cell as text; numbers are written out, whole ones without a point."""
    where = f"{row.place}, column {column!r}:"
    if column not in row.cells:
        raise BadData(f"{where} is missing; {nearest(column, row.cells)}")
    value = row.cells[column]
    if value is None or value != value:  # NaN differs from itself
        raise BadData(f"{where} has no value")
    if not isinstance(value, str | int | float):
        raise BadData(f"{where} holds a {type(value).__name__}, not a text")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not is_text(text):
        raise BadData(f"{where} is not UTF-8; save the file as UTF-8")
    return text


def _chat(row: Row, column: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """The conversation as the model's template writes it, and the last answer with what closes it but for the EOS."""
    where = f"{row.place}, column {column!r}:"
    if tokenizer is None or not tokenizer.chat_template:
        raise BadData(f"{where} chats need a tokenizer with a chat template; choose a chat model")
    turns: Any = row.cells.get(column)
    if not _is_conversation(turns):
        raise BadData(f"{where} must be a list of {{role, content}} texts that ends with the assistant's")
    try:
        context = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # the template is a program of the model's; it may refuse roles in any way
        raise BadData(f"{where} the chat template refuses it: {error}") from error
    if not whole.startswith(context):
        raise BadData(f"{where} the chat template rewrites the turns before the last answer")
    return context, whole[len(context) :].rstrip().removesuffix(str(tokenizer.eos_token or ""))


def _is_conversation(turns: Any) -> bool:
    if not isinstance(turns, list) or len(turns) < 2:
        return False
    texts = [turn.get(key) for turn in turns if isinstance(turn, Mapping) for key in ("role", "content")]
    whole = len(texts) == 2 * len(turns) and all(isinstance(text, str) and is_text(text) for text in texts)
    return whole and turns[-1]["role"] == "assistant" and bool(turns[-1]["content"].strip())


def joined(context: str, target: str) -> tuple[str, str]:
    """Context and target so that one blank between them, where a space must be, belongs to the target.

    >>> joined("Sentiment:", "good"), joined("Sentiment: ", "good"), joined("Poem:\\n", "Ah")
    (('Sentiment:', ' good'), ('Sentiment:', ' good'), ('Poem:\\n', 'Ah'))
    """
    bare = context.rstrip(" ")
    if bare and not bare[-1].isspace() and not target[:1].isspace():
        return bare, " " + target
    return context, target


def label_number(value: str, labels: tuple[str, ...]) -> int:
    """The number of a label given by its name or its number; -1 if it is neither.

    >>> [label_number(value, ("negative", "positive")) for value in ("positive", "0", "2")]
    [1, 0, -1]
    """
    if value in labels:
        return labels.index(value)
    return int(value) if value.isdecimal() and int(value) < len(labels) else -1


def label_names(values: Iterable[str]) -> tuple[str, ...]:
    """Names of the labels that stand in the data: numbers by size, words by the alphabet.

    >>> label_names(["10", "9", "9"]), label_names(["yes", "no"])
    (('9', '10'), ('no', 'yes'))
    """
    names = set(values)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
