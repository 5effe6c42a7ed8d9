"""Prompt styles: how a user's turn becomes token ids, and an answer those that are trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import date
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from settings import ModelError, SettingError, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
# The day that templates get for today's, where no other is set: Llama 3.1's own.
TODAY = "2024-07-26"
# Where a template asks for the day, and in which form.
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# What stands around thoughts.
THOUGHTS = ("<think>", "</think>")
# Tokens that an empty block of thoughts may take.
_NO_THOUGHTS = 16


Turn = tuple[str, str, bool]
"""One turn of a dialogue: role ("system", "user", "assistant"), text, whether it is trained on."""

Encoded = tuple[list[int], list[int]]
"""Token ids of a training row and, as long, their labels: -100 where the loss leaves one out."""


class PromptStyle(Settings):
    """How a prompt is rendered.

    Methods take the model's tokenizer, the user's turn (`prompt`), and a system line for the call
    (`system`; the style's own where it is None, and "" for a system turn without content).  They
    raise a ModelError where the tokenizer has no chat template, or its template refuses the
    dialogue or doesn't continue the prompt's tokens.

    Attributes:
        style: "chat" for the tokenizer's own chat template, "alpaca" for the no-input Alpaca
            template that ends in "### Response:" (the one of NLSR's scripts).
        system: A system line before every prompt, or None.
        system_role: chat: whether the template has a system role. Without one, as in Gemma 2's,
            the system line stands at the head of the user's turn, a blank line after it.
        newline: alpaca: a line break after "### Response:" (Booster's ending).
        bos_in_training: alpaca: whether training prompts begin with the BOS that evaluation
            prompts always have; NLSR's scripts leave it out (arXiv 2412.12497).
        template: chat: arguments of the template, e.g. {"enable_thinking": false}.
        date: chat: the day, e.g. "2026-01-31", that a template which writes today's gets; None:
            `TODAY`. With the clock's, answers to the same prompt would change from day to day.
        thinking: chat: whether answers may begin with thoughts, which end in "</think>" and are
            no part of the answer; None: whether the template knows of such.
    """

    style: Literal["chat", "alpaca"] = "chat"
    system: str | None = None
    system_role: bool = True
    newline: bool = False
    bos_in_training: bool = True
    template: dict[str, Any] = Field(default_factory=dict)
    date: str | None = None
    thinking: bool | None = None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, day: str | None) -> str | None:
        if day is not None:
            date.fromisoformat(day)
        return day

    def identity(self) -> dict[str, Any]:
        """What keys of stages hold; settings that nothing of the template reads are left out."""
        late = {"template", "date", "thinking"}
        return self.model_dump(exclude={name for name in late if not getattr(self, name)})

    def fitted(self, template: str, setting: str | None) -> PromptStyle:
        """This style for one chat template, what the template doesn't read left out.

        Args:
            template: The tokenizer's chat template; "" where it has none, or isn't here yet.
            setting: Where this style stands, e.g. "model.prompt"; None: arguments that the
                template doesn't read are no mistake.

        Raises:
            SettingError: The template doesn't read one of the arguments it would get.
        """
        if self.style != "chat":
            return self
        for name in self.template:
            if setting and template and not re.search(rf"\b{re.escape(name)}\b", template):
                raise SettingError(
                    f"{setting}.template.{name} is nothing that the model's chat template reads; "
                    "correct or remove it"
                )
        thinks = THOUGHTS[1] in template if self.thinking is None else self.thinking
        dated = "strftime_now" in template
        return self.model_copy(
            update={"date": (self.date or TODAY) if dated else None, "thinking": thinks or None}
        )

    def encode_pair(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        answer: str,
        system: str | None = None,
        *,
        training: bool = False,
        content: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, and of the answer as `encode_answer` has it.

        An empty block of thoughts that the template writes before an answer without any is the
        prompt's: it is neither trained on nor scored. `training` is as for `encode_prompt`;
        `content` is whether the answer goes without what ends the turn (`encode_content`).
        """
        head = self.encode_prompt(tokenizer, prompt, system, training=training)
        encode = self.encode_content if content else self.encode_answer
        return _split(tokenizer, head, encode(tokenizer, prompt, answer, system), answer)

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
            turns = self.messages(prompt, system=system)
            return self._rendered(tokenizer, turns, add_generation_prompt=True)
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
        return _after(head, self._rendered(tokenizer, self.messages(prompt, answer, system)))

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
            head, tail = self.encode_pair(tokenizer, prompt, rest[0], system, training=True)
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
                head = self._rendered(tokenizer, before, add_generation_prompt=True)
                tail = _after(head, self._rendered(tokenizer, dialogue))
                head, tail = _split(tokenizer, head, tail, text)
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
        if system is not None and not self.system_role:
            prompt, system = f"{system}\n\n{prompt}" if system else prompt, None
        turns = [] if system is None else [{"role": "system", "content": system}]
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
        return self._rendered(tokenizer, turns, continue_final_message=True)

    def _rendered(
        self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any
    ) -> list[int]:
        from jinja2 import TemplateError

        if tokenizer.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template; set model.prompt.style=alpaca, or "
                "model.base_prompt={style: alpaca} if only the base model's lacks one"
            )
        try:
            template = dated(tokenizer.get_chat_template(), self.date or TODAY)
            ids = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=False, **options, **self.template
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(
                f"the chat template refuses the dialogue ({error}); set "
                "model.prompt.system_role=false if it knows no system role, or "
                "model.prompt.style=alpaca"
            ) from error
        return list(ids)


def dated(template: str, day: str = TODAY) -> str:
    """A chat template with a fixed day wherever it asks for today's.

    Raises:
        ValueError: It computes the form in which it asks.
    """
    fixed = _NOW.sub(lambda call: repr(date.fromisoformat(day).strftime(call[2])), template)
    if "strftime_now(" in fixed:
        raise ValueError("it writes today's date in a form that it computes")
    return fixed


def _split(
    tokenizer: PreTrainedTokenizerBase, head: list[int], tail: list[int], answer: str
) -> tuple[list[int], list[int]]:
    """Prompt and answer, a block of no thoughts and what is blank after it being the prompt's."""
    for count in range(1, min(len(tail), _NO_THOUGHTS) + 1 if THOUGHTS[1] not in answer else 0):
        block = str(tokenizer.decode(tail[:count])).strip()
        if block.endswith(THOUGHTS[1]):
            if block.removeprefix(THOUGHTS[0]).removesuffix(THOUGHTS[1]).strip():
                break
            while count < len(tail) and not str(tokenizer.decode([tail[count]])).strip():
                count += 1
            return head + tail[:count], tail[count:]
    return head, tail


def _after(head: list[int], whole: list[int]) -> list[int]:
    if whole[: len(head)] != head:
        raise ModelError(
            "the chat template renders a prompt differently once it is answered; set "
            "model.prompt.style=alpaca, or in model.prompt.template what turns its thoughts off"
        )
    return whole[len(head) :]
