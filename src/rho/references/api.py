"""A reference behind an HTTP server that returns prompt log-probabilities (vLLM, SGLang).

    sent                 [t0, t1, t2]                    token ids, so both sides must share the tokenizer
    answered             [null, {t1: ..}, {t2: ..}]      every score comes with the id of its token
    loss                 NaN   l1   l2                   l2 = -log P(t2 | t0 t1), at the index of t2

A server can answer late, twice, cut, for another request, or with numbers that are no log-probabilities. So each
answer is checked token by token before it is used, and a bad one is asked for again, a bounded number of times. Shifted
values under the right ids can't be seen in one answer: `ApiReference.probe` looks for them before the first use. And a
server that was away must score a known prompt as it did before.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rho.errors import ConfigError, DataError, MismatchError, RhoError, UnscorableError
from rho.references.answers import read_models, read_sglang, read_vllm, token_losses

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "RHO_API_KEY"
LONGEST_BACKOFF = 60.0  # seconds
OF_THE_TEXT = (400, 413, 422, 500)  # statuses that a server may give to one text, and not to others
QUOTED = 300  # characters of a server's words in a message
PROBE_PROMPT = tuple(range(10, 34))  # ids that every vocabulary has
PROBE_ATTEMPTS = 5

T = TypeVar("T")


class ApiConfig(BaseModel):
    """A server and how it may be used. The key, if it wants one, is in the environment variable RHO_API_KEY.

    Attributes:
        url: where the server is, without `/v1`.
        model: the name under which it serves the reference.
        kind: whose interface it has.
        concurrency: requests under way at once.
        timeout_seconds: of one request, from connecting to the last byte.
        max_attempts: for one request. The default lasts about seven minutes, enough for a server's restart. Until the
            probe has passed it is at most 5, so that a mistyped url shows soon.
        max_seconds: no new attempt at a request is made later than this after its first.
        backoff_seconds: scale of the random, exponentially growing wait between attempts.
        requests_per_second: limit, repeated attempts included; None is no limit.
        price: of a million tokens sent, in any currency: the progress tells what was spent.
        probe_tolerance: nats by which scores of the same tokens in two requests may differ. A server that computes in
            16 bits may need more, as its rounding can depend on what else is in a batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    model: str
    kind: Literal["vllm", "sglang"] = "vllm"
    concurrency: int = Field(8, ge=1)
    timeout_seconds: float = Field(120.0, gt=0)
    max_attempts: int = Field(20, ge=1)
    max_seconds: float = Field(600.0, gt=0)
    backoff_seconds: float = Field(1.0, ge=0)
    requests_per_second: float | None = Field(None, gt=0)
    price: float | None = Field(None, ge=0)
    probe_tolerance: float = Field(1e-3, gt=0)


class Meter:
    """Counts the tokens that are sent, every attempt, until somebody takes the count."""

    def __init__(self) -> None:
        self.tokens = 0

    def take(self) -> int:
        """The tokens since the last time."""
        taken, self.tokens = self.tokens, 0
        return taken


