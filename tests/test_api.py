"""A reference behind an HTTP server: right scores or a clear error, whatever the server does, and the key stays hidden.

The servers here are real ones on 127.0.0.1, whose model is a function of the token ids.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import runpy
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import rho.references.api
from rho.errors import ConfigError, DataError, MismatchError, RhoError, UnscorableError
from rho.references.api import KEY_VARIABLE, ApiConfig, ApiReference, Meter, _retry_after

MODEL = "org/reference"
SECRET = 'sk-1/very"secret'
KINDS = pytest.mark.parametrize("kind", ["vllm", "sglang"])


def logprob(ids: list[int], t: int) -> float:
    """Of token t after those before it, and of nothing else."""
    return -0.01 - 9 * zlib.crc32(json.dumps(ids[: t + 1]).encode()) / 2**32


def logprobs(ids: list[int]) -> list[float | None]:
    return [None, *(logprob(ids, t) for t in range(1, len(ids)))]


def vllm_answer(ids: list[int], values: list[Any]) -> dict[str, Any]:
    entries = [
        None if value is None else {str(id): {"logprob": value, "rank": 7, "decoded_token": "x"}}
        for id, value in zip(ids, values, strict=True)
    ]
    return {"model": MODEL, "choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]}


def sglang_answer(ids: list[int], values: list[Any]) -> dict[str, Any]:
    entries = [[value, id, None] for id, value in zip(ids, values, strict=True)]
    return {"text": "", "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": entries}}


ANSWERS = {"/v1/completions": vllm_answer, "/generate": sglang_answer}


class Stub:
    """A server that scores, and does what `fault` says with each request for scores.

    Attributes:
        fault: called with the request's number and ids; the name of a fault, or None.
        texts: ids of the requests for scores, in order of arrival.
        headers: of all requests.
        most_active: requests for scores that were under way at once.
    """

    def __init__(self) -> None:
        self.fault: Callable[[int, list[int]], str | None] = lambda number, ids: None
        self.values = logprobs
        self.models: Any = {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 65}]}
        self.texts: list[list[int]] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.most_active = 0
        self.meeting: threading.Barrier | None = None  # requests wait here for each other
        self.swap: dict[int, list[int]] = {}  # ids that two requests exchange
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self, listener: socket.socket | None = None) -> Iterator[Stub]:
        handler = type("BoundHandler", (Handler,), {"stub": self})
        server = QuietServer(("127.0.0.1", 0), handler, bind_and_activate=listener is None)
        if listener is not None:
            server.socket.close()
            server.socket = listener
            server.server_activate()
        self.port = server.socket.getsockname()[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are part of the tests."""

    daemon_threads = False

    def handle_error(self, *_: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.stub.headers.append(dict(self.headers))
        self.send(json.dumps(self.stub.models).encode())

    def do_POST(self) -> None:
        stub, asked = self.stub, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = asked["prompt"] if self.path == "/v1/completions" else asked["input_ids"]
        with stub.lock:
            number = len(stub.texts)
            stub.texts.append(ids)
            stub.headers.append(dict(self.headers))
            stub.active += 1
            stub.most_active = max(stub.most_active, stub.active)
        try:
            self.score(asked, ids, stub.fault(number, ids))
        finally:
            with stub.lock:
                stub.active -= 1

    def score(self, asked: dict[str, Any], ids: list[int], fault: str | None) -> None:
        stub = self.stub
        if stub.meeting is not None:
            place = stub.meeting.wait(5)
            if fault == "another request's":
                stub.swap[place] = ids
                stub.meeting.wait(5)
                ids = stub.swap[1 - place]
        if fault in TRANSPORT_FAULTS:
            TRANSPORT_FAULTS[fault](self, json.dumps(ANSWERS[self.path](ids, stub.values(ids))).encode())
            return
        make, values = ANSWERS[self.path], stub.values(ids)
        answer = BODY_FAULTS[fault](ids, values, make) if fault in BODY_FAULTS else make(ids, values)
        if fault == "other model":
            answer["model"] = "org/another"
        elif fault == "two answers":
            answer["choices"] *= 2
        elif fault == "two scores of a token":
            answer["choices"][0]["prompt_logprobs"][-1]["9999"] = {"logprob": -0.5}
        self.send(json.dumps(answer).encode())

    def send(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None


TRANSPORT_FAULTS: dict[str, Callable[[Handler, bytes], Any]] = {
    "429": lambda handler, body: handler.send(b"slow down", 429, Retry_After="0"),
    "500": lambda handler, body: handler.send(b"oh dear", 500),
    "503": lambda handler, body: handler.send(b"", 503),
    "time-out": lambda handler, body: handler.stub.closing.wait(2),
    "cut body": lambda handler, body: handler.send(body[: len(body) // 2], length=len(body)),
    "cut body, no length told": lambda handler, body: handler.send(body[: len(body) // 2]),
    "empty body": lambda handler, body: handler.send(b""),
    "hung up": lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR),
    "invalid JSON": lambda handler, body: handler.send(b"<html>" + body),
    "no text": lambda handler, body: handler.send(b"\xff\xfe" + body),
    "another JSON": lambda handler, body: handler.send(b"[1, 2]"),
    "another gzip": lambda handler, body: handler.send(body, Content_Encoding="gzip"),
}

Make = Callable[[list[int], list[Any]], dict[str, Any]]


def last(values: list[Any], value: Any) -> list[Any]:
    return [*values[:-1], value]


BODY_FAULTS: dict[str, Callable[[list[int], list[Any], Make], dict[str, Any]]] = {
    "one score too few": lambda ids, values, make: make(ids[:-1], values[:-1]),
    "one score too many": lambda ids, values, make: make([*ids, 5], [*values, -0.5]),
    "no scores": lambda ids, values, make: make([], []),
    "shifted back": lambda ids, values, make: make([*ids[1:], ids[0]], [None, *values[2:], -0.5]),
    "shifted on": lambda ids, values, make: make([ids[-1], *ids[:-1]], values),
    "another text's": lambda ids, values, make: make([id + 1 for id in ids], values),
    "NaN": lambda ids, values, make: make(ids, last(values, math.nan)),
    "minus infinity": lambda ids, values, make: make(ids, last(values, -math.inf)),
    "minus infinity as vLLM writes it": lambda ids, values, make: make(ids, last(values, -9999.0)),
    "positive": lambda ids, values, make: make(ids, last(values, 0.25)),
    "a string": lambda ids, values, make: make(ids, last(values, "-0.5")),
    "missing in the middle": lambda ids, values, make: make(ids, [None, None, *values[2:]]),
    "score of the first token": lambda ids, values, make: make(ids, [-0.5, *values[1:]]),
}

FAULTS = [*TRANSPORT_FAULTS, *BODY_FAULTS]
FAULTS_OF_VLLM = ["other model", "two answers", "two scores of a token"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if find_spec("sniffio") is None:  # httpcore tries to import it many times a request, which is slow under pytest
        monkeypatch.setitem(sys.modules, "sniffio", None)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub().serving() as server:
        yield server


def reference(url: str, **settings: Any) -> ApiReference:
    return ApiReference(ApiConfig(url=url, model=MODEL, **{"backoff_seconds": 1e-4, "max_attempts": 4} | settings))


def probed(stub: Stub, **settings: Any) -> ApiReference:
    """A reference that has found the server good; the record of requests starts anew."""
    made = reference(stub.url, **settings)
    made.probe()
    stub.texts.clear()
    return made


def batch(rows: int, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and the positions of a packed corpus."""
    ids = torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length).expand(rows, length)


def expected(ids_BT: torch.Tensor) -> np.ndarray:
    return np.array([[math.nan, *(-x for x in logprobs(ids)[1:])] for ids in ids_BT.tolist()], np.float32)


def check(made: ApiReference, ids: torch.Tensor, positions: torch.Tensor) -> None:
    np.testing.assert_array_equal(made.score(ids, positions).numpy(), expected(ids))


# Right scores


@KINDS
def test_losses_stand_at_their_tokens_and_a_row_of_a_packed_corpus_is_one_request(stub: Stub, kind: str) -> None:
    ids, positions = batch(5)
    loss = probed(stub, kind=kind).score(ids, positions)
    assert loss.dtype == torch.float32 and loss.shape == ids.shape
    np.testing.assert_array_equal(loss.numpy(), expected(ids))
    assert sorted(stub.texts) == sorted(ids.tolist())


@KINDS
def test_each_isolated_document_is_one_request_and_one_of_a_single_token_none(stub: Stub, kind: str) -> None:
    ids, _ = batch(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 0]])
    loss = probed(stub, kind=kind).score(ids, positions).numpy()
    documents = [(0, 0, 3), (0, 4, 8), (1, 1, 7)]
    wanted = np.full((2, 8), math.nan, np.float32)
    for row, start, stop in documents:
        wanted[row, start:stop] = expected(ids[row : row + 1, start:stop])[0]
    np.testing.assert_array_equal(loss, wanted)
    assert sorted(stub.texts) == sorted(ids[row, start:stop].tolist() for row, start, stop in documents)


def test_nothing_is_sent_where_there_is_nothing_to_score(stub: Stub) -> None:
    loss = probed(stub).score(torch.ones(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    assert loss.shape == (3, 1) and loss.isnan().all() and stub.texts == []


def test_the_answer_of_vllm_is_read_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": MODEL, "prompt": [9, 358, 17], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = """{"id": "cmpl-3c7f", "object": "text_completion", "created": 1760000000, "model": "org/reference",
        "choices": [{"index": 0, "text": " of", "logprobs": null, "finish_reason": "length", "stop_reason": null,
            "token_ids": null, "prompt_token_ids": null, "prompt_logprobs": [null,
                {"358": {"logprob": -10.5, "rank": 500, "decoded_token": "the"}},
                {"17": {"logprob": 0.0, "rank": 1, "decoded_token": null}}]}],
        "service_tier": null, "system_fingerprint": null, "usage": {"prompt_tokens": 3, "total_tokens": 4,
            "completion_tokens": 1, "prompt_tokens_details": null}, "kv_transfer_params": null}"""
    found = score_with(monkeypatch, "vllm", "http://server:8000/base/v1/completions", asked, answer)
    np.testing.assert_array_equal(found, [[math.nan, 10.5, 0.0]])
    assert not np.signbit(found[0, 2])


def test_the_answer_of_sglang_is_read_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "input_ids": [9, 358, 17],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = """{"text": "", "meta_info": {"id": "5e1a", "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 3, "input_token_logprobs": [[null, 9, null], [-10.5, 358, "the"], [-0.25, 17, null]],
        "output_token_logprobs": [], "completion_tokens": 0, "cached_tokens": 0}}"""
    found = score_with(monkeypatch, "sglang", "http://server:8000/base/generate", asked, answer)
    np.testing.assert_array_equal(found, [[math.nan, 10.5, 0.25]])


def score_with(monkeypatch: pytest.MonkeyPatch, kind: str, url: str, asked: dict, answer: str) -> np.ndarray:
    def handle(request: httpx.Request) -> httpx.Response:
        assert (str(request.url), json.loads(request.content)) == (url, asked)
        return httpx.Response(200, text=answer)

    made = reference("http://server:8000/base/", kind=kind)
    monkeypatch.setattr(made, "probe", lambda: None)
    monkeypatch.setattr(made, "_client", lambda: httpx.AsyncClient(transport=httpx.MockTransport(handle)))
    return made.score(torch.tensor([[9, 358, 17]]), torch.arange(3)[None]).numpy()


def test_requests_are_under_way_together_but_not_more_than_allowed(stub: Stub) -> None:
    made = probed(stub, concurrency=3)
    stub.meeting = threading.Barrier(3)  # no request is answered before three are there
    stub.most_active = 0
    check(made, *batch(12))
    assert stub.most_active == 3


def test_requests_keep_to_the_rate_repeated_ones_too(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    made, waits, sleep = probed(stub, concurrency=20, max_attempts=20), [], asyncio.sleep
    made.config = made.config.model_copy(update={"requests_per_second": 0.1})

    async def count(seconds: float) -> None:
        if seconds > 5:  # of the rate, not of the back-off
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", count)
    stub.fault = lambda number, ids: "500" if number < 10 else None
    check(made, *batch(10))
    assert len(stub.texts) == 20 + 1
    np.testing.assert_allclose(waits, [10 * n for n in range(1, 21)], atol=4)


# Faults


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind in ("vllm", "sglang") for fault in FAULTS] + [("vllm", x) for x in FAULTS_OF_VLLM],
)
def test_after_a_passing_fault_the_scores_are_right(stub: Stub, kind: str, fault: str) -> None:
    made = probed(stub, kind=kind, timeout_seconds=0.2 if fault == "time-out" else 5)
    stub.fault = lambda number, ids: fault if number in (0, 2) else None
    check(made, *batch(3))
    assert len(stub.texts) == 5 + 1  # and the known prompt: it might be another server now


PERMANENT = {
    "429": "HTTP 429 slow down",
    "500": "HTTP 500 oh dear",
    "503": "HTTP 503",
    "time-out": "no answer within 0.05 s",
    "cut body": "RemoteProtocolError",
    "cut body, no length told": "Invalid JSON",
    "empty body": "Invalid JSON",
    "hung up": "RemoteProtocolError|ReadError",
    "invalid JSON": "Invalid JSON",
    "no text": "Invalid JSON",
    "another JSON": "should be an object",
    "another gzip": "DecodingError",
    "one score too few": "scores of 8 tokens",
    "one score too many": "scores of 10 tokens",
    "no scores": "scores of 0 tokens",
    "shifted back": "the score of id .* at token",
    "shifted on": "the score of id .* at token",
    "another text's": "the score of id .* at token",
    "NaN": "should be a finite number",
    "minus infinity": "should be a finite number",
    "minus infinity as vLLM writes it": "should be greater than -9999",
    "positive": "should be less than or equal to 0.000001",
    "a string": "should be a valid number",
    "missing in the middle": "no score at token 1 of 9",
    "score of the first token": "a score at token 0 of 9",
    "other model": "an answer of the model org/another",
    "two answers": "should have at most 1 item",
    "two scores of a token": "2 scores of token 8 where one was asked for",
}


@pytest.mark.parametrize("fault", FAULTS + FAULTS_OF_VLLM)
def test_a_lasting_fault_is_a_clear_error_after_the_allowed_attempts(stub: Stub, fault: str) -> None:
    made = probed(stub, timeout_seconds=5)
    if fault == "time-out":
        made.config = made.config.model_copy(update={"timeout_seconds": 0.05})
    stub.fault = lambda number, ids: fault
    with pytest.raises(DataError, match=PERMANENT[fault]) as caught:
        made.score(*batch(1))
    message = str(caught.value)
    assert message.startswith(f"{stub.url}/v1/completions: expected scores of 9 tokens by {MODEL}, found ")
    assert "(4 attempts)" in message and len(stub.texts) == 4


def test_answers_that_two_requests_exchange_are_not_taken(stub: Stub) -> None:
    made = probed(stub, concurrency=2)
    stub.meeting = threading.Barrier(2)

    def exchange(number: int, ids: list[int]) -> str | None:
        if number == 4:
            stub.meeting = None  # the known prompt comes alone
        return "another request's" if number < 2 else None

    stub.fault = exchange
    check(made, *batch(2))
    assert len(stub.texts) == 4 + 1


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_faults_mixed_at_random_never_give_a_wrong_score(stub: Stub, kind: str, seed: int) -> None:
    draw = random.Random(seed)
    names = [fault for fault in FAULTS if fault != "time-out"] + (FAULTS_OF_VLLM if kind == "vllm" else [])
    made = probed(stub, kind=kind, max_attempts=40, timeout_seconds=5)
    stub.fault = lambda number, ids: draw.choice(names) if draw.random() < 0.5 else None
    ids, positions = batch(40, seed=seed)
    check(made, ids, positions)
    assert 60 < len(stub.texts) < 120


def test_one_text_beyond_saving_is_told_from_a_server_that_is(stub: Stub) -> None:
    made, (ids, positions) = probed(stub), batch(30)
    for fault in ("NaN", "500"):
        stub.fault = lambda number, asked, fault=fault: fault if asked == ids[7].tolist() else None
        with pytest.raises(UnscorableError, match=r"finite number|HTTP 500"):
            made.score(ids, positions)
    assert stub.texts.count(ids[7].tolist()) == 4 + 4
    made.config = made.config.model_copy(update={"max_seconds": 0.01})
    for fault in ("429", "hung up"):
        stub.fault = lambda number, asked, fault=fault: fault
        with pytest.raises(DataError) as caught:
            made.score(*batch(1))
        assert not isinstance(caught.value, UnscorableError)


def test_the_meter_counts_the_tokens_of_every_attempt(stub: Stub) -> None:
    meter = Meter()
    made = reference(stub.url)
    made.meter = meter
    made.probe()
    assert meter.take() == sum(map(len, stub.texts)) > 0
    before = len(stub.texts)
    stub.fault = lambda number, ids: "500" if number == before else None
    check(made, *batch(3))
    assert meter.take() == sum(map(len, stub.texts[before:])) > 3 * 9
    assert meter.take() == 0


def test_a_server_that_was_down_and_comes_up_again_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # not listening yet: connections are refused
    made = reference(f"http://127.0.0.1:{listener.getsockname()[1]}", max_attempts=10)
    attempts, pace, server = [], made._pace, Stub().serving(listener)

    async def count() -> None:
        attempts.append(len(attempts))
        if len(attempts) == 4:
            server.__enter__()
        await pace()

    monkeypatch.setattr(made, "_pace", count)
    try:
        check(made, *batch(2))
        assert len(attempts) == 3 + 1 + 5 + 2  # refused, then the list of models, the probe and the texts
    finally:
        server.__exit__(None, None, None)


def test_a_server_that_comes_back_with_other_weights_is_refused(stub: Stub) -> None:
    made = probed(stub)

    def restart(number: int, ids: list[int]) -> str | None:
        stub.values = (lambda ids: [x and 1.01 * x for x in logprobs(ids)]) if number == 1 else stub.values
        return "hung up" if number == 1 else None

    stub.fault = restart
    with pytest.raises(MismatchError, match=r"differ by up to 0\.0\d+: the server has other weights"):
        made.score(*batch(3))
    with pytest.raises(MismatchError, match="other weights"):  # not forgotten
        stub.fault = lambda number, ids: "503" if len(stub.texts) % 2 else None
        made.score(*batch(1))


def test_a_server_that_stays_down_is_a_clear_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(DataError, match=rf"{url}/v1/models: .* found ConnectError .*4 attempts.*Check the server"):
            reference(url).score(*batch(1))


def test_by_default_minutes_are_waited_for_a_server_that_goes_down_but_not_for_one_that_was_never_there(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(0)
    made, waits, sleep = ApiReference(ApiConfig(url=stub.url, model=MODEL)), [], asyncio.sleep

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", wait)
    stub.fault = lambda number, ids: "503"
    with pytest.raises(DataError, match=r"HTTP 503.* \(5 attempts\)"):
        made.score(*batch(1))
    assert sum(waits) < 15 * 5  # the probe's five requests wait side by side
    stub.fault = lambda number, ids: None
    made.probe()
    waits.clear()
    stub.fault = lambda number, ids: "503"
    with pytest.raises(DataError, match=r"HTTP 503.* \(20 attempts\)"):
        made.score(*batch(1))
    assert 240 < sum(waits) < 600


@pytest.mark.parametrize(
    ("status", "error"), [(400, UnscorableError), (404, DataError), (401, ConfigError), (403, ConfigError)]
)
def test_what_another_attempt_can_not_mend_is_not_tried_again(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, status: int, error: type[RhoError]
) -> None:
    made = probed(stub)
    monkeypatch.setitem(TRANSPORT_FAULTS, "refused", lambda handler, body: handler.send(b"why: \x1b[31mno", status))
    stub.fault = lambda number, ids: "refused"
    with pytest.raises(error, match=rf"{stub.url}.*HTTP {status} why: \[31mno \(1 attempt\)") as caught:
        made.score(*batch(1))
    assert type(caught.value) is error
    assert len(stub.texts) == 1


def test_the_server_s_wish_to_wait_is_honoured_and_the_total_time_is_bounded(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = probed(stub, max_seconds=30, max_attempts=1000)
    busy = lambda handler, body: handler.send(b"busy", 429, Retry_After="31")  # noqa: E731
    monkeypatch.setitem(TRANSPORT_FAULTS, "busy", busy)
    stub.fault = lambda number, ids: "busy"
    with pytest.raises(DataError, match="HTTP 429 busy"):
        made.score(*batch(1))
    assert len(stub.texts) == 1  # a second attempt would come too late
    made.config = made.config.model_copy(update={"max_seconds": 0.1})
    stub.texts.clear()
    stub.fault = lambda number, ids: "500"
    with pytest.raises(DataError, match="HTTP 500"):
        made.score(*batch(1))
    assert 1 < len(stub.texts) < 1000


def test_the_wish_to_wait_is_a_number_or_a_date() -> None:
    assert _retry_after("7") == 7
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("Wed, 21 Oct 2115 07:28:00 GMT") > 1e9
    assert [_retry_after(text) for text in ("", "soon", "-3", "nan")] == [0] * 4


# The probe


@KINDS
def test_a_good_server_passes_the_probe_once_and_tells_its_window(stub: Stub, kind: str) -> None:
    made = reference(stub.url, kind=kind)
    check(made, *batch(2))
    assert made.window == 64 and len(stub.texts) == 5 + 2
    check(made, *batch(2, 64))
    assert len(stub.texts) == 5 + 4
    with pytest.raises(MismatchError, match=r"at most 64 tokens .* texts of 65"):
        made.score(*batch(2, 65))
    assert len(stub.texts) == 5 + 4


def test_a_server_that_tells_no_window_is_asked_for_texts_of_any_length(stub: Stub) -> None:
    stub.models = {"data": [{"id": MODEL}]}
    made = reference(stub.url)
    check(made, *batch(1, 80))
    assert made.window is None and max(map(len, stub.texts)) == 80


def back(ids: list[int]) -> list[Any]:
    return [None, *logprobs(ids)[2:], -0.5]


def on(ids: list[int]) -> list[Any]:
    return [None, -0.5, *logprobs(ids)[1:-1]]


def made_up(ids: list[int]) -> list[Any]:
    return [None] + [-2.5] * (len(ids) - 1)


def from_the_end(ids: list[int]) -> list[Any]:
    return [None, *(logprob(ids[::-1], t) for t in range(1, len(ids)))]


def by_length(ids: list[int]) -> list[Any]:
    return [x and x - 0.01 * len(ids) for x in logprobs(ids)]


def unstable(ids: list[int]) -> list[Any]:
    return [None, *(-random.uniform(1, 2) for _ in ids[1:])]


@KINDS
@pytest.mark.parametrize("values", [back, on, made_up, from_the_end, by_length, unstable])
def test_a_server_whose_scores_belong_to_other_tokens_is_refused(stub: Stub, kind: str, values: Callable) -> None:
    stub.values = values
    with pytest.raises(MismatchError, match=f"{stub.url}: expected .* shifted"):
        reference(stub.url, kind=kind).score(*batch(1))


def test_a_server_whose_scores_see_the_token_after_is_refused(stub: Stub) -> None:
    stub.values = lambda ids: [x and x - 0.01 * (t == 10 and ids[11] != 21) for t, x in enumerate(logprobs(ids))]
    with pytest.raises(MismatchError, match="token 10 of the prompt with another last token"):
        reference(stub.url).probe()


def test_rounding_that_depends_on_the_batch_is_allowed_if_asked_and_a_shift_still_refused(stub: Stub) -> None:
    rounded = lambda values: [x and round(x * 32) / 32 for x in values]  # noqa: E731
    stub.values = lambda ids: rounded([x and x - 0.001 * len(ids) for x in logprobs(ids)])
    with pytest.raises(MismatchError, match="allow more with probe_tolerance"):
        reference(stub.url).probe()
    reference(stub.url, probe_tolerance=0.1).probe()
    for shifted in (back, on):
        stub.values = lambda ids, shifted=shifted: rounded(shifted(ids))
        with pytest.raises(MismatchError, match="shifted"):
            reference(stub.url, probe_tolerance=0.1).probe()


@pytest.mark.parametrize("fault", [*BODY_FAULTS, *FAULTS_OF_VLLM])
def test_a_server_that_answers_the_probe_wrongly_does_not_fit(stub: Stub, fault: str) -> None:
    stub.fault = lambda number, ids: fault
    with pytest.raises(MismatchError, match=f"{stub.url}/v1/completions: expected scores of"):
        reference(stub.url, concurrency=1).probe()
    assert len(stub.texts) == 4


@pytest.mark.parametrize(
    ("models", "found"),
    [
        ({"data": [{"id": "org/a"}, {"id": "org/b"}]}, "found one of org/a, org/b"),
        ({"data": []}, "found one of none"),
        ({"error": "no"}, "expected a list of models, found data: Field required"),
    ],
)
@KINDS
def test_a_server_without_the_model_is_refused(stub: Stub, kind: str, models: Any, found: str) -> None:
    stub.models = models
    with pytest.raises(MismatchError, match=found):
        reference(stub.url, kind=kind).score(*batch(1))
    assert stub.texts == []


# The key


def everything_about(error: BaseException) -> str:
    """All that a traceback with local variables, a log or a debugger can show; frames of tests left out."""
    seen, chain = [], [error]
    while chain:
        one = chain.pop()
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
        assert not isinstance(one, httpx.HTTPError), "holds the request, and so its headers"
        shown = traceback.TracebackException.from_exception(one, capture_locals=True, compact=True)
        shown.stack = traceback.StackSummary.from_list([f for f in shown.stack if "/tests/" not in f.filename])
        seen += [*shown.format(chain=False), str(one), repr(one), repr(vars(one))]
    return "".join(seen)


def test_the_key_is_sent_as_a_bearer_if_there_is_one(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    check(reference(stub.url), *batch(1))
    assert not any("Authorization" in headers for headers in stub.headers)
    stub.headers.clear()
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    check(reference(stub.url), *batch(1))
    assert [headers["Authorization"] for headers in stub.headers] == [f"Bearer {SECRET}"] * 7


ECHOES = {
    "as it is": SECRET,
    "as JSON": json.dumps({"error": f"key {SECRET} is bad"}),
    "as JSON with slashes escaped": json.dumps({"error": SECRET}).replace("/", "\\/"),
    "far into the text": "x" * 280 + SECRET,
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [200, 401, 400, 500])
def test_the_key_is_in_no_error_though_the_server_repeats_it(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int, echo: str
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    made = probed(stub)
    monkeypatch.setitem(TRANSPORT_FAULTS, "echo", lambda handler, body: handler.send(echo.encode(), status))
    stub.fault = lambda number, ids: "echo"
    with pytest.raises(RhoError) as caught:
        made.score(*batch(1))
    shown = everything_about(caught.value) + caplog.text + repr(made) + str(vars(made))
    assert "secret" not in shown and "very" not in shown
    assert status == 200 or f"HTTP {status}" in shown
    assert "HTTP Request" in caplog.text  # something was logged


def test_the_key_is_in_no_error_though_the_server_s_names_hold_it(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    made = probed(stub)
    monkeypatch.setitem(
        TRANSPORT_FAULTS, "echo", lambda handler, body: handler.send(body.replace(b'"model": "org/reference"', named))
    )
    named = b'"model": ' + json.dumps(SECRET).encode()
    stub.fault = lambda number, ids: "echo"
    with pytest.raises(DataError, match=r"an answer of the model \[RHO_API_KEY\]") as caught:
        made.score(*batch(1))
    assert "secret" not in everything_about(caught.value)
    stub.models = {"data": [{"id": SECRET}]}
    with pytest.raises(MismatchError, match=r"found one of \[RHO_API_KEY\]") as refused:
        made.probe()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("kind", [httpx.ReadError, httpx.ConnectTimeout, httpx.LocalProtocolError, UnicodeError])
def test_the_key_is_in_no_error_made_from_one_of_httpx(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    made, client = reference("http://server:8000"), httpx.AsyncClient

    def fail(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == f"Bearer {SECRET}"
        error = kind(f"could not send {request.headers['Authorization']}")
        error.request = request
        raise error

    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **settings: client(**settings, transport=httpx.MockTransport(fail))
    )
    with pytest.raises(DataError, match=rf"{kind.__name__} could not send Bearer \[RHO_API_KEY\]") as caught:
        made.score(*batch(1))
    assert "secret" not in everything_about(caught.value)


@pytest.mark.parametrize("bad", [f"{SECRET}\n", f" {SECRET}", f"{SECRET}\u00e9", f"a\t{SECRET}"])
def test_a_key_that_can_not_be_sent_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    made = reference("http://server:8000")
    monkeypatch.setenv(KEY_VARIABLE, bad)
    for attempt in (lambda: reference("http://server:8000"), made.probe):  # set before, or after it was made
        with pytest.raises(ConfigError, match=KEY_VARIABLE) as caught:
            attempt()
        assert "secret" not in everything_about(caught.value)


# Settings


@pytest.mark.parametrize(
    "url",
    [
        "server:8000",
        "ftp://server",
        "http://",
        "http://server:port",
        "http://user:secret@server",
        "http://server/?key=secret",
        "http://server/#secret",
    ],
)
def test_a_url_of_another_form_is_refused_and_a_secret_in_it_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://host:port") as caught:
        reference(url)
    assert "secret" not in str(caught.value)


def test_a_url_that_ends_in_v1_is_refused() -> None:
    with pytest.raises(ConfigError, match="without /v1"):
        reference("http://server:8000/v1/")


@pytest.mark.parametrize("package", ["httpx", "tenacity"])
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install rho-lm\[api\]"):
        reference("http://server:8000")


def test_importing_the_module_needs_neither_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("httpx", "tenacity"):
        monkeypatch.setitem(sys.modules, package, None)
    assert runpy.run_path(rho.references.api.__file__, run_name="imported_anew")["ApiReference"] is not ApiReference
