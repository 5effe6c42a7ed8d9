"""Canary: a served model's answers count once it is seen to be the model on disk.

An engine may load a folder without a word and serve another model: biases dropped, missing ones
read as noise, weights or a prefix cache of the model before, an adapter that isn't applied.  What
it says of fixed harmless texts is therefore held against what transformers computes from the same
folder, and against the undefended model.

How far the two may differ was measured (docs/serving.md).  Rounding in bfloat16 and float16 moves a
token's log-probability by about n = eps x sqrt(layers) x RMS of the logits (each position's mean
taken off), as in `modeling.verify`: every layer rounds the residual stream to eps / 2 of its size,
and independent errors add up as the square root of their number.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.backends.answers import end_tokens
from evaluation.base import Answer, Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import (
    Checkpoint,
    device_name,
    load_model,
    load_tokenizer,
    local_folder,
    weight_files,
)
from modeling.headers import read_header
from modeling.heads import read_config
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

NEW_TOKENS = 8
# A block of the prefix cache holds 16 tokens on a GPU and 128 on a CPU, and only whole ones are
# kept: what is longer shows a cache that outlived its model.
LONGEST = 160

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

# The longest text, and the questions as users' turns.
_CONTINUED = 1 + len(_QUESTIONS)
_FLOAT32 = 1e-3
_TF32_EPS = 2.0**-10
_NOISE_FACTOR = 8.0
# The part of an edit that is found is then off by a tenth at most, where half decides.
_LEAST_EFFECT = 10.0

Rows = list[list[float]]


@dataclass(frozen=True, slots=True)
class Canaries:
    """What an engine is asked.

    Attributes:
        ids: Token ids of each text, two at least.
        candidates: Token ids whose log-probability as the next token is asked for.
    """

    ids: tuple[tuple[int, ...], ...]
    candidates: tuple[int, ...]

    @property
    def continued(self) -> tuple[tuple[int, ...], ...]:
        """The texts that the model goes on from; a step of a large one on a CPU takes a second."""
        return self.ids[-_CONTINUED:]


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes from a checkpoint's folder.

    Attributes:
        logprobs: Of every token but the first of each text.
        following: Of each candidate behind each text.
        greedy: How it goes on behind each continued text, up to the end of its answer: (token, how
            far it is ahead of the second) for `NEW_TOKENS` tokens at most.
        noise: How far rounding moves a log-probability: eps x sqrt(layers) x RMS of the logits.
    """

    logprobs: Rows
    following: Rows
    greedy: list[list[tuple[int, float]]]
    noise: float


def verify(
    served: Engine,
    checkpoint: Checkpoint,
    undefended: Checkpoint | None = None,
    *,
    reference: Callable[[Checkpoint, Canaries], Reference] | None = None,
) -> None:
    """Refuses an engine that doesn't serve the model it was given.

    On at most `LONGEST` tokens of each text, of which the engine must hold `NEW_TOKENS` more:

    - Log-probabilities are finite, and so are those of next tokens; text is generated.
    - A text's tokens, and the candidates behind it, have transformers' log-probabilities: RMS
      difference at most 1e-3 in float32 on a CPU, 8 n elsewhere (n above; eps is TF32's for float32
      on a GPU).
    - The greedy continuation is transformers' own, as far as its best token is ahead of the second
      by more than rounding explains.
    - With `undefended`: the part of the edit's effect that is found, by projection, is within 0.5
      of 1; 0 is the undefended model.  Rounding, not being along the effect, hardly moves it.
      Where the effect is too small to tell from rounding, a warning says so.

    A model that transformers itself finds broken (not finite) passes with a warning if it is
    served as broken as it is: its answers will be recorded as empty.

    Args:
        served: The engine.  What its prefix cache holds is in use: log-probabilities of whole
            texts, which vLLM computes without it, are asked for last.
        checkpoint: What it was told to serve.
        undefended: What that is an edit of, or None where no edit is claimed.
        reference: Computes what is expected; `transformers_reference` by default.  What it
            returns is kept for as long as the files are the same.

    Raises:
        ModelError: It serves something else; what was seen, and what to do.
    """
    canaries = make_canaries(served.tokenizer, checkpoint)
    answers = served.complete(canaries.continued, NEW_TOKENS)
    following = served.next_logprobs(canaries.ids, canaries.candidates)
    logprobs = served.logprobs(canaries.ids)
    reference = reference or transformers_reference
    own = _kept(reference, checkpoint, canaries)
    _check_lengths(checkpoint, logprobs, own.logprobs)
    if not _finite(own.logprobs, own.following) and not _finite(logprobs, following):
        _LOG.warning(
            "%s computes log-probabilities that are not finite, in transformers too; its answers "
            "will be recorded as empty",
            _name(checkpoint),
        )
        return
    _check_finite(checkpoint, logprobs, following)
    _check_generated(checkpoint, served.tokenizer, answers, own)
    if undefended is not None:
        bare = _kept(reference, undefended, canaries)
        _check_edit(checkpoint, undefended, logprobs, own, bare)
    allowed = _tolerance(checkpoint, own)
    _check_close(checkpoint, logprobs, own.logprobs, allowed)
    _check_cache(checkpoint, following, own.following, allowed)
    _check_text(checkpoint, served.tokenizer, answers, own, 2 * allowed)


