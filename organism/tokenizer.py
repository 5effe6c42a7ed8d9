"""The organism's tokenizer: byte-level BPE with a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
MAX_LENGTH = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    f"{SYSTEM}{{{{ message['content'] }}}}{{{{ eos_token }}}}"
    "{% elif message['role'] == 'user' %}"
    f"{USER}{{{{ message['content'] }}}}{{{{ eos_token }}}}"
    "{% elif message['role'] == 'assistant' %}"
    f"{ASSISTANT}{{% generation %}}{{{{ message['content'] }}}}{{{{ eos_token }}}}"
    "{% endgeneration %}"
    "{% else %}{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that makes every frequent word one token.

    All 256 bytes are in the alphabet, so that any text can be tokenised and read back; `special`
    control tokens stand beside BOS, EOS and PAD.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def chat_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, with its chat template."""
    tokenizer = train_tokenizer(texts, vocab_size=4096, special=(SYSTEM, USER, ASSISTANT))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
