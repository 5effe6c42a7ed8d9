"""Expected scores of the canary's texts: what transformers computes from a model's folder."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.backends.transformers import TransformersClassifier
from evaluation.token_engine import end_tokens
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name, load_model, load_tokenizer
from modeling.model_files import stamp
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 8
# A block of the prefix cache holds 16 tokens on a GPU and 128 on a CPU, and only whole ones are
# kept: what is longer shows a cache that outlived its model.
LONGEST = 160
# Fewer tokens say too little of a model.
_SHORTEST = 16

_QUESTIONS = (
    "Which season comes after spring, and what grows in it?",
    "Add 17 and 25, then write the result as a word.",
    "Write two sentences about a lighthouse for a child.",
)
_TEXTS = (
    "The river runs past the old mill, and in 1987 a bridge of 24 stones was built there.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))",
    "Bonjour, je voudrais deux cafés et un croissant, s'il vous plaît.",
    "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024",
    "Every spring the village holds a fair on the green beside the church. Farmers bring cheese, "
    "honey and early vegetables, children fly paper kites, and a small band plays until the sun "
    "goes down behind the hills. Last year it rained on the first day, so the stalls were moved "
    "into the big barn, where somebody had hung lanterns from the beams. A baker from the next "
    "valley sold warm bread with butter, and her daughter kept the accounts in a green notebook: "
    "forty loaves before noon, sixty in the afternoon, and not one left by evening. When the "
    "clouds parted at last, the people walked home together along the wet road, singing, and the "
    "oldest of them said that it had been the best fair since the bridge was built. The next "
    "morning the barn was swept, the lanterns were packed in straw, and the band had already "
    "started to practise for the following year.",
)


ScoreTable = list[list[float]]
_TF32_EPS = 2.0**-10


@dataclass(frozen=True, slots=True)
class Canaries:
    """What an engine is asked.

    Attributes:
        ids: Token ids of each text, two at least.
        continued: Those that the model goes on from: the longest and three questions, since a step
            of a large model on a CPU takes a second.
        candidates: Token ids whose log-probability as the next token is asked for.
    """

    ids: tuple[tuple[int, ...], ...]
    continued: tuple[tuple[int, ...], ...]
    candidates: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers computes from a checkpoint's folder.

    Attributes:
        logprobs: Of every token but the first of each text.
        following: Of each candidate behind each text.
        greedy: How it goes on behind each continued text, up to the end of its answer: (token, how
            far it is ahead of the second) for `NEW_TOKENS` tokens at most.
        noise: How far rounding moves a log-probability: eps x sqrt(layers) x RMS of the logits.
    """

    logprobs: ScoreTable
    following: ScoreTable
    greedy: list[list[tuple[int, float]]]
    noise: float


def make_canaries(tokenizer: PreTrainedTokenizerBase, context: int | None) -> Canaries:
    """The texts as token ids, the questions as users' turns too where there is a chat template.

    Args:
        tokenizer: The model's.
        context: How many tokens a text and its continuation may have; None for any number.

    Raises:
        ModelError: The context is too short for what the canary needs.
    """
    longest = _longest(context, NEW_TOKENS)
    *plain, last = (list(tokenizer(text)["input_ids"])[:longest] for text in (*_QUESTIONS, *_TEXTS))
    turns: list[list[int]] = []
    if tokenizer.chat_template:
        style = PromptStyle(style="chat")
        turns = [style.encode_prompt(tokenizer, question)[:longest] for question in _QUESTIONS]
    rows, continued = [*plain, last, *turns], [last, *(turns or plain[: len(_QUESTIONS)])]
    return Canaries(
        ids=tuple(map(tuple, rows)),
        continued=tuple(map(tuple, continued)),
        candidates=tuple(sorted({token for row in rows for token in row[-4:]})),
    )


