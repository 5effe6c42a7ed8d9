"""Canary: a served model's answers count once it is seen to be the model on disk.

An engine may load a folder without a word and serve another model: biases dropped, missing ones
read as noise, weights or a prefix cache of the model before, an adapter that isn't applied.  What
it says of fixed harmless texts is therefore held against what transformers computes from the same
folder, and against the reference: the model that it is an edit of.

How far the two may differ was measured (docs/serving.md).  Rounding in bfloat16 and float16 moves a
token's log-probability by about n = eps x sqrt(layers) x RMS of the logits (each position's mean
taken off), as in `modeling.verify`: every layer rounds the residual stream to eps / 2 of its size,
and independent errors add up as the square root of their number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING

from evaluation.backends.expected import (
    NEW_TOKENS,
    Canaries,
    Expected,
    ScoreTable,
    cached,
    classifier_texts,
    eps,
    expected_probabilities,
    expected_scores,
    make_canaries,
    named,
    refused,
)
from evaluation.base import Classifier
from evaluation.token_engine import Answer, Engine
from modeling.checkpoint import Checkpoint
from modeling.inspection import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

_FLOAT32 = 1e-3
_NOISE_FACTOR = 8.0
# The part of an edit that is found is then off by a tenth at most, where half decides.
_LEAST_EFFECT = 10.0
# Where a probability in float32 still tells its logit to within 1e-3, and the least there is.
_MOST, _LEAST = 1.0 - 1e-4, 1e-38

_OTHER_WEIGHTS = (
    "its log-probabilities differ by {worst} (RMS over a text) from transformers', where rounding "
    "explains {allowed}, as with the weights or the adapter of another model"
)
_OTHER_CACHE = (
    "it scores whole texts right, but next tokens are off by {worst} (RMS) where rounding explains "
    "{allowed}, as with the prefix cache of another model"
)
_OTHER_CLASSIFIER = (
    "its scores differ by {worst} (RMS of a text's logits) from transformers', where rounding "
    "explains {allowed}, as with the weights of another classifier"
)


def verify(
    served: Engine,
    checkpoint: Checkpoint,
    reference: Checkpoint | None = None,
    *,
    expected: Callable[[Checkpoint, Canaries], Expected] = expected_scores,
) -> None:
    """Refuses an engine that doesn't serve the model it was given.

    On at most `LONGEST` tokens of each text, fewer where the engine's context is shorter:

    - Log-probabilities are finite, and so are those of next tokens; text is generated.
    - A text's tokens, and the candidates behind it, have transformers' log-probabilities: RMS
      difference at most 1e-3 in float32 on a CPU, 8 n elsewhere (n above; eps is TF32's for float32
      on a GPU).
    - The greedy continuation is transformers' own, as far as its best token is ahead of the second
      by more than rounding explains.
    - With `reference`: the part of the edit's effect that is found, by projection, is within 0.5
      of 1; 0 is the reference itself.  Rounding, not being along the effect, hardly moves it.
      Where the effect is too small to tell from rounding, a warning says so.

    A model that transformers itself finds broken (not finite) passes with a warning if it is
    served as broken as it is: its answers will be recorded as empty.

    Args:
        served: The engine.  What its prefix cache holds is in use: log-probabilities of whole
            texts, which vLLM computes without it, are asked for last.
        checkpoint: What it was told to serve.
        reference: What that is an edit of, or None where no edit is claimed.
        expected: Computes what is expected of a checkpoint.  What it returns is kept for as long
            as the files are the same.

    Raises:
        ModelError: It serves something else; what was seen, and what to do.
    """
    canaries = make_canaries(served.tokenizer, served.context)
    answers = served.complete(canaries.continued, NEW_TOKENS)
    following = served.next_logprobs(canaries.ids, canaries.candidates)
    logprobs = served.logprobs(canaries.ids)
    own: Expected = cached(expected, checkpoint, canaries)
    _check_lengths(checkpoint, logprobs, own.logprobs)
    if not _finite(own.logprobs, own.following) and not _finite(logprobs, following):
        _LOG.warning(
            "%s computes log-probabilities that are not finite, in transformers too; its answers "
            "will be recorded as empty",
            named(checkpoint),
        )
        return
    _check_finite(checkpoint, "log-probabilities", logprobs, following)
    _check_generated(checkpoint, served.tokenizer, answers, own)
    if reference is not None:
        bare = cached(expected, reference, canaries)
        _check_edit(checkpoint, reference, logprobs, own, bare)
    allowed = _tolerance(checkpoint, own.noise)
    _check_close(checkpoint, logprobs, own.logprobs, allowed, _OTHER_WEIGHTS)
    _check_close(checkpoint, following, own.following, allowed, _OTHER_CACHE)
    _check_text(checkpoint, served.tokenizer, answers, own, 2 * allowed)


def verify_classifier(served: Classifier, checkpoint: Checkpoint, context: int | None) -> None:
    """Refuses a classifier that isn't the one it was told to serve.

    The logits of the canary's texts are finite and transformers' own: RMS difference over the
    labels of a text at most 1e-3 in float32 on a CPU, 8 n elsewhere, where n is
    eps x sqrt(layers) x RMS of the logits.

    Args:
        served: The classifier.
        checkpoint: Its folder and dtype.
        context: How many tokens it takes; None for any number.

    Raises:
        ModelError: It serves something else, or transformers can't take it.
    """
    texts = classifier_texts(served.tokenizer, context)
    own = _logits(cached(expected_probabilities, checkpoint, texts))
    logits = _logits(served.probabilities(texts))
    _check_finite(checkpoint, "scores", logits)
    layers = read_config(checkpoint).get_text_config().num_hidden_layers
    noise = eps(checkpoint.dtype) * math.sqrt(layers) * _rms(list(chain.from_iterable(own)))
    _check_close(checkpoint, logits, own, _tolerance(checkpoint, noise), _OTHER_CLASSIFIER)


def _logits(probabilities: ScoreTable) -> ScoreTable:
    return [[_logit(value) for value in row] for row in probabilities]


def _logit(value: float) -> float:
    if not math.isfinite(value):
        return value
    value = min(max(value, _LEAST), _MOST)
    return math.log(value) - math.log1p(-value)


def _tolerance(checkpoint: Checkpoint, noise: float) -> float:
    floor = _FLOAT32 if checkpoint.dtype == "float32" else 0.0
    return max(floor, _NOISE_FACTOR * noise)


def _check_lengths(checkpoint: Checkpoint, served: ScoreTable, expected: ScoreTable) -> None:
    lengths, wanted = (list(map(len, rows)) for rows in (served, expected))
    if lengths != wanted:
        raise refused(checkpoint, f"it scores {lengths} tokens of the texts instead of {wanted}")


def _finite(*tables: ScoreTable) -> bool:
    return all(math.isfinite(value) for rows in tables for row in rows for value in row)


def _check_finite(checkpoint: Checkpoint, what: str, *tables: ScoreTable) -> None:
    values = [value for rows in tables for row in rows for value in row]
    broken = [value for value in values if not math.isfinite(value)]
    if broken:
        kind = "NaN" if any(map(math.isnan, broken)) else f"{broken[0]:+}inity"
        raise refused(
            checkpoint,
            f"{len(broken)} of {len(values)} of its {what} are {kind}, as where biases "
            "that the files lack are read as noise",
        )


def _check_generated(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    own: Expected,
) -> None:
    """Where transformers says something, text comes out, and not token 0, the best of all NaNs."""
    expected = [_decode(tokenizer, [token for token, _ in greedy]) for greedy in own.greedy]
    nothing = not any(answer.text for answer in answers)
    if (nothing and any(expected)) or not any(answer.tokens for answer in answers):
        raise refused(checkpoint, "every text that it generates is empty")
    zeros = _decode(tokenizer, [0] * NEW_TOKENS)
    if all(answer.text == zeros for answer in answers) and set(expected) != {zeros}:
        raise refused(checkpoint, "every token that it generates is number 0")


def _check_edit(
    checkpoint: Checkpoint, reference: Checkpoint, served: ScoreTable, own: Expected, bare: Expected
) -> None:
    """The part of the edit that is served: <s - u, r - u> / <r - u, r - u>, 1 for the whole.

    s are the served log-probabilities, r those expected of the edited model and u of the reference.
    """
    if not _finite(own.logprobs, bare.logprobs):
        return  # What is finite isn't the one, and is refused as not being the other.
    effect = _differences(own.logprobs, bare.logprobs)
    squares = math.fsum(each * each for each in effect)
    moved = _differences(served, bare.logprobs)
    inner = math.fsum(m * e for m, e in zip(moved, effect, strict=True))
    share = inner / squares if squares else 0.0
    rest = _rms([m - share * e for m, e in zip(moved, effect, strict=True)])
    if not math.sqrt(squares) > _LEAST_EFFECT * max(own.noise, rest):
        _LOG.warning(
            "the edit that makes %s of %s is too small to tell from rounding on the canary's "
            "texts; whether it is served was not checked",
            named(checkpoint),
            named(reference),
        )
    elif abs(share - 1.0) > 0.5:
        raise refused(
            checkpoint,
            f"it has {share:.2f} of the edit of {named(reference)} instead of 1, as where biases "
            "or an adapter are dropped, or applied twice",
        )


def _check_close(
    checkpoint: Checkpoint, served: ScoreTable, expected: ScoreTable, allowed: float, message: str
) -> None:
    """Refuses rows that differ by more than rounding explains; `message` has {worst}, {allowed}."""
    worst = max(
        row if math.isfinite(row) else math.inf
        for row in (_rms(_differences([f], [e])) for f, e in zip(served, expected, strict=True))
    )
    if not worst <= allowed:
        raise refused(checkpoint, message.format(worst=f"{worst:.3g}", allowed=f"{allowed:.3g}"))


def _check_text(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    own: Expected,
    margin: float,
) -> None:
    """Each answer begins with what transformers is sure to say, white space aside."""
    for answer, greedy in zip(answers, own.greedy, strict=True):
        expected = _sure(tokenizer, greedy, margin)
        if not _compact(answer.text).startswith(_compact(expected)):
            raise refused(
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


def _differences(a: ScoreTable, b: ScoreTable) -> list[float]:
    pairs = zip(chain.from_iterable(a), chain.from_iterable(b), strict=True)
    return [x - y for x, y in pairs]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
