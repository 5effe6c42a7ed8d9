"""The client of an OpenAI-compatible endpoint: pace, deadlines, and what a failure means.

The openai library sends, and sends again what failed for a passing reason. Imported only where
something is asked, since the library takes its time to load.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import httpx2
import openai

from evaluation.judges.endpoint_settings import Endpoint
from evaluation.judges.prompted import Reply
from settings import ModelError
from settings.progress import Progress

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

log = logging.getLogger("relock")

_HINTS = {
    401: "set api_key_env to the variable that holds its API key",
    403: "set api_key_env to the variable that holds an API key that may use this model",
    404: "set base_url and remote_model to an address and a model that it serves",
}
_PASSING = (408, 409, 429)
# What may be wrong with one request alone, since others of the same form were answered.
_OF_ONE = (400, 413, 422)
# How vLLM, SGLang, llama.cpp and text-generation-inference say so, without OpenAI's code for it.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|maximum model length|`inputs` .*must (?:be <=|have less)",
    re.IGNORECASE,
)
_CUT = ("length", "max_tokens")
_WITHHELD = ("content_filter", "tool_calls", "function_call")


def send(
    endpoint: Endpoint,
    questions: Mapping[str, str],
    keep: Callable[[str, Reply], None],
    has_answered: bool,
) -> dict[str, Reply]:
    """Asks an endpoint.

    Before it has answered once the shortest question is asked alone: an endpoint that refuses that
    one would refuse all, and one that has answered refuses a question for what is in it.

    Args:
        endpoint: Whom, and how.
        questions: By the key of the request.
        keep: Is given each key and reply as soon as there is one; no "refused" one.
        has_answered: Whether it is known to answer requests of this form.

    Returns:
        The replies by key; a request that failed for a passing reason has none.

    Raises:
        ModelError: The endpoint refuses requests for a lasting reason, or `give_up_after` of them
            failed or were refused in a row.
    """
    try:
        return asyncio.run(_Round(endpoint, questions, keep, has_answered).run())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class _Round:
    """One round of questions, asked by as many workers as may be under way at a time."""

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Mapping[str, str],
        keep: Callable[[str, Reply], None],
        has_answered: bool,
    ) -> None:
        self._endpoint = endpoint
        self._body = endpoint.body()
        self._questions = questions
        self._keep = keep
        self._has_answered = has_answered
        self._key = endpoint.api_key
        self._replies: dict[str, Reply] = {}
        self._refused: dict[str, Reply] = {}
        self._failed = self._failed_in_a_row = 0
        self._reason = ""

    async def run(self) -> dict[str, Reply]:
        """Asks everything and returns the replies."""
        queue = dict(self._questions)
        with Progress(len(queue), "judge", "replies") as progress:
            async with self._client() as client:
                if not self._has_answered:
                    shortest = min(queue, key=lambda key: len(queue[key]))
                    await self._work(client, iter([(shortest, queue.pop(shortest))]), progress)
                waiting = iter(queue.items())
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._endpoint.concurrency, len(queue))):
                        group.create_task(self._work(client, waiting, progress))
        if self._failed or self._refused:
            log.warning(
                "of %d requests %s gave no reply to %d, which count as errored, and refused %d "
                "while it took others, which count as unparsed (the last one: %s)",
                len(self._questions),
                self._endpoint.base_url,
                self._failed,
                len(self._refused),
                self._reason,
            )
        return self._replies | self._refused

    async def _work(
        self, client: openai.AsyncOpenAI, waiting: Iterator[tuple[str, str]], progress: Progress
    ) -> None:
        for key, question in waiting:
            reply = await self._ask(client, question)
            progress.advance()
            if reply is not None and reply.ending != "refused":
                self._failed_in_a_row = 0
                self._has_answered |= reply.ending == "whole"
                self._keep(key, reply)
                self._replies[key] = reply
                continue
            if reply is None:
                self._failed += 1
            else:
                self._refused[key] = reply
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self._endpoint.give_up_after:
                replies = f", after {len(self._replies)} replies" if self._replies else ""
                raise ModelError(
                    f"{self._endpoint.base_url} doesn't answer: {self._failed_in_a_row} requests "
                    f"in a row failed{replies} ({self._reason}); see that base_url is right and "
                    "the endpoint up, and run the same command again"
                )

    async def _ask(self, client: openai.AsyncOpenAI, question: str) -> Reply | None:
        """The reply, or None after every retry; `_reason` says why none, or why it is refused."""
        try:
            completion = await client.chat.completions.create(
                messages=[{"role": "user", "content": question}],
                model=self._endpoint.remote_model,
                extra_body=self._body,
                extra_headers=None if self._key else {"Authorization": openai.Omit()},
            )
            return _reply(completion)
        except openai.APIStatusError as error:
            return self._status(error)
        except (openai.APIError, ValueError) as error:
            self._reason = self._readable(error)
        return None

    def _status(self, error: openai.APIStatusError) -> Reply | None:
        reason = f"status {error.status_code}: {self._readable(error)}"
        if error.code in ("content_filter", "content_policy_violation"):
            return Reply("", "withheld")
        says_too_long = error.status_code not in _PASSING and _TOO_LONG.search(reason)
        if error.code == "context_length_exceeded" or says_too_long:
            return Reply("", "cut")
        self._reason = reason
        passing = error.status_code in _PASSING or error.status_code >= 500
        if passing and error.code != "insufficient_quota":
            return None
        if error.status_code in _OF_ONE and self._has_answered:
            return Reply("", "refused")
        hint = _HINTS.get(error.status_code, "change the settings of the request to what it takes")
        raise ModelError(f"{self._endpoint.base_url} refuses requests ({reason}); {hint}")

    def _readable(self, error: Exception) -> str:
        """An error's message on one line, without the API key that an endpoint may repeat."""
        body = getattr(error, "body", None)
        # The library's message leaves out an error that is a text and no object.
        text = body if isinstance(body, str) else str(getattr(error, "message", error))
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            # Without a value here the library would take the key of another service from the
            # environment.
            api_key=self._key or "none",
            base_url=self._endpoint.base_url,
            timeout=self._endpoint.timeout,
            max_retries=self._endpoint.max_retries,
            http_client=_PacedClient(self._endpoint),
        )


class _PacedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client whose requests start at least an interval apart and end within a deadline.

    The library's own time limit is for each wait, so that an answer that trickles in would never
    reach it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(follow_redirects=False)
        self._deadline = endpoint.timeout
        self._interval = 60.0 / (endpoint.requests_per_minute or float("inf"))
        self._next = 0.0

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._interval
        await asyncio.sleep(start - now)
        try:
            async with asyncio.timeout(self._deadline):
                return await super().send(request, **options)
        except TimeoutError as error:
            raise httpx2.ReadTimeout("the deadline has passed", request=request) from error


def _reply(completion: ChatCompletion) -> Reply:
    """What a completion says.

    Raises:
        ValueError: It is no completion, whatever its status was.
    """
    choices = getattr(completion, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(first, "message", None)
    text = getattr(message, "content", None) or ""
    if first is None or message is None or not isinstance(text, str):
        raise ValueError("what it returned is no chat completion")
    if getattr(message, "refusal", None) or first.finish_reason in _WITHHELD:
        return Reply(text, "withheld")
    return Reply(text, "cut" if first.finish_reason in _CUT else "whole")
