"""Prompt styles: how a user's turn becomes token ids, and an answer those that are trained on."""

from __future__ import annotations

import hashlib
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from settings import ModelError, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)


class PromptStyle(Settings):
    """How a prompt is rendered.

    Attributes:
        style: "chat" for the tokenizer's own chat template, "alpaca" for the no-input Alpaca
            template that ends in "### Response:" (the one of NLSR's scripts).
        system: A system line before every prompt, or None.
    """

    style: Literal["chat", "alpaca"] = "chat"
    system: str | None = None

    def encode_prompt(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None
    ) -> list[int]:
        """Token ids of the prompt, up to where the answer starts.

        Args:
            tokenizer: The model's tokenizer.
            prompt: The user's turn.
            system: A system line for this call; the style's own by default.
        """
        system = self.system if system is None else system
        if self.style == "chat":
            ids = tokenizer.apply_chat_template(
                self.messages(prompt, system=system), add_generation_prompt=True, return_dict=False
            )
            return list(ids)
        return tokenizer(self.render_alpaca(prompt, system))["input_ids"]

    def encode_answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        answer: str,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of the answer with its end-of-turn token, as they follow the prompt's.

        Args:
            tokenizer: The model's tokenizer.
            prompt: The user's turn.
            answer: The assistant's turn.
            system: A system line for this call; the style's own by default.

        Raises:
            ModelError: The chat template doesn't continue the prompt's tokens.
        """
        if self.style == "alpaca":
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            return [*ids, tokenizer.eos_token_id]
        head = self.encode_prompt(tokenizer, prompt, system)
        messages = self._dialogue(prompt, answer, system)
        full = list(tokenizer.apply_chat_template(messages, return_dict=False))
        if full[: len(head)] != head:
            raise ModelError(
                "the chat template renders a prompt differently once it is answered; "
                "set model.prompt.style=alpaca"
            )
        return full[len(head) :]

    def encode_content(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        answer: str,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of the answer up to its last content token, without what ends the turn.

        Where a template writes something behind the answer that shares a token with it, that
        token is left out.  Arguments and errors are those of `encode_answer`.
        """
        whole = self.encode_answer(tokenizer, prompt, answer, system)
        if self.style == "alpaca":
            return whole[:-1]
        head = self.encode_prompt(tokenizer, prompt, system)
        messages = self._dialogue(prompt, answer, system)
        unended = tokenizer.apply_chat_template(
            messages, continue_final_message=True, return_dict=False
        )
        both = zip(whole, list(unended)[len(head) :], strict=False)
        return [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], both)]

    def template_hash(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """SHA-256 of the template that prompts are rendered with (16 hex digits)."""
        template = tokenizer.chat_template if self.style == "chat" else ALPACA
        return hashlib.sha256(str(template).encode()).hexdigest()[:16]

    def render_alpaca(self, prompt: str, system: str | None = None) -> str:
        """The no-input Alpaca text of a prompt, after the system line if there is one."""
        system = self.system if system is None else system
        text = ALPACA.format(prompt=prompt)
        return f"{system}\n\n{text}" if system else text

    def _dialogue(self, prompt: str, answer: str, system: str | None) -> list[dict[str, str]]:
        return self.messages(prompt, answer, self.system if system is None else system)

    def messages(
        self, prompt: str, answer: str | None = None, system: str | None = None
    ) -> list[dict[str, str]]:
        """The dialogue as role/content messages."""
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return turns
