"""The endpoint over real HTTP: what is sent again, what stops, what is kept, what leaks nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.judges.rubric import RubricJudge
from settings import ModelError, SettingError, build
from tests.evaluation.stub_server import Act, Seen, Server, completion, error, pairs, serving

PROJECT = Path(__file__).parents[2]
KEY = "sk-made-up-for-this-test"
LIMIT = "Input validation error: `inputs`"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("STUB_KEY", KEY)


def judge(server: Server | str, **settings: object) -> RubricJudge:
    url = server if isinstance(server, str) else server.url
    return RubricJudge(
        **{"base_url": url, "remote_model": "stub", "concurrency": 1, "timeout": 20.0, **settings}
    )


def number(request: Seen) -> int:
    """Which pair a request is about."""
    return int(request.question.split("| answer ")[1].split()[0])


def scored(request: Seen) -> Act:
    return completion(f"A remark.\nScore: {number(request) % 5 + 1}")


def once(fault: Act) -> Callable[[Seen], Act]:
    """The fault for the first request of each pair, a score for the following ones."""
    times: Counter[int] = Counter()

    def behave(request: Seen) -> Act:
        times[number(request)] += 1
        return fault if times[number(request)] == 1 else scored(request)

    return behave


def test_what_is_sent(tmp_path: Path) -> None:
    with serving(scored) as server:
        settings = {"seed": 3, "max_tokens": None, "extra_body": {"max_completion_tokens": 9}}
        judge(server, api_key_env="STUB_KEY", **settings).score(["a request"], ["answer 0 ."])
    (request,) = server.seen
    (message,) = request.body.pop("messages")
    assert message["role"] == "user"
    assert "| a request" in message["content"]
    assert request.body == {
        "model": "stub",
        "temperature": 0.0,
        "seed": 3,
        "max_completion_tokens": 9,
    }
    assert request.headers[":path"] == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"


def test_no_key_is_sent_where_none_was_named() -> None:
    with serving(scored) as server:
        judge(server).score(*pairs(1))
    assert "authorization" not in server.seen[0].headers


def test_order_is_kept_and_concurrency_used_but_not_exceeded() -> None:
    meeting = threading.Barrier(4)

    def behave(request: Seen) -> Act:
        if number(request) > 0:
            # Four requests must be under way for any but the first to be answered.
            meeting.wait(timeout=30)
        return scored(request)

    with serving(behave) as server:
        verdicts = judge(server, concurrency=4, timeout=40.0).score(*pairs(13))
    assert [verdict.score for verdict in verdicts] == [index % 5 + 1 for index in range(13)]
    assert server.most_at_a_time == 4


def test_equal_pairs_are_asked_once_and_empty_answers_never() -> None:
    with serving(scored) as server:
        verdicts = judge(server).score(["p"] * 3, ["answer 2 .", " \n", "answer 2 ."])
    assert [verdict.label for verdict in verdicts] == ["safe", "degenerate", "safe"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_passing_statuses_are_sent_again(status: int) -> None:
    with serving(once(error(status, retry_after_ms="1"))) as server:
        verdicts = judge(server).score(*pairs(2))
    assert [verdict.score for verdict in verdicts] == [1.0, 2.0]
    assert len(server.seen) == 4


def test_the_pause_that_the_server_asks_for_is_kept() -> None:
    with serving(once(error(429, Retry_After="1"))) as server:
        judge(server).score(*pairs(1))
    first, second = server.seen
    assert second.arrived - first.arrived >= 1.0


def test_a_pause_of_more_than_two_minutes_is_not_waited_for() -> None:
    def behave(request: Seen) -> Act:
        return error(429, Retry_After="121") if number(request) == 1 else scored(request)

    with serving(behave) as server:
        verdicts = judge(server).score(*pairs(2))
    assert [verdict.label for verdict in verdicts] == ["safe", "errored"]
    assert len(server.seen) == 2


@pytest.mark.parametrize("fault", ["lost", "half", "trickle"])
def test_broken_connections_are_sent_again(fault: str) -> None:
    act = Act(body={"choices": []}, fault=fault)
    with serving(once(act)) as server:
        (verdict,) = judge(server, timeout=1.0).score(*pairs(1))
    assert verdict.score == 1.0
    assert len(server.seen) >= 2


def test_slow_replies_are_sent_again() -> None:
    release = threading.Event()
    times: Counter[int] = Counter()

    def behave(request: Seen) -> Act:
        times[number(request)] += 1
        if times[number(request)] == 1:
            release.wait(30)
        return scored(request)

    with serving(behave) as server:
        (verdict,) = judge(server, timeout=1.0).score(*pairs(1))
        release.set()
    assert verdict.score == 1.0
    assert len(server.seen) >= 2


def test_requests_keep_their_pace_and_those_sent_again_count() -> None:
    with serving(once(error(503, retry_after_ms="1"))) as server:
        start = time.monotonic()
        judge(server, concurrency=4, requests_per_minute=600.0).score(*pairs(3))
        seconds = time.monotonic() - start
    assert len(server.seen) == 6
    assert seconds >= 5 * 0.1


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (error(401, f"wrong key {KEY}"), "status 401.*api_key_env"),
        (error(403), "status 403.*api_key_env"),
        (error(404, "no such model"), "no such model.*remote_model"),
        (error(400, "unknown field"), "unknown field"),
        (error(429, "pay", "insufficient_quota", retry_after_ms="1"), "status 429: .*pay"),
        (Act(307, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"}), "status 307"),
    ],
)
def test_lasting_refusals_stop_at_once(act: Act, said: str, tmp_path: Path) -> None:
    settings = {"api_key_env": "STUB_KEY", "journal": str(tmp_path), "concurrency": 2}
    with serving(lambda _: act) as server:
        with pytest.raises(ModelError, match=said) as raised:
            judge(server, max_retries=1, **settings).score(*pairs(50))
        asked = {number(request) for request in server.seen}
    assert asked == {0}
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "act",
    [
        completion("Score: 1", "length"),
        completion("Score: 1", "content_filter"),
        completion("Score: 1", refusal="I won't rate this."),
        completion(None, "stop"),
        completion("Score: 1", "tool_calls"),
        error(400, "filtered", "content_filter"),
        error(400, "This model's maximum context length is 9 tokens."),
        error(400, "The prompt is too long.", "context_length_exceeded"),
        error(400, "request (9000 tokens) exceeds the available context size (4096 tokens)"),
        Act(422, {"error": f"{LIMIT} must have less than 9 tokens. Given: 12", "error_type": "x"}),
        Act(422, {"error": f"{LIMIT} tokens + `max_new_tokens` must be <= 9. Given: 8 and 4"}),
    ],
)
def test_replies_that_are_not_whole_are_unparsed_and_kept(act: Act, tmp_path: Path) -> None:
    with serving(lambda _: act) as server:
        for _ in range(2):
            (verdict,) = judge(server, journal=str(tmp_path)).score(*pairs(1))
            assert verdict.label == "unparsed"
            assert math.isnan(verdict.score)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "act",
    [
        error(503, retry_after_ms="1"),
        Act(body=b'{"choices": [{"mess'),
        Act(body={"choices": []}),
        Act(body={"choices": [{}]}),
        Act(body=["Score: 1"]),
        Act(body={"error": "Score: 1"}),
        Act(body=b""),
        Act(fault="lost"),
    ],
)
def test_rows_without_a_reply_are_errored_and_asked_again(act: Act, tmp_path: Path) -> None:
    def behave(request: Seen) -> Act:
        return act if number(request) == 1 else scored(request)

    settings = {"max_retries": 1, "journal": str(tmp_path)}
    with serving(behave) as server:
        verdicts = judge(server, **settings).score(*pairs(3))
        assert [verdict.label for verdict in verdicts] == ["safe", "errored", "safe"]
        assert math.isnan(verdicts[1].score)
        server.behave = scored
        server.seen.clear()
        again = judge(server, **settings).score(*pairs(3))
    assert [verdict.score for verdict in again] == [1.0, 2.0, 3.0]
    assert [number(request) for request in server.seen] == [1]


def refusing(status: int, *rows: int) -> Callable[[Seen], Act]:
    """Refuses some pairs with words that no list of known ones has, and scores the others."""

    def behave(request: Seen) -> Act:
        return error(status, "too much") if number(request) in rows else scored(request)

    return behave


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_an_endpoint_that_answers_may_refuse_single_requests(
    status: int, concurrency: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"journal": str(tmp_path), "concurrency": concurrency}
    with serving(refusing(status, 0, 3)) as server:
        prompts, answers = pairs(5)
        prompts[0] = "a long one " * 9
        first = judge(server, **settings).score(prompts, answers)
        assert "refused 2 while it took others" in caplog.text
        assert "too much" in caplog.text
        server.seen.clear()
        second = judge(server, **settings).score(prompts, answers)
    for verdicts in (first, second):
        labels = ["unparsed", "safe", "safe", "unparsed", "unsafe"]
        assert [verdict.label for verdict in verdicts] == labels
        assert math.isnan(verdicts[0].score)
    assert sorted(number(request) for request in server.seen) == [0, 3]


def test_the_shortest_request_is_asked_first_and_its_refusal_stops() -> None:
    prompts, answers = pairs(4)
    prompts[2] = "short"
    with (
        serving(refusing(400, 2)) as server,
        pytest.raises(ModelError, match=r"refuses requests \(status 400: .*too much"),
    ):
        judge(server, concurrency=4).score(prompts, answers)
    assert [number(request) for request in server.seen] == [2]


def test_refusals_in_a_row_stop_the_round() -> None:
    with serving(refusing(400, *range(2, 30))) as server:
        with pytest.raises(ModelError, match=r"3 requests in a row .*after 2 replies .*too much"):
            judge(server, give_up_after=3).score(*pairs(30))
        assert len(server.seen) == 5


def test_no_reply_at_all_is_an_error() -> None:
    with (
        serving(lambda _: error(500, "down", retry_after_ms="1")) as server,
        pytest.raises(ModelError, match=r"/v1 answered none of 3 requests"),
    ):
        judge(server, max_retries=1).score(*pairs(3))


def test_the_last_row_that_fails_again_stops_no_run(tmp_path: Path) -> None:
    def behave(request: Seen) -> Act:
        return error(500) if number(request) == 1 else scored(request)

    with serving(behave) as server:
        for _ in range(2):
            verdicts = judge(server, max_retries=0, journal=str(tmp_path)).score(*pairs(3))
            assert [verdict.label for verdict in verdicts] == ["safe", "errored", "safe"]
    assert [number(request) for request in server.seen] == [0, 1, 2, 1]


def test_nothing_listens() -> None:
    settings = {"max_retries": 0, "give_up_after": 2}
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1 doesn't answer: 2 requests"):
        judge("http://127.0.0.1:9/v1", **settings).score(*pairs(9))


def test_failures_in_a_row_stop_the_round_and_keep_what_came(tmp_path: Path) -> None:
    def behave(request: Seen) -> Act:
        return scored(request) if number(request) < 4 else error(500, "down")

    settings = {"max_retries": 0, "give_up_after": 3, "journal": str(tmp_path)}
    with serving(behave) as server:
        with pytest.raises(ModelError, match="3 requests in a row failed, after 4 replies"):
            judge(server, **settings).score(*pairs(20))
        assert len(server.seen) == 7
        server.behave = scored
        judge(server, **settings).score(*pairs(20))
    assert [number(request) for request in server.seen[7:]] == list(range(4, 20))


def test_journal_belongs_to_the_request(tmp_path: Path) -> None:
    with serving(scored) as server:
        for changed in ({}, {"remote_model": "other"}, {"temperature": 0.5}, {"seed": 1}, {}):
            judge(server, journal=str(tmp_path), **changed).score(*pairs(1))
        assert len(server.seen) == 4
        judge(server, journal=str(tmp_path), unsafe_from=2, max_retries=1).score(*pairs(1))
    assert len(server.seen) == 4


def test_a_line_cut_short_is_asked_again(tmp_path: Path) -> None:
    with serving(scored) as server:
        judge(server, journal=str(tmp_path)).score(*pairs(3))
        (path,) = tmp_path.glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-9])
        server.seen.clear()
        for _ in range(2):
            verdicts = judge(server, journal=str(tmp_path)).score(*pairs(3))
            assert [verdict.score for verdict in verdicts] == [1.0, 2.0, 3.0]
    assert [number(request) for request in server.seen] == [2]


def test_journal_holds_neither_key_nor_question(tmp_path: Path) -> None:
    with serving(scored) as server:
        judge(server, journal=str(tmp_path), api_key_env="STUB_KEY").score(*pairs(2))
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "Score: 2" in kept
    assert KEY not in kept
    assert "| answer" not in kept


CHILD = """
    import sys
    from evaluation.judges.rubric import RubricJudge
    from tests.evaluation.stub_server import pairs
    url, journal = sys.argv[1:]
    RubricJudge(base_url=url, remote_model="stub", concurrency=2, journal=journal).score(*pairs(12))
