"""Templates of judges: official instruction texts, read where they are published, and rendering.

The instruction texts of published judges are not this project's to ship. Each is read from a file
that the user names, from the model card beside the weights, or from the place it is published at;
the SHA-256 of the text that was read goes into the record.

A text to be judged must not steer its judge. In a prompt or an answer every control token of the
judge's tokenizer, and every turn marker that the instruction itself is built with ("[/INST]",
"<|assistant|>"), is broken up by a space behind its first character before the whole is tokenised
(`plain`). All else is tokenised as the judges' authors do, as one text: rendering fixed parts and
contents apart would change the tokens where they meet. `split_special_tokens` of transformers is
no substitute, since it leaves the added tokens that aren't marked as special as they are.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Literal

from modeling.chat import dated
from settings import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)
_LITERAL = re.compile(r"'''.*?'''|\"\"\".*?\"\"\"", re.DOTALL)
_MARKER = re.compile(r"\[/?[A-Z]+\]|<</?[A-Z]+>>|<\|?/?\w+\|?>|<(?:BEGIN|END) [A-Z ]+>")
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class PublishedText:
    """Where an official instruction text is published, and how it is told from its surroundings.

    Attributes:
        place: Hub id of the model whose card holds the text as a triple-quoted Python string, or
            the URL of a JSON file.
        prompt: Placeholder of the user's request, without braces.
        answer: Placeholder of the answer to judge.
        key: The text's key in the JSON file; "" for a card.
        sha256: Hash of the text as it was published when this was written, or "" where unknown.
            Another text is used with a warning: a publisher may correct it, and a user may bring
            their own.
    """

    place: str
    prompt: str
    answer: str
    key: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction text around a prompt and an answer.

    Attributes:
        text: The text, with `{prompt}` and `{answer}` named as `published` says.
        source: Where it was read: "file", or the place with the revision.
        published: Its placeholders.
    """

    text: str
    source: str
    published: PublishedText

    def identity(self) -> dict[str, str]:
        return {"sha256": sha256(self.text), "source": self.source}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, opener: str = ""
    ) -> list[int]:
        """Token ids of the filled-in text, behind exactly one BOS if the tokenizer writes one.

        `opener` is what the judge's authors write right before the answer, e.g. a BOS.
        """
        marks = control_marks(tokenizer, self.text)
        contents = {
            self.published.prompt: plain(prompt, marks),
            self.published.answer: opener + plain(answer, marks),
        }
        pieces = Formatter().parse(self.text)
        text = "".join(fixed + (contents[name] if name else "") for fixed, name, _, _ in pieces)
        holds_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = list(tokenizer(text, add_special_tokens=not holds_bos)["input_ids"])
        # Some tokenizers put an EOS behind every text, where the verdict is still to come.
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def read_instruction(
    published: PublishedText, path: str | None, folder: str, revision: str | None, setting: str
) -> Instruction:
    """Reads an official instruction text.

    Args:
        published: Where it is published.
        path: A file that holds the text itself, or the whole card or JSON file; None to look
            beside the weights, then at the place it is published at.
        folder: The judge's weights.
        revision: Hub revision of the card; None for the newest.
        setting: The setting that names `path`, for the message.

    Raises:
        ModelError: The file can't be read or fetched, or holds no such text, or several.
    """
    document, source = _locate(published, path, folder, revision, setting)
    text = cut_out(document, published)
    if text is None:
        raise ModelError(
            f"{source} holds no single instruction text with {{{published.prompt}}} and "
            f"{{{published.answer}}}; set {setting} to a file that holds the text alone"
        )
    if published.sha256 and sha256(text) != published.sha256:
        _LOG.warning(
            "the instruction text of %s (%s) differs from the one known as official; "
            "verdicts may not compare with published ones",
            published.place,
            source,
        )
    return Instruction(text, source if path is None else "file", published)


def cut_out(document: str, published: PublishedText) -> str | None:
    """The instruction text in a document, or None if there is none, or more than one.

    It is the value under the published key of a JSON object, else the only triple-quoted string
    with exactly the two placeholders, else the whole document if that has exactly those.
    """
    wanted = {published.prompt, published.answer}
    if published.key:
        try:
            parsed = json.loads(document)
        except ValueError:
            parsed = {published.key: document}
        value = parsed.get(published.key) if isinstance(parsed, dict) else None
        return value if isinstance(value, str) and _placeholders(value) == wanted else None
    literals = dict.fromkeys(map(_evaluated, _LITERAL.findall(document)))
    texts = [text for text in literals if _placeholders(text) == wanted]
    if not literals and _placeholders(document) == wanted:
        return document
    return texts[0] if len(texts) == 1 else None


def sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, prompted: bool
) -> list[int]:
    """Token ids of a dialogue in the tokenizer's own chat template, its contents made `plain`.

    `prompted` asks the template to open the assistant's next turn.

    Raises:
        ModelError: There is no chat template, or it refuses the dialogue.
    """
    from jinja2 import TemplateError

    marks = control_marks(tokenizer, chat_template(tokenizer))
    turns = [{**turn, "content": plain(turn["content"], marks)} for turn in messages]
    try:
        ids = tokenizer.apply_chat_template(
            turns,
            chat_template=dated(chat_template(tokenizer)),
            add_generation_prompt=prompted,
            return_dict=False,
        )
    except (TemplateError, ValueError) as error:
        raise ModelError(f"the judge's chat template refuses the dialogue ({error})") from error
    return list(ids)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template.

    Raises:
        ModelError: It has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError("the judge's tokenizer has no chat template") from error


def control_marks(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """What must not stand in a text to be judged, longest first.

    The tokenizer's special tokens, those of its added tokens that the template holds, and the
    template's turn markers, whether they are tokens or plain text.
    """
    controls = tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer)))
    added = [token for token in tokenizer.get_added_vocab() if token in template]
    marks = {*controls, *added, *_MARKER.findall(template)}
    return tuple(sorted((mark for mark in marks if len(mark.strip()) > 1), key=len, reverse=True))


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens, those that the tokenizer has no name for included."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(each for each, token in added if token.special)}


def plain(text: str, marks: Iterable[str]) -> str:
    """The text with a space behind the first character of every mark in it.

    Nothing is taken out, so that what stands on both sides of a mark can't join into another.
    """
    pattern = re.compile("|".join(map(re.escape, marks)))
    while pattern.pattern and pattern.search(text):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def clip(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int, keep: Literal["start", "end"]
) -> tuple[str, bool]:
    """At most `limit` tokens of a text, special ones not counted, and whether it was cut.

    The tokenizer must know where in the text each token stands.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    if len(offsets) <= limit:
        return text, False
    return (text[: offsets[limit - 1][1]] if keep == "start" else text[offsets[-limit][0] :]), True


def _locate(
    published: PublishedText, path: str | None, folder: str, revision: str | None, setting: str
) -> tuple[str, str]:
    """The text of the file, card or JSON document, and where it was read."""
    if path is not None:
        try:
            # Line ends count: the text is hashed and tokenised as it is.
            return Path(path).read_bytes().decode(), path
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{setting}={path!r} can't be read ({error}); set it to a text file"
            ) from error
    beside = Path(folder) / CARD
    if not published.key and beside.is_file():
        card = beside.read_text(encoding="utf-8")
        if cut_out(card, published) is not None:
            return card, f"the weights' {CARD}"
    try:
        return _fetched(published, revision)
    except Exception as error:
        # Each protocol's client raises errors of its own for a network that isn't there.
        raise ModelError(
            f"the instruction text can't be fetched from {published.place!r} "
            f"({first_line(error)}); connect to a network, or set {setting} to a copy of that file "
            "or model card"
        ) from error


def _fetched(published: PublishedText, revision: str | None) -> tuple[str, str]:
    import fsspec  # type: ignore[import-untyped]
    from huggingface_hub import cached_assets_path, hf_hub_download

    if not published.key:
        card = Path(hf_hub_download(published.place, CARD, revision=revision))
        return card.read_text(encoding="utf-8"), f"{published.place}/{CARD}@{card.parent.name}"
    cache = {"cache_storage": str(cached_assets_path("relock", namespace="templates"))}
    place = f"filecache::{published.place}"
    with fsspec.open(place, "rt", encoding="utf-8", filecache=cache) as file:
        return str(file.read()), published.place


def _placeholders(text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError:
        return set()


def _evaluated(literal: str) -> str:
    try:
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""
