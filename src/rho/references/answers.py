"""What servers answer, parsed strictly: every number is checked before anything is made of it.

Each reader raises ValueError, saying what it found, where an answer is not what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# vLLM writes -9999.0 where the log-probability is minus infinity.
_LogProb = Annotated[float, Field(gt=-9999.0, le=1e-6, allow_inf_nan=False)]
Entry = tuple[int | None, float | None]  # token id and log-probability; None where the server says nothing


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)


class _Card(_Answer):
    id: str
    max_model_len: int | None = None


class _Models(_Answer):
    data: list[_Card]


class _VllmScore(_Answer):
    logprob: _LogProb


class _VllmChoice(_Answer):
    prompt_logprobs: list[dict[int, _VllmScore] | None]


class _VllmAnswer(_Answer):
    model: str
    choices: list[_VllmChoice] = Field(min_length=1, max_length=1)


class _SglangMeta(_Answer):
    input_token_logprobs: list[tuple[_LogProb | None, int, Any]]


class _SglangAnswer(_Answer):
    meta_info: _SglangMeta


A = TypeVar("A", bound=_Answer)


def _parse(shape: type[A], content: bytes) -> A:
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def read_models(content: bytes) -> dict[str, int | None]:
    """The models that are served, and how many tokens each holds, prompt and answer; None where it is not told."""
    return {card.id: card.max_model_len for card in _parse(_Models, content).data}


def read_vllm(content: bytes, model: str) -> list[Entry]:
    """An entry for each prompt token of vLLM's /v1/completions, which must come from `model`."""
    answer = _parse(_VllmAnswer, content)
    if answer.model != model:
        raise ValueError(f"an answer of the model {answer.model}")
    entries: list[Entry] = []
    for token, scores in enumerate(answer.choices[0].prompt_logprobs):
        if scores is not None and len(scores) != 1:
            raise ValueError(f"{len(scores)} scores of token {token} where one was asked for")
        entries.append((None, None) if scores is None else next((id, s.logprob) for id, s in scores.items()))
    return entries


def read_sglang(content: bytes, model: str) -> list[Entry]:
    """An entry for each prompt token of SGLang's /generate, which does not name its model: the probe has to do."""
    return [(token, logprob) for logprob, token, _ in _parse(_SglangAnswer, content).meta_info.input_token_logprobs]


def token_losses(entries: Sequence[Entry], ids: Sequence[int]) -> list[float]:
    """The loss of each token of `ids` in nats, NaN first.

    Raises:
        ValueError: the scores are not those of these tokens, one each.
    """
    if len(entries) != len(ids):
        raise ValueError(f"scores of {len(entries)} tokens")
    losses = []
    for index, ((scored, logprob), sent) in enumerate(zip(entries, ids, strict=True)):
        if scored not in (sent, None):
            raise ValueError(f"the score of id {scored} at token {index}, where id {sent} was sent")
        if (logprob is None) != (index == 0):
            raise ValueError(f"{'no' if logprob is None else 'a'} score at token {index} of {len(ids)}")
        losses.append(math.nan if logprob is None else max(0.0, -logprob))
    return losses