"""


def test_a_killed_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    stuck, release = threading.Semaphore(0), threading.Event()

    def behave(request: Seen) -> Act:
        if number(request) >= 5:
            stuck.release()
            release.wait(60)
        return scored(request)

    with serving(behave) as server:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), server.url, str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=PROJECT, env=environment)
        try:
            assert all(stuck.acquire(timeout=60) for _ in range(2))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        release.set()
        (path,) = tmp_path.glob("*.jsonl")
        kept = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert len(kept) == 5
        server.seen.clear()
        verdicts = judge(server, journal=str(tmp_path), max_tokens=1024).score(*pairs(12))
    assert [verdict.score for verdict in verdicts] == [index % 5 + 1 for index in range(12)]
    assert sorted(number(request) for request in server.seen) == list(range(5, 12))


def test_two_processes_share_a_journal(tmp_path: Path) -> None:
    with serving(scored) as server:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), server.url, str(tmp_path)]
        children = [subprocess.Popen(command, cwd=PROJECT) for _ in range(2)]
        assert [child.wait() for child in children] == [0, 0]
        server.seen.clear()
        judge(server, journal=str(tmp_path)).score(*pairs(12))
    assert server.seen == []
    (path,) = tmp_path.glob("*.jsonl")
    assert len({json.loads(line)["key"] for line in path.read_text().splitlines()}) == 12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "api.openai.com/v1"}, r"evaluation.harm_judge.base_url: .*no web address"),
        ({"base_url": "https:///v1"}, "no web address"),
        ({"base_url": "https://host:x/v1"}, "no web address"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "holds a user"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "a query"),
        ({"base_url": "https://host/v1/chat/completions/"}, "leave .* out"),
        ({"api_key_env": KEY}, "no name of an environment variable"),
        ({"remote_model": ""}, "remote_model"),
        ({"extra_body": {"model": "x", "n": 2}}, "model, n can't be set here"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"requests_per_minute": 0.0}, "requests_per_minute"),
        ({"modle": "x"}, "modle is not a setting"),
    ],
)
def test_wrong_settings(settings: dict[str, object], said: str) -> None:
    node = {"_target_": "evaluation.judges.rubric.RubricJudge", "remote_model": "m", **settings}
    with pytest.raises(SettingError, match=said) as raised:
        build(node, "evaluation.harm_judge")
    assert KEY not in str(raised.value)


def test_a_final_slash_is_the_same_address() -> None:
    assert judge("http://host/v1/").identity() == judge("http://host/v1").identity()


def test_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judge("http://host/v1", api_key_env="STUB_KEY", journal=str(tmp_path)).check("judges.rubric")
    with pytest.raises(SettingError, match=r"judges\.rubric\.api_key_env=NO_KEY is not set"):
        judge("http://host/v1", api_key_env="NO_KEY").check("judges.rubric")
    monkeypatch.setenv("STUB_KEY", "")
    with pytest.raises(SettingError, match="export it"):
        judge("http://host/v1", api_key_env="STUB_KEY").check("judges.rubric")
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"judges\.rubric\.journal=.* is not a folder"):
        judge("http://host/v1", journal=str(tmp_path / "file")).check("judges.rubric")


def test_identity_is_of_the_request_and_holds_no_key() -> None:
    base = judge("http://host/v1", api_key_env="STUB_KEY").identity()
    assert KEY not in json.dumps(base)
    assert base == judge("http://host/v1", concurrency=9, timeout=1.0, journal="x").identity()
    for changed in ({"remote_model": "b"}, {"temperature": None}, {"extra_body": {"top_p": 1}}):
        assert judge("http://host/v1", **changed).identity() != base
    assert judge("http://other/v1").identity() != base


def test_numbers_of_prompts_and_answers_must_agree() -> None:
    with pytest.raises(SettingError, match="1 prompts but 2 answers"):
        judge("http://host/v1").score(["a"], ["b", "c"])
    assert judge("http://host/v1").score([], []) == []
