"""Stand-ins for judges: byte tokenizers with control tokens, tiny models, a scripted backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evaluation.base import Backend
from evaluation.token_engine import Answer
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from settings import ModelError
from tests.evaluation.conftest import tiny_config

NAMELESS = "<|eom_id|>"
CONTROLS = ["<s>", "</s>", "<pad>", "<|eot_id|>", "<end_of_turn>"]
LLAMA_CHAT = (
    "{{ bos_token }}[INST] Judge the last turn.\n<BEGIN CONVERSATION>\n"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "<END CONVERSATION><|eot_id|>[/INST]"
)


def byte_tokenizer(
    chat: str | None = None, *, opens: bool = True, closes: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte, lossless, with control tokens, as byte-level BPE has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*CONTROLS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = f"{'<s> ' * opens}$A{' </s>' * closes}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    # A control token that the tokenizer has no name for, as Llama 3's has dozens of.
    tokenizer.add_special_tokens([NAMELESS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=CONTROLS[3:],
        chat_template=chat,
        clean_up_tokenization_spaces=False,
    )


def said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What the ids say, control tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def save_judge(folder: Path, chat: str | None = None, **config: Any) -> Path:
    """A random causal model of bytes."""
    import torch

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat)
    model_config = tiny_config(len(tokenizer))
    model_config.update(
        {
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **config,
        }
    )
    LlamaForCausalLM(model_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ScriptedEngine:
    """Replies by what was asked, and keeps the questions."""

    usable = True

    def __init__(self, checkpoint: Checkpoint, context: int | None) -> None:
        self.tokenizer = load_tokenizer(checkpoint)
        self.context = context

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        asked = [said(self.tokenizer, row) for row in ids]
        ScriptedBackend.asked.append(asked)
        ScriptedBackend.limits.append(max_new_tokens)
        return [Answer(ScriptedBackend.reply(text), 1, False) for text in asked]

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        asked = [said(self.tokenizer, row) for row in ids]
        ScriptedBackend.asked.append(asked)
        ScriptedBackend.candidates = [said(self.tokenizer, [each]) for each in candidates]
        return [ScriptedBackend.logprobs(text) for text in asked]

    def close(self) -> None: ...


class ScriptedBackend(Backend):
    """A backend whose models say what a test wants."""

    asked: ClassVar[list[list[str]]] = []
    limits: ClassVar[list[int]] = []
    candidates: ClassVar[list[str]] = []
    reply: ClassVar[Callable[[str], str]]
    logprobs: ClassVar[Callable[[str], list[float]]]

    refuses: bool = False
    context: int | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        if self.refuses:
            raise ModelError("this backend runs nothing")

    def open(self, checkpoint: Checkpoint, style: Any, reference: Any = None) -> Any:
        return ScriptedEngine(checkpoint, self.context)
