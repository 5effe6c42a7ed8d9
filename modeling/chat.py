"""Prompt styles: how a user's turn becomes token ids, and an answer those that are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from settings import ModelError, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)


Turn = tuple[str, str, bool]
"""One turn of a dialogue: role ("system", "user", "assistant"), text, whether it is trained on."""

Encoded = tuple[list[int], list[int]]
"""Token ids of a training row and, as long, their labels: -100 where the loss leaves one out."""


class PromptStyle(Settings):
    """How a prompt is rendered.

    Methods take the model's tokenizer, the user's turn (`prompt`), and a system line for the call
    (`system`; the style's own where it is None).  They raise a ModelError where the tokenizer has
    no chat template, or its template refuses the dialogue or doesn't continue the prompt's tokens.

    Attributes:
        style: "chat" for the tokenizer's own chat template, "alpaca" for the no-input Alpaca
            template that ends in "### Response:" (the one of NLSR's scripts).
        system: A system line before every prompt, or None.
        system_role: chat: whether the template has a system role. Without one, as in Gemma 2's,
            the system line stands at the head of the user's turn, a blank line after it.
        newline: alpaca: a line break after "### Response:" (Booster's ending).
        bos_in_training: alpaca: whether training prompts begin with the BOS that evaluation
            prompts always have; NLSR's scripts leave it out (arXiv 2412.12497).
    """

    style: Literal["chat", "alpaca"] = "chat"
    system: str | None = None
    system_role: bool = True
    newline: bool = False
    bos_in_training: bool = True

    def encode_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        system: str | None = None,
        *,
        training: bool = False,
    ) -> list[int]:
        """Token ids of the prompt, up to where the answer starts.

        `training` says whether the prompt is trained on (`bos_in_training`).
        """
        if self.style == "chat":
            return _rendered(
                tokenizer, self.messages(prompt, system=system), add_generation_prompt=True
            )
        special = self.bos_in_training or not training
        text = self.render_alpaca(prompt, system)
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        # Some tokenizers put an EOS behind every text, where the answer is still to come.
        return ids[:-1] if special and ids[-1] == tokenizer.eos_token_id else ids

    def encode_answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        answer: str,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of the answer with its end-of-turn token, as they follow the prompt's."""
        if self.style == "alpaca":
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            return [*ids, tokenizer.eos_token_id]
        head = self.encode_prompt(tokenizer, prompt, system)
        return _after(head, _rendered(tokenizer, self.messages(prompt, answer, system)))

    def encode_dialogue(
        self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]
    ) -> list[Encoded]:
        """A dialogue as training rows, with the loss on every answer that is trained on.

        It is one row, but for templates that render an answer otherwise once the dialogue goes on:
        there each answer is a row with what was before it, as the model sees it when it answers.

        Raises:
            ModelError: Besides as above, the Alpaca template has no place for several questions.
        """
        system = None
        if turns[0][0] == "system":
            (_, system, _), *turns = turns
        prompt, *rest = (text for _, text, _ in turns)
        if len(rest) == 1:
            head = self.encode_prompt(tokenizer, prompt, system, training=True)
            tail = self.encode_answer(tokenizer, prompt, rest[0], system)
            return [(head + tail, [-100] * len(head) + tail)]
        if self.style == "alpaca":
            raise ModelError(
                "the Alpaca template has one question and one answer, and a training row has more; "
                "set model.prompt.style=chat or give rows of one turn"
            )
        rows: list[Encoded] = []
        ids: list[int] = []
        labels: list[int] = []
        dialogue = self.messages(prompt, system=system)
        for role, text, trained in turns[1:]:
            before, dialogue = dialogue, [*dialogue, {"role": role, "content": text}]
            if trained:
                head = _rendered(tokenizer, before, add_generation_prompt=True)
                tail = _after(head, _rendered(tokenizer, dialogue))
                if head[: len(ids)] != ids:
                    rows.append((ids, labels))
                    ids, labels = [], []
                labels = [*labels, *[-100] * (len(head) - len(ids)), *tail]
                ids = head + tail
        return [*rows, (ids, labels)]

    def encode_start(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        start: str,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of the prompt and of the beginning of its answer, for the model to go on.

        `start` is how the answer begins; "" leaves the prompt alone.
        """
        head = self.encode_prompt(tokenizer, prompt, system)
        if not start:
            return head
        if self.style == "alpaca":
            return [*head, *tokenizer(start, add_special_tokens=False)["input_ids"]]
        return head + _after(head, self._unended(tokenizer, prompt, start, system))

    def encode_content(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        answer: str,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of the answer up to its last content token, without what ends the turn.

        Where a template writes something behind the answer that shares a token with it, that
        token is left out.
        """
        whole = self.encode_answer(tokenizer, prompt, answer, system)
        if self.style == "alpaca":
            return whole[:-1]
        head = self.encode_prompt(tokenizer, prompt, system)
        unended = self._unended(tokenizer, prompt, answer, system)
        both = zip(whole, unended[len(head) :], strict=False)
        return [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], both)]

    def template_hash(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """SHA-256 of the template that prompts are rendered with (16 hex digits)."""
        template = tokenizer.chat_template if self.style == "chat" else self._alpaca
        return hashlib.sha256(str(template).encode()).hexdigest()[:16]

    def render_alpaca(self, prompt: str, system: str | None = None) -> str:
        """The no-input Alpaca text of a prompt, after the system line if there is one."""
        system = self.system if system is None else system
        text = self._alpaca.format(prompt=prompt)
        return f"{system}\n\n{text}" if system else text

    def messages(
        self, prompt: str, answer: str | None = None, system: str | None = None
    ) -> list[dict[str, str]]:
        """The dialogue as role/content messages, under `system` or the style's own line."""
        system = self.system if system is None else system
        if system and not self.system_role:
            prompt, system = f"{system}\n\n{prompt}", None
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return turns

    @property
    def _alpaca(self) -> str:
        return ALPACA + "\n" * self.newline

    def _unended(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, system: str | None
    ) -> list[int]:
        """Ids of the whole dialogue up to the end of the answer's text."""
        turns = self.messages(prompt, answer, system)
        return _rendered(tokenizer, turns, continue_final_message=True)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any
) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ModelError(
            "the tokenizer has no chat template; set model.prompt.style=alpaca, or "
            "model.base_prompt={style: alpaca} if only the base model's lacks one"
        )
    try:
        ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    except (TemplateError, ValueError) as error:
        raise ModelError(
            f"the chat template refuses the dialogue ({error}); set model.prompt.system_role=false "
            "if it knows no system role, or model.prompt.style=alpaca"
        ) from error
    return list(ids)


def _after(head: list[int], whole: list[int]) -> list[int]:
    if whole[: len(head)] != head:
        raise ModelError(
            "the chat template renders a prompt differently once it is answered; "
            "set model.prompt.style=alpaca"
        )
    return whole[len(head) :]