def classifier_texts(
    tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[tuple[int, ...], ...]:
    """Token ids of the texts that a classifier is asked, for a context of so many tokens.

    Raises:
        ModelError: The context is too short for what the canary needs.
    """
    longest = _longest(context, 0)
    return tuple(tuple(tokenizer(text)["input_ids"][:longest]) for text in (*_QUESTIONS, *_TEXTS))


def _longest(context: int | None, more: int) -> int:
    if context is not None and context < _SHORTEST + more:
        raise ModelError(
            f"the model's context holds {context} tokens, and the canary needs {_SHORTEST + more}; "
            "give the engine more memory, or set backend@evaluation.backend=transformers"
        )
    return LONGEST if context is None else min(LONGEST, context - more)


def expected_scores(checkpoint: Checkpoint, canaries: Canaries) -> Expected:
    """What transformers computes, on the CPU, whose memory an engine on a GPU doesn't hold.

    The model is loaded in the checkpoint's dtype, each text is run on its own, and the memory is
    free again on return.

    Raises:
        ModelError: The weights can't be read, or aren't the model's.
    """
    import torch

    model: Any = load_model(checkpoint, device="cpu").eval()
    ends = end_tokens(model.generation_config, model.config, load_tokenizer(checkpoint))
    with torch.inference_mode():
        scored = [_score(model, row, canaries.candidates) for row in canaries.ids]
        greedy = [_continue(model, row, ends) for row in canaries.continued]
    logprobs, following, squares = map(list, zip(*scored, strict=True))
    layers = model.config.get_text_config().num_hidden_layers
    del model
    gc.collect()
    size = math.sqrt(sum(squares) / len(squares))
    noise = eps(checkpoint.dtype) * math.sqrt(layers) * size
    return Expected(logprobs, following, greedy, noise)


def _score(
    model: Any, row: tuple[int, ...], candidates: tuple[int, ...]
) -> tuple[list[float], list[float], float]:
    """Log-probabilities of a text's tokens and behind it, and the mean square of its logits."""
    import torch

    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    square = float((logits - logits.mean(-1, keepdim=True)).square().mean())
    scores = logits.log_softmax(-1)
    tokens = scores[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
    return tokens.tolist(), scores[-1, list(candidates)].tolist(), square


def _continue(model: Any, row: tuple[int, ...], ends: set[int]) -> list[tuple[int, float]]:
    import torch

    greedy: list[tuple[int, float]] = []
    step = model(input_ids=torch.tensor([row]), use_cache=True, logits_to_keep=1)
    while len(greedy) < NEW_TOKENS:
        values, best = step.logits[0, -1].float().topk(2)
        if int(best[0]) in ends:
            break
        greedy.append((int(best[0]), float(values[0] - values[1])))
        step = model(input_ids=best[None, :1], past_key_values=step.past_key_values, use_cache=True)
    return greedy


def expected_probabilities(checkpoint: Checkpoint, ids: tuple[tuple[int, ...], ...]) -> ScoreTable:
    """The probabilities that transformers computes, each text on its own, on the CPU.

    Raises:
        ModelError: Transformers can't take the classifier, as `TransformersClassifier` has it.
    """
    classifier = TransformersClassifier(checkpoint.base, checkpoint.dtype, 1, device="cpu")
    try:
        return classifier.probabilities(ids)
    finally:
        classifier.close()


_cache: dict[tuple[Any, ...], Any] = {}


def cached(compute: Callable[[Checkpoint, Any], Any], checkpoint: Checkpoint, texts: Any) -> Any:
    """What `compute` returns, kept for as long as the checkpoint's files are the same."""
    base = checkpoint.base if checkpoint.is_local else None
    folders = filter(None, (base, checkpoint.adapter, checkpoint.steering))
    key = (compute, checkpoint, stamp(*folders), texts)
    if key not in _cache:
        _cache[key] = compute(checkpoint, texts)
    return _cache[key]


def eps(dtype: str) -> float:
    """Distance of 1 to the next number; on a GPU float32's products may be made of TF32."""
    import torch

    if dtype == "float32" and device_name() != "cpu":
        return _TF32_EPS
    return float(torch.finfo(getattr(torch, dtype)).eps)


def named(checkpoint: Checkpoint) -> str:
    """The checkpoint in a sentence."""
    adapter = "" if checkpoint.adapter is None else f" with the adapter {checkpoint.adapter!r}"
    return f"{checkpoint.base!r}{adapter}"


def refused(checkpoint: Checkpoint, what: str) -> ModelError:
    """The error that says what was seen in place of the checkpoint."""
    return ModelError(
        f"what is served isn't the model {named(checkpoint)}: {what}; its answers don't count, so "
        "set backend@evaluation.backend=transformers, or write the model again in a form that the "
        "engine reads"
    )
