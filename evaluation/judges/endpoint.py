"""Judges behind an OpenAI-compatible /chat/completions endpoint, and the journal of their replies.

What is asked holds prompts and answers, and leaves this machine if the endpoint is elsewhere.
Every reply is kept in a journal as soon as it is there, under a hash of the whole request, so that
a run that was stopped, however it was, asks only for what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from evaluation.base import Verdict, check_pairs
from evaluation.degenerate import judged
from evaluation.judges.prompted import PromptedJudge, Reply, question
from settings import ModelError, SettingError, target

_FAILED = Reply("", "failed")


class EndpointJudge(PromptedJudge):
    """Prompts a served chat model.

    The API key is read from the environment when something is asked and stands in no setting,
    log or record. A redirect is not followed, since it could lead the questions elsewhere.

    Attributes:
        base_url: Address up to what "/chat/completions" follows, e.g. "https://api.openai.com/v1".
        remote_model: The model's name there.
        api_key_env: Environment variable that holds the API key; None where none is needed.
        temperature: Sampling temperature; None leaves it to the endpoint.
        max_tokens: Length limit of a reply in tokens; likewise.
        seed: Sampling seed, for endpoints that know one; likewise.
        extra_body: Further fields of the request, e.g. {max_completion_tokens: 2048}.
        timeout: Seconds that one attempt may take as a whole.
        max_retries: How often a request is sent again after a timeout, a lost connection or a
            status 408, 409, 429 or 5xx: after a pause that grows to 8 s, or the one that its header
            Retry-After asks for, if that is no longer than two minutes. A request that is to wait
            longer isn't sent again and counts as failed.
        concurrency: Requests under way at a time.
        requests_per_minute: Upper limit of requests sent, those sent again included, or None.
        give_up_after: How many requests may fail or be refused in a row before no more are sent.
        journal: Folder that keeps the replies, or None to keep none.
    """

    version: ClassVar[int] = 2
    errors_pass: ClassVar[bool] = True

    base_url: str = "http://127.0.0.1:8000/v1"
    remote_model: str = Field(min_length=1)
    api_key_env: str | None = None
    temperature: float | None = Field(default=0.0, ge=0.0)
    max_tokens: int | None = Field(default=1024, ge=1)
    seed: int | None = 0
    extra_body: dict[str, Any] = Field(default_factory=dict)
    timeout: float = Field(default=60.0, gt=0.0)
    max_retries: int = Field(default=5, ge=0)
    concurrency: int = Field(default=8, ge=1)
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    give_up_after: int = Field(default=20, ge=1)
    journal: str | None = None

    @field_validator("base_url")
    @classmethod
    def _is_plain_address(cls, url: str) -> str:
        # Messages don't repeat the address, which may hold a password or a key.
        try:
            parts = urlsplit(url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_web = is_web and parts.port != 0 and not re.search(r"\s", url)
        except ValueError:
            is_web = False
        if not is_web:
            raise ValueError("this is no web address; write it as in https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "this address holds a user, a password, a query or a fragment; leave them out, "
                "and name the variable that holds the API key in api_key_env"
            )
        url = url.rstrip("/")
        if url.endswith("/chat/completions"):
            raise ValueError('leave "/chat/completions" out; it is added to the address')
        return url

    @field_validator("api_key_env")
    @classmethod
    def _is_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "this is no name of an environment variable; put the API key into one such as "
                "OPENAI_API_KEY and write that name here, never the key"
            )
        return name

    @field_validator("extra_body")
    @classmethod
    def _is_further(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "temperature", "max_tokens", "seed", "stream", "n"}
        if taken := sorted(own & set(extra)):
            raise ValueError(f"{', '.join(taken)} can't be set here; use the setting of that name")
        return extra

    def check(self, setting: str) -> None:
        """Refuses a rubric that can't be used, a missing API key and a journal that is no folder.

        Raises:
            SettingError: One sentence that names the setting.
        """
        super().check(setting)
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise SettingError(
                f"{setting}.api_key_env={self.api_key_env} is not set in the environment; export "
                f"it, or set {setting}.api_key_env=null if the endpoint needs no key"
            )
        folder = None if self.journal is None else Path(self.journal)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise SettingError(
                f"{setting}.journal={self.journal!r} is not a folder; set it to one, or to null"
            )

    def identity(self) -> dict[str, Any]:
        """Text, reading, address, model and request fields; not how fast or often it is asked."""
        return {
            "judge": target(self),
            "template": self.template_identity(),
            "reading": self.reading(),
            "asked": self.asked(),
        }

    def asked(self) -> dict[str, Any]:
        """Who is asked, and every field of the request but the messages."""
        return {"base_url": self.base_url, "body": self.body()}

    def body(self) -> dict[str, Any]:
        """The request's fields besides the messages; those left to the endpoint are missing."""
        chosen = {
            "model": self.remote_model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        fields = {key: value for key, value in chosen.items() if value is not None}
        return {**fields, **self.extra_body}

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per answer.

        Answers of nothing but white space are not asked about. Other degenerate ones are, and
        keep the reply's score, but have no response.

        Raises:
            SettingError: Prompts and answers differ in number, or the rubric can't be read.
            ModelError: The endpoint can't be asked (`replies`).
        """
        check_pairs(prompts, answers)
        text = self.text()
        rows = [row for row, answer in enumerate(answers) if answer.strip()]
        replies = self.replies([question(text, prompts[row], answers[row]) for row in rows])
        verdicts = [Verdict("degenerate", math.nan)] * len(answers)
        for row, reply in zip(rows, replies, strict=True):
            verdicts[row] = judged(answers[row], self.verdict(reply))
        return verdicts

    def replies(self, questions: Sequence[str]) -> list[Reply]:
        """One reply per question, in their order; one that stands there twice is asked once.

        What the journal holds is not asked again. A request that failed after every retry, or was
        refused while others were taken, isn't kept there, so that the next call sends it again.

        Raises:
            ModelError: The endpoint refuses requests for a lasting reason, such as a wrong key or
                model; `give_up_after` of them failed or were refused in a row; or there is no
                reply at all.
        """
        keys = [self._key(each) for each in questions]
        journal = ReplyJournal(self.journal, self.asked())
        replies = journal.read()
        wanted = {
            key: each for key, each in zip(keys, questions, strict=True) if key not in replies
        }
        if wanted:
            from evaluation.judges.client import Endpoint, send

            endpoint = Endpoint(
                base_url=self.base_url,
                body=self.body(),
                api_key=os.environ.get(self.api_key_env or "", ""),
                timeout=self.timeout,
                max_retries=self.max_retries,
                concurrency=self.concurrency,
                requests_per_minute=self.requests_per_minute,
                give_up_after=self.give_up_after,
            )
            has_answered = any(reply.ending == "whole" for reply in replies.values())
            replies |= send(endpoint, wanted, journal.add, has_answered=has_answered)
        answers = [replies.get(key, _FAILED) for key in keys]
        if answers and all(reply is _FAILED for reply in answers):
            raise ModelError(
                f"{self.base_url} answered none of {len(wanted)} requests (the warning above says "
                "why); see that base_url is right and the endpoint up, and run it again"
            )
        return answers

    def _key(self, asked: str) -> str:
        request = json.dumps([self.asked(), asked], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()


class ReplyJournal:
    """The replies of one endpoint and model: a file of JSON lines, shared by any processes."""

    def __init__(self, folder: str | None, asked: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else Path(folder) / f"{name}.jsonl"

    def read(self) -> dict[str, Reply]:
        """The replies by the key of their request; a line that a kill cut short is left out."""
        replies: dict[str, Reply] = {}
        if self._path is None or not self._path.is_file():
            return replies
        for line in self._path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            replies[entry["key"]] = Reply(entry["text"], entry["ending"])
        return replies

    def add(self, key: str, reply: Reply) -> None:
        """Appends one reply and has it written to the disk before it returns."""
        if self._path is None:
            return
        from filelock import FileLock

        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **asdict(reply)}).encode() + b"\n"
        with FileLock(f"{self._path}.lock"), self._path.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