def make_canaries(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> Canaries:
    """The texts as token ids, the questions as users' turns where there is a chat template.

    Args:
        tokenizer: The model's.
        checkpoint: Its config says how long a context may be.
    """
    positions = getattr(read_config(checkpoint), "max_position_embeddings", None)
    longest = LONGEST if positions is None else min(LONGEST, positions - NEW_TOKENS)
    encoded = [list(tokenizer(text)["input_ids"]) for text in (*_QUESTIONS, *_TEXTS)]
    if tokenizer.chat_template:
        style = PromptStyle(style="chat")
        encoded += [style.encode_prompt(tokenizer, question) for question in _QUESTIONS]
    ids = tuple(tuple(row[:longest]) for row in encoded)
    return Canaries(ids, tuple(sorted({token for row in ids for token in row[-4:]})))


def transformers_reference(checkpoint: Checkpoint, canaries: Canaries) -> Reference:
    """What transformers computes, on the CPU, whose memory an engine on a GPU doesn't hold.

    The model is loaded in the checkpoint's dtype, each text is run on its own, and the memory is
    free again on return.

    Raises:
        ModelError: The weights can't be read, or hold biases that no engine gives the model.
    """
    import torch

    model: Any = load_model(checkpoint, device="cpu").eval()
    _check_biases(checkpoint, model)
    ends = end_tokens(model.generation_config, model.config, load_tokenizer(checkpoint))
    with torch.inference_mode():
        scored = [_score(model, row, canaries.candidates) for row in canaries.ids]
        greedy = [_continue(model, row, ends) for row in canaries.continued]
    logprobs, following, squares = map(list, zip(*scored, strict=True))
    layers = model.config.get_text_config().num_hidden_layers
    del model
    gc.collect()
    size = math.sqrt(sum(squares) / len(squares))
    noise = _eps(checkpoint.dtype) * math.sqrt(layers) * size
    return Reference(logprobs, following, greedy, noise)


def _check_biases(checkpoint: Checkpoint, model: Any) -> None:
    """A bias in the files, but not in the model, is dropped by transformers as by other engines."""
    inner = getattr(model, "get_base_model", lambda: model)()
    modules = dict(inner.named_modules())
    folder = local_folder(checkpoint)
    for file in weight_files(folder, "model.base"):
        for name in read_header(folder / file)[0]:
            module = modules.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
            if module is not None and getattr(module, "bias", None) is None:
                raise _refused(
                    checkpoint,
                    f"its files hold {name}, which its config.json doesn't provide for, so that "
                    "engines drop it",
                )


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


_references: dict[tuple[Any, ...], Reference] = {}


def _kept(
    reference: Callable[[Checkpoint, Canaries], Reference],
    checkpoint: Checkpoint,
    canaries: Canaries,
) -> Reference:
    key = (reference, checkpoint, _stamp(checkpoint), canaries)
    if key not in _references:
        _references[key] = reference(checkpoint, canaries)
    return _references[key]


def _stamp(checkpoint: Checkpoint) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file of a checkpoint's local folders."""
    folders = [checkpoint.base if checkpoint.is_local else None]
    folders += [checkpoint.adapter, checkpoint.steering]
    files = chain.from_iterable(sorted(Path(folder).iterdir()) for folder in folders if folder)
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _eps(dtype: str) -> float:
    """Distance of 1 to the next number; on a GPU float32's products may be made of TF32."""
    import torch

    if dtype == "float32" and device_name() != "cpu":
        return _TF32_EPS
    return float(torch.finfo(getattr(torch, dtype)).eps)


def _tolerance(checkpoint: Checkpoint, own: Reference) -> float:
    floor = _FLOAT32 if checkpoint.dtype == "float32" else 0.0
    return max(floor, _NOISE_FACTOR * own.noise)


def _check_lengths(checkpoint: Checkpoint, found: Rows, expected: Rows) -> None:
    lengths, wanted = (list(map(len, rows)) for rows in (found, expected))
    if lengths != wanted:
        raise _refused(checkpoint, f"it scores {lengths} tokens of the texts instead of {wanted}")


def _finite(*tables: Rows) -> bool:
    return all(math.isfinite(value) for rows in tables for row in rows for value in row)


def _check_finite(checkpoint: Checkpoint, *tables: Rows) -> None:
    values = [value for rows in tables for row in rows for value in row]
    broken = [value for value in values if not math.isfinite(value)]
    if broken:
        kind = "NaN" if any(map(math.isnan, broken)) else f"{broken[0]:+}inity"
        raise _refused(
            checkpoint,
            f"{len(broken)} of {len(values)} of its log-probabilities are {kind}, as where biases "
            "that the files lack are read as noise",
        )


def _check_generated(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    own: Reference,
) -> None:
    """Where transformers says something, text comes out, and not token 0, the best of all NaNs."""
    said = [_decode(tokenizer, [token for token, _ in greedy]) for greedy in own.greedy]
    nothing = not any(answer.text for answer in answers)
    if (nothing and any(said)) or not any(answer.tokens for answer in answers):
        raise _refused(checkpoint, "every text that it generates is empty")
    zeros = _decode(tokenizer, [0] * NEW_TOKENS)
    if all(answer.text == zeros for answer in answers) and set(said) != {zeros}:
        raise _refused(checkpoint, "every token that it generates is number 0")


def _check_edit(
    checkpoint: Checkpoint, undefended: Checkpoint, found: Rows, own: Reference, bare: Reference
) -> None:
    """The part of the edit that is served: <s - u, r - u> / <r - u, r - u>, 1 for the whole.

    s are the served log-probabilities, r the reference's and u the undefended model's.
    """
    if not _finite(own.logprobs, bare.logprobs):
        return  # What is finite isn't the one, and is refused as not being the other.
    effect = _differences(own.logprobs, bare.logprobs)
    squares = math.fsum(each * each for each in effect)
    moved = _differences(found, bare.logprobs)
    inner = math.fsum(m * e for m, e in zip(moved, effect, strict=True))
    share = inner / squares if squares else 0.0
    rest = _rms([m - share * e for m, e in zip(moved, effect, strict=True)])
    if not math.sqrt(squares) > _LEAST_EFFECT * max(own.noise, rest):
        _LOG.warning(
            "the edit that makes %s of %s is too small to tell from rounding on the canary's "
            "texts; whether it is served was not checked",
            _name(checkpoint),
            _name(undefended),
        )
    elif abs(share - 1.0) > 0.5:
        raise _refused(
            checkpoint,
            f"it has {share:.2f} of the edit of {_name(undefended)} instead of 1, as where biases "
            "or an adapter are dropped, or applied twice",
        )


def _check_close(checkpoint: Checkpoint, found: Rows, expected: Rows, allowed: float) -> None:
    worst = _worst(found, expected)
    if not worst <= allowed:
        raise _refused(
            checkpoint,
            f"its log-probabilities differ by {worst:.3g} (RMS over a text) from transformers', "
            f"where rounding explains {allowed:.3g}, as with the weights or the adapter of another "
            "model",
        )


def _check_cache(checkpoint: Checkpoint, found: Rows, expected: Rows, allowed: float) -> None:
    worst = _worst(found, expected)
    if not worst <= allowed:
        raise _refused(
            checkpoint,
            "it scores whole texts right, but next tokens are off by "
            f"{worst:.3g} (RMS) where rounding explains {allowed:.3g}, as with the prefix cache of "
            "another model",
        )


def _check_text(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    own: Reference,
    margin: float,
) -> None:
    """Each answer begins with what transformers is sure to say, white space aside."""
    for answer, greedy in zip(answers, own.greedy, strict=True):
        expected = _sure(tokenizer, greedy, margin)
        if not _compact(answer.text).startswith(_compact(expected)):
            raise _refused(
                checkpoint,
                f"it goes on with {answer.text!r} where transformers says {expected!r}, though it "
                "scores whole texts right, as with a cache of another model",
            )


def _sure(
    tokenizer: PreTrainedTokenizerBase, greedy: Sequence[tuple[int, float]], margin: float
) -> str:
    """The text of the tokens up to the first that isn't ahead by `margin`."""
    tokens = [token for token, _ in takewhile(lambda each: each[1] > margin, greedy)]
    # Half a character at the end is written with the replacement character.
    return _decode(tokenizer, tokens).rstrip("\ufffd")


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _compact(text: str) -> str:
    return "".join(text.split())


def _differences(a: Rows, b: Rows) -> list[float]:
    pairs = zip(chain.from_iterable(a), chain.from_iterable(b), strict=True)
    return [x - y for x, y in pairs]


def _worst(found: Rows, expected: Rows) -> float:
    """The largest RMS difference of a text; infinite where one of the two isn't finite."""
    rows = [_rms(_differences([f], [e])) for f, e in zip(found, expected, strict=True)]
    return max(row if math.isfinite(row) else math.inf for row in rows)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _name(checkpoint: Checkpoint) -> str:
    adapter = "" if checkpoint.adapter is None else f" with the adapter {checkpoint.adapter!r}"
    return f"{checkpoint.base!r}{adapter}"


def _refused(checkpoint: Checkpoint, what: str) -> ModelError:
    return ModelError(
        f"what is served isn't the model {_name(checkpoint)}: {what}; its answers don't count, so "
        "set backend@evaluation.backend=transformers, or write the model again in a form that the "
        "engine reads"
    )
