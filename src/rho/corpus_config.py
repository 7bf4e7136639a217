"""Which texts a corpus is made of, and how: the settings of the corpus stage."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rho.conversations import TextFields
from rho.sources import TextField


class SourceConfig(BaseModel):
    """A source with settings of its own.

    Attributes:
        source: files, a folder, an `hf:` dataset, a `docstrings:`/`source:` Python package; see `rho.sources`.
        text_field: of this source; the corpus's unless given.
        max_tokens: go on to the next source after the document that reaches this many tokens of this one: what makes a
            mix. It is the first part of the source that is read, in whatever order that is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    text_field: TextField | None = None
    max_tokens: int | None = Field(None, ge=1)


class CorpusConfig(TextFields):
    """Settings of the corpus stage.

    Attributes:
        sources: what is read, in this order: each by its name, or as a `SourceConfig`.
        text_field, prompt_field, completion_field, messages_field: what holds the text; see `rho.conversations`.
        only_sources: keep only documents with one of these in their `source` field (or of files of these names, where
            they have none); shell patterns.
        block_length: tokens in a block.
        isolated: documents do not see each other (position ids restart); otherwise packed, the paper's way.
            Conversations are always isolated.
        heldout_fraction: share of the documents, chosen by content, that goes to the `validation` split.
        max_tokens: stop after the document that reaches this many tokens.
        shard_blocks: blocks in a shard: the unit of scoring and of resuming.
        seed: of the choice of held-out documents.
        skip_bad_records: count and list unreadable records instead of stopping.
    """

    sources: list[str | SourceConfig] = Field(min_length=1)
    only_sources: list[str] | None = Field(None, min_length=1)
    block_length: int = Field(1024, ge=2)
    isolated: bool = False
    heldout_fraction: float = Field(0.0, ge=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    shard_blocks: int = Field(4096, ge=1)
    seed: int = 0
    skip_bad_records: bool = False

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, the plain ones too, as `SourceConfig`."""
        return [SourceConfig(source=one) if isinstance(one, str) else one for one in self.sources]

    @property
    def settings(self) -> dict[str, Any]:
        """What a built corpus notes of this, as JSON values.

        Not what becomes of a bad record: that may be decided when there is one, and what was built before it is kept.
        """
        return self.model_dump(mode="json", exclude={"skip_bad_records"})

    @property
    def most_tokens(self) -> int | None:
        """How many tokens it can have at most, where that is limited."""
        of_parts = [part.max_tokens for part in self.parts]
        limits = [self.max_tokens, None if None in of_parts else sum(limit or 0 for limit in of_parts)]
        return min((limit for limit in limits if limit is not None), default=None)
