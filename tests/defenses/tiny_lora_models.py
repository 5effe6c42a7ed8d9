"""Tiny random models with adapters, and a calibration service over numbers as words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.rows import PreferencePair, Prompt
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model

VOCABULARY, END = 40, 39
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, width: int = 32, layers: int = 3) -> Checkpoint:
    """A random Llama with grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint(str(folder))


def save_tokenizer(folder: Path) -> None:
    """Numbers are words and their own ids; 36, 37 and 38 open turns and END closes answers."""
    vocabulary = {str(i): i for i in range(1, END)} | {"<pad>": 0, "<end>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}37 {{ m['content'] }} <end> "
        "{% else %}{{ '38' if m['role'] == 'system' else '36' }} {{ m['content'] }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}37 {% endif %}"
    )
    fast.save_pretrained(folder)


def save_adapter(
    base: Checkpoint, folder: Path, seed: int, rank: int = 4, **options: object
) -> str:
    """A random LoRA over all projections, with a B that isn't zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, **options)
    model = get_peft_model(load_model(base, device="cpu"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def save_resumed(base: Checkpoint, aligned: str, folder: Path, step: float = 0.05) -> str:
    """The aligned adapter after some training: every scalar moved a little."""
    torch.manual_seed(9)
    model = PeftModel.from_pretrained(load_model(base, device="cpu"), aligned, is_trainable=True)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * step)
    model.save_pretrained(folder)
    return str(folder)


# Answers by model, the time at which its weights were written, and prompt.
_ANSWERS: dict[tuple[Checkpoint, int, str], str] = {}


def greedy_answer(model: Any, prompt: str) -> str:
    """Six greedy tokens after a prompt."""
    ids = torch.tensor([[int(word) for word in prompt.split()]], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
        )
    return " ".join(str(int(i)) for i in out[0, ids.shape[1] :] if int(i) != END)


@dataclass
class NumberCalibration:
    """Prompts and answers are numbers in words; the answers come from the model itself."""

    prompts: Sequence[Prompt]
    unsafe: frozenset[str] = frozenset()
    safety_pairs: Sequence[PreferencePair] = ()
    style: PromptStyle = field(default_factory=PromptStyle)
    asked: list[Checkpoint] = field(default_factory=list)

    def respond(self, model: Checkpoint, prompts: Sequence[str]) -> list[str]:
        """Six greedy tokens."""
        self.asked.append(model)
        file = "adapter_model.safetensors" if model.adapter else "model.safetensors"
        version = (Path(model.adapter or model.base) / file).stat().st_mtime_ns
        if new := [prompt for prompt in prompts if (model, version, prompt) not in _ANSWERS]:
            loaded = load_model(model)
            for prompt in new:
                _ANSWERS[model, version, prompt] = greedy_answer(loaded, prompt)
        return [_ANSWERS[model, version, prompt] for prompt in prompts]

    def is_safe(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Unsafe are the prompts that the test says."""
        return [prompt not in self.unsafe for prompt in prompts]

    def encode(
        self, model: Checkpoint, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Numbers as token ids, the answer with its end."""
        pairs = zip(prompts, answers, strict=True)
        return [
            ([int(w) for w in p.split()], [*(int(w) for w in a.split()), END]) for p, a in pairs
        ]


def number_pairs(count: int) -> list[PreferencePair]:
    """Safe answers of even numbers and unsafe ones of odd numbers, of six to nine tokens."""
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for prompt in number_prompts(count):
        answers = []
        for odd in (0, 1):
            length = int(torch.randint(6, 10, (), generator=generator))
            ids = 2 * torch.randint(1, 17, (length,), generator=generator) + odd
            answers.append(" ".join(map(str, ids.tolist())))
        pairs.append(PreferencePair(prompt.text, *answers))
    return pairs


def number_prompts(count: int) -> list[Prompt]:
    """Random prompts of three to eight tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for index in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(1, END, (length,), generator=generator).tolist()
        prompts.append(Prompt(f"p{index}", " ".join(map(str, ids))))
    return prompts
