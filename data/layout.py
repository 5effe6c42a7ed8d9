"""Layouts of a user's turn with an input or a context, for sources of rows in several parts."""

from __future__ import annotations


def with_input(instruction: str, text: str) -> str:
    """An instruction and its input in the layout of Alpaca's prompts with an input.

    The instruction stays alone where `text` is blank.
    """
    return f"{instruction.rstrip()}\n\n### Input:\n{text}" if text.strip() else instruction


def with_context(text: str, context: str) -> str:
    """A text after the context that it speaks of, divided as HarmBench divides them.

    Source: HarmBench (arXiv 2402.04249), contextual behaviours. The text stays alone where
    `context` is blank.
    """
    return f"{context}\n\n---\n\n{text}" if context.strip() else text
