"""Prompt styles: how a user's turn becomes token ids, and an answer those that are trained on."""

from __future__ import annotations

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
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
    ) -> list[int]:
        """Token ids of the answer with its end-of-turn token, as they follow the prompt's.

        Raises:
            ModelError: The chat template doesn't continue the prompt's tokens.
        """
        if self.style == "alpaca":
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            return [*ids, tokenizer.eos_token_id]
        head = self.encode_prompt(tokenizer, prompt)
        messages = self.messages(prompt, answer, self.system)
        full = list(tokenizer.apply_chat_template(messages, return_dict=False))
        if full[: len(head)] != head:
            raise ModelError(
                "the chat template renders a prompt differently once it is answered; "
                "set model.prompt.style=alpaca"
            )
        return full[len(head) :]

    def render_alpaca(self, prompt: str, system: str | None = None) -> str:
        """The no-input Alpaca text of a prompt, after the system line if there is one."""
        system = self.system if system is None else system
        text = ALPACA.format(prompt=prompt)
        return f"{system}\n\n{text}" if system else text

    def messages(
        self, prompt: str, answer: str | None = None, system: str | None = None
    ) -> list[dict[str, str]]:
        """The dialogue as role/content messages."""
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return turns
