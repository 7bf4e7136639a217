"""Conversations as text, and which characters of it are answers: what supervised fine-tuning trains on.

    prompt, completion     What is 2 + 2?\\n4|            | = end-of-document token
    messages               user:\\nWhat is 2 + 2?\\nassistant:\\n4|
    trained on                                           ^^

A chat is rendered by the tokenizer's own chat template, which has to mark what the assistant says with
`{% generation %}`; by `PLAIN` where the tokenizer has none.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from rho.errors import ConfigError
from rho.sources import CharacterRange, Document, Fields, TextField, expect_string, whole_text
from rho.tokenizer import Tokenizer

# Role and text of each message in lines of their own. The answer's end token is part of the answer: so a model learns
# to stop.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}:\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TextFields(BaseModel):
    """Which fields (or columns) of the records hold the text.

    Attributes:
        text_field: the one that holds all of it, or a list of those that a line end joins,
        prompt_field, completion_field: or the two that hold a prompt and its answer: the answer is trained on,
        messages_field: or the one that holds the messages of a chat: what the assistant says is trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_field: TextField = "text"
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> TextFields:
        pair = (self.prompt_field, self.completion_field)
        if (None in pair and pair != (None, None)) or (self.prompt_field and self.messages_field):
            raise ValueError("give prompt_field and completion_field, or messages_field, or neither")
        return self

    @property
    def conversations(self) -> bool:
        """Whether there are answers, which alone are trained on."""
        return self.completion_field is not None or self.messages_field is not None

    def fields(self, tokenizer: Tokenizer, text_field: TextField | None = None) -> Fields:
        """The fields, and how they become text; chats by the template of the `tokenizer` (from `with_template`).

        A source may have a `text_field` of its own.
        """
        if self.messages_field is not None:
            return chats(self.messages_field, tokenizer)
        if self.prompt_field is not None and self.completion_field is not None:
            return prompts_and_completions(self.prompt_field, self.completion_field)
        return whole_text(text_field or self.text_field)


def prompts_and_completions(prompt_field: str, completion_field: str) -> Fields:
    """Records of a prompt and its completion: the text is both joined as they are, the completion is the answer."""

    def make(prompt: Any, completion: Any) -> tuple[str, list[CharacterRange]]:
        expect_string(prompt_field, prompt, "--prompt-field")
        expect_string(completion_field, completion, "--completion-field")
        if not completion.strip():
            raise ValueError(f"expected an answer in field '{completion_field}', found an empty one")
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))]

    return Fields((prompt_field, completion_field), make, "--prompt-field and --completion-field")


def chats(messages_field: str, tokenizer: Tokenizer) -> Fields:
    """Records of messages, each `{"role", "content"}`: the text is what the chat template makes of them.

    Args:
        messages_field: where the list of messages is.
        tokenizer: from `with_template`.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}

    def make(messages: Any) -> tuple[str, list[CharacterRange]]:
        # A missing value is no text: a template would write None.
        found = [_checked(message, messages_field) for message in _list(messages, messages_field)]
        try:
            [text], [answers] = render_jinja_template(
                [found], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **names
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"expected messages that the chat template can render, found others ({error})") from error
        if text.endswith(tokenizer.eos):  # a corpus ends every document with it
            text = text.removesuffix(tokenizer.eos)
            answers = [(start, min(end, len(text))) for start, end in answers]
        if not any(start < end for start, end in answers):
            raise ValueError(f"expected an answer of the assistant in field '{messages_field}', found none")
        return text, answers

    return Fields((messages_field,), make, "--messages-field")


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with `PLAIN` if it has no chat template; one that doesn't mark the answers is a `ConfigError`."""
    if tokenizer.chat_template is None:
        return replace(tokenizer, chat_template=PLAIN)
    if not MARKS.search(tokenizer.chat_template):
        raise ConfigError(
            "the tokenizer's chat template does not mark what the assistant says, so nobody knows what to train on. "
            "Put {% generation %} and {% endgeneration %} around it, in chat_template.jinja of a copy of the "
            "tokenizer, and give that copy as --tokenizer."
        )
    return tokenizer


def loss_mask(document: Document, ends: np.ndarray) -> np.ndarray:
    """mask_T: the tokens that lie within an answer whole, and last the end token, if the answer reaches the text's end.

    A token that begins in the prompt does not lie within the answer.

    Args:
        document: with its answers.
        ends: the character at which each token ends. A token begins where those before it end.

    Raises:
        ValueError: no token of the text lies within an answer.
    """
    reached = np.maximum.accumulate(ends)
    begins = np.concatenate([[0], reached])[: len(ends)]
    mask = np.zeros(len(ends) + 1, bool)
    for start, end in document.answers or []:
        mask[:-1] |= (begins >= start) & (reached > start) & (reached <= end)
        mask[-1] |= end == len(document.text)
    if not mask[:-1].any():
        raise ValueError("expected an answer of a token or more, found none (plain text has no answers)")
    return mask


def _list(messages: Any, field: str) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages in field '{field}', found {str(messages)[:80]}")
    return messages


def _checked(message: Any, field: str) -> dict[str, Any]:
    """A message without its empty values; a `ValueError` if it is none."""
    match message:
        case {"role": str(role), "content": str(content)} if content.strip() or role != "assistant":
            return {key: value for key, value in message.items() if value is not None}
    raise ValueError(
        f"expected messages with a role and a content, both text, in field '{field}', and no empty answers, found "
        f"{str(message)[:80]}"
    )