class ApiReference:
    """Scores token ids with the model behind an HTTP server.

    Attributes:
        config: as given.
        url: the server's, without a slash at the end.
        window: most tokens that one request may hold; None until the server was asked, and where it does not say.
    """

    def __init__(self, config: ApiConfig, meter: Meter | None = None) -> None:
        """Nothing is sent yet.

        Raises:
            ConfigError: a package is missing, or the url or the key can't be used.
        """
        _check_installed()
        _check_url(config.url)
        _check_key()
        self.config = config
        self.meter = meter or Meter()
        self.url = config.url.rstrip("/")
        self.window: int | None = None
        self.known: list[float] = []  # losses of the known prompt; none until the probe has passed
        self._interrupted = False  # an attempt failed, so another server may be there now
        self._next_start = 0.0  # when the rate limit lets the next request go, on the monotonic clock

    def score(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """loss_BT, float32 nats on the CPU; NaN at position 0, where nothing predicts the token.

        Each run of positions from 0 on (a block, or an isolated document) is one request, so many rows at a time keep
        the server busy. The first call probes the server if nobody has.

        Args:
            input_ids_BT: token ids of the reference's own vocabulary.
            position_ids_BT: they start again at 0 where a document is isolated.

        Raises:
            ConfigError: the server wants another key.
            DataError: it gave no answer in the attempts and the time allowed.
            UnscorableError: it answers, but has no usable scores of a text.
            MismatchError: a text is longer than the server reads, the probe failed, or the server went down and came
                back with other weights.
        """
        if not self.known:
            self.probe()
        spans = _spans(position_ids_BT)
        texts = [input_ids_BT[row, start:stop].tolist() for row, start, stop in spans]
        longest = max(map(len, texts), default=0)
        if self.window is not None and longest > self.window:
            raise MismatchError(
                f"{self.url}: {self.config.model} scores at most {self.window} tokens a request (one less than its "
                f"max_model_len), the corpus has texts of {longest}. Have them read in windows with "
                f"--context {self.window} (score.context in a config), or start the server with a larger window."
            )
        loss_BT = torch.full(input_ids_BT.shape, torch.nan, dtype=torch.float32)
        scored = asyncio.run(self._score_all(texts, UnscorableError))
        if self._interrupted:
            self._check_still_the_same()
        for (row, start, stop), losses in zip(spans, scored, strict=True):
            loss_BT[row, start:stop] = torch.tensor(losses, dtype=torch.float32)
        return loss_BT

    def probe(self) -> None:
        """Ask whether the server has the model, and whether a score belongs to the token it stands at.

        A known prompt is scored whole, cut short, and cut short with other last tokens. A score that comes from the
        text after a token, or from the token before it, gives itself away.

        Raises:
            MismatchError: another model, missing or shifted scores; also what `score` raises.
        """
        self.window = asyncio.run(self._ask_models())
        whole, short = list(PROBE_PROMPT), list(PROBE_PROMPT[: len(PROBE_PROMPT) // 2])
        others = [[*short[:-1], other] for other in whole[-3:]]  # several: two ids may well have the same probability
        scored, cut, *changed = asyncio.run(self._score_all([whole, short, *others], MismatchError))
        self._check_same("the prompt cut short", cut[1:], scored[1 : len(short)])
        for losses in changed:
            self._check_same("the prompt with another last token", losses[1:-1], cut[1:-1])
        if all(abs(losses[-1] - cut[-1]) < 1e-6 for losses in changed):
            raise MismatchError(
                f"{self.url}: expected the score of a token to depend on that token, found {-cut[-1]:.4f} for the last "
                "token whatever it is: the scores are shifted, or made up. Take another server."
            )
        self.known, self._interrupted = scored[1:], False

    def check_same_weights(self, known: Sequence[float], found: Sequence[float] | None = None) -> None:
        """Weights have no name of their own, but they score the known prompt as they did.

        Args:
            known: its losses in an earlier job.
            found: those of now; what the probe found, if not given.

        Raises:
            MismatchError: they differ.
        """
        pairs = zip(self.known if found is None else found, known, strict=True)
        if (most := max(abs(one - other) for one, other in pairs)) > self.config.probe_tolerance:
            raise MismatchError(
                f"{self.url}: expected {self.config.model} as it was before, found scores of the same tokens that "
                f"differ by up to {most:.4f}: the server has other weights, or settings. Start it as it was, then run "
                "the same command again."
            )

    def _check_still_the_same(self) -> None:
        (again,) = asyncio.run(self._score_all([list(PROBE_PROMPT)], DataError))
        self.check_same_weights(self.known, again[1:])
        self._interrupted = False

    def _check_same(self, what: str, found: Sequence[float], expected: Sequence[float]) -> None:
        for token, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
            if abs(one - other) > self.config.probe_tolerance:
                raise MismatchError(
                    f"{self.url}: expected token {token} of {what} to have the same score as before, {-other:.4f}, "
                    f"found {-one:.4f}: the scores are shifted, or unstable. Start the server without prefix caching "
                    "and in float32, allow more with probe_tolerance if it computes in 16 bits, or take another."
                )

    async def _ask_models(self) -> int | None:
        """The window of the model, after making sure that it is served."""
        async with self._client() as client:
            windows = await self._request(client, "/v1/models", None, read_models, "a list of models", MismatchError)
        if self.config.model not in windows:
            served = _clean(", ".join(windows)) or "none"
            raise MismatchError(
                f"{self.url}: expected a server of the model {self.config.model}, found one of {served}. Name one of "
                "these as the reference's model, or start the server with that one."
            )
        longest = windows[self.config.model]
        return None if longest is None else longest - 1  # room for one generated token is always kept

    async def _score_all(self, texts: Sequence[list[int]], refusal: type[RhoError]) -> list[list[float]]:
        """The losses of each text, in order; `refusal` is raised when a server's answers can't be used."""
        losses: list[list[float]] = [[] for _ in texts]
        work = iter(enumerate(texts))

        async def worker(client: httpx.AsyncClient) -> None:
            for index, ids in work:
                losses[index] = await self._score_one(client, ids, refusal)

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.config.concurrency, len(texts))):
                        group.create_task(worker(client))
                return losses
            except ExceptionGroup as errors:
                first = errors.exceptions[0]
        raise first

    async def _score_one(self, client: httpx.AsyncClient, ids: list[int], refusal: type[RhoError]) -> list[float]:
        expected = f"scores of {len(ids)} tokens by {self.config.model}"
        if self.config.kind == "vllm":
            asked = {"model": self.config.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
            path, entries = "/v1/completions", read_vllm
        else:
            sampling = {"max_new_tokens": 0, "temperature": 0}
            asked = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
            path, entries = "/generate", read_sglang

        def read(content: bytes) -> list[float]:
            return token_losses(entries(content, self.config.model), ids)

        return await self._request(client, path, asked, read, expected, refusal)

    async def _request(
        self,
        client: httpx.AsyncClient,
        path: str,
        asked: dict[str, Any] | None,
        read: Callable[[bytes], T],
        expected: str,
        refusal: type[RhoError],
    ) -> T:
        """What `read` makes of the answer, after as many attempts as are needed and allowed."""
        import tenacity

        most = self.config.max_attempts if self.known else min(self.config.max_attempts, PROBE_ATTEMPTS)
        backoff = tenacity.wait_random_exponential(multiplier=self.config.backoff_seconds, max=LONGEST_BACKOFF)
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(lambda result: isinstance(result, _Fault) and result.transient),
            wait=lambda state: max(backoff(state), _outcome(state).wait),
            stop=tenacity.stop_after_attempt(most) | tenacity.stop_before_delay(self.config.max_seconds),
            retry_error_callback=_outcome,
        )
        result: T | _Fault = await attempts(self._attempt, client, path, asked, read)
        number = attempts.statistics["attempt_number"]
        self._interrupted |= number > 1
        if not isinstance(result, _Fault):
            return result
        times = f"{number} attempts" if number > 1 else "1 attempt"
        message = f"{self.url}{path}: expected {expected}, found {result.found} ({times}). {result.advice}"
        raise (result.error or refusal)(message)

    async def _attempt(
        self, client: httpx.AsyncClient, path: str, asked: dict[str, Any] | None, read: Callable[[bytes], T]
    ) -> T | _Fault:
        """One attempt. Faults are values: an exception of httpx holds the request, and so the key."""
        await self._pace()
        method = "GET" if asked is None else "POST"
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                self.meter.tokens += len(asked.get("prompt", asked.get("input_ids", ()))) if asked else 0
                response = await client.request(method, self.url + path, json=asked)
        except TimeoutError:
            return _Fault(f"no answer within {self.config.timeout_seconds:g} s", error=DataError)
        except Exception as error:  # any: whatever comes from inside httpx has seen the key
            return _Fault(_clean(f"{type(error).__name__} {error}"), error=DataError)
        if response.status_code != 200:
            return _refused(response)
        try:
            return read(response.content)
        except ValueError as error:
            return _Fault(_clean(str(error)))

    async def _pace(self) -> None:
        if self.config.requests_per_second is not None:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 1 / self.config.requests_per_second
            await asyncio.sleep(start - now)

    def _client(self) -> httpx.AsyncClient:
        import httpx

        limits = httpx.Limits(max_connections=self.config.concurrency)
        client = httpx.AsyncClient(limits=limits, timeout=None, verify=_certificates())
        client.headers.update(_headers())  # only now: making a client can fail
        return client


class _Fault(NamedTuple):
    """Why an attempt gave nothing to use."""

    found: str
    transient: bool = True
    wait: float = 0.0  # seconds that the server asked for
    error: type[RhoError] | None = None  # None: what the caller raises for an answer that can't be used
    advice: str = "Check the server and its log, then run the same command again."


def _outcome(state: Any) -> Any:
    """What the latest attempt gave (a tenacity.RetryCallState's result)."""
    return state.outcome.result()


def _refused(response: httpx.Response) -> _Fault:
    """An answer other than 200: again later where that can help."""
    status = response.status_code
    found = _clean(f"HTTP {status} {response.text}")
    if status in (401, 403):
        advice = f"Set the environment variable {KEY_VARIABLE} to a key that this server takes."
        return _Fault(found, transient=False, error=ConfigError, advice=advice)
    transient = status in (408, 429) or status >= 500
    error = UnscorableError if status in OF_THE_TEXT else DataError
    return _Fault(found, transient, _retry_after(response.headers.get("Retry-After", "")), error)


def _retry_after(header: str) -> float:
    """Seconds, from a number of them or a date; 0 if it is neither."""
    try:
        if header.isdecimal():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _spans(position_ids_BT: Tensor) -> list[tuple[int, int, int]]:
    """Row, start and stop of each text: it starts at position 0, and a single token has nothing to score."""
    spans = []
    for row, positions_T in enumerate(position_ids_BT):
        starts = [*(positions_T == 0).nonzero().flatten().tolist(), len(positions_T)]
        spans += [(row, start, stop) for start, stop in itertools.pairwise(starts) if stop - start > 1]
    return spans


# Settings and the key


def _check_installed() -> None:
    try:
        import httpx  # noqa: F401
        import tenacity  # noqa: F401
    except ImportError:
        raise ConfigError(
            "A reference behind an API needs httpx and tenacity. Install them with `pip install rho-lm[api]`."
        ) from None


def _check_url(url: str) -> None:
    """Refuse what would fail late, or would put a secret into messages and files."""
    import httpx

    try:
        parts = httpx.URL(url)
        usable = parts.scheme in ("http", "https") and bool(parts.host)
    except httpx.InvalidURL:
        usable = False
    if not usable or parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(
            "The API's url: expected http://host:port or https://host, without user, password or query, found another "
            f"form. A key belongs into the environment variable {KEY_VARIABLE}."
        )
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"The API's url: expected it without /v1, found {url}. Leave that part out.")


def _check_key() -> None:
    if KEY_VARIABLE in os.environ and not re.fullmatch("[!-~]*", os.environ[KEY_VARIABLE]):
        raise ConfigError(
            f"The environment variable {KEY_VARIABLE}: expected visible ASCII characters without spaces, found others "
            "(a line end, perhaps). Set it anew."
        )


@cache
def _certificates() -> ssl.SSLContext:
    """Trusted ones, as httpx would read them for every client anew: slower than a request."""
    import httpx

    return httpx.create_ssl_context()


def _headers() -> dict[str, str]:
    """Read the key at the last moment, so that no object of ours ever holds it."""
    _check_key()
    return {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"} if os.environ.get(KEY_VARIABLE) else {}


def _clean(text: str) -> str:
    """A server's words for a message: without the key, on one line, and not too many of them."""
    if key := os.environ.get(KEY_VARIABLE):
        escaped = json.dumps(key)[1:-1]
        for form in (key, escaped, escaped.replace("/", "\\/")):  # some servers escape slashes as well
            text = text.replace(form, f"[{KEY_VARIABLE}]")
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())[:QUOTED]
