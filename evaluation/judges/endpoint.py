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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from evaluation.base import Verdict, check_pairs
from evaluation.degenerate import judged
from evaluation.judges.endpoint_settings import Endpoint
from evaluation.judges.prompted import PromptedJudge, Reply, question
from settings import ModelError, SettingError, target

_FAILED = Reply("", "failed")


class EndpointJudge(Endpoint, PromptedJudge):
    """Prompts a served chat model.

    Attributes:
        journal: Folder that keeps the replies, or None to keep none.
    """

    version: ClassVar[int] = 2
    errors_pass: ClassVar[bool] = True

    journal: str | None = None

    def check(self, setting: str) -> None:
        super().check(setting)
        if self.api_key_env is not None and not self.api_key:
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

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per answer.

        Answers of nothing but white space are not asked about. Other degenerate ones are, and
        keep the reply's score, but have no response.
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
            from evaluation.judges.client import send

            has_answered = any(reply.ending == "whole" for reply in replies.values())
            replies |= send(self, wanted, journal.add, has_answered)
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
