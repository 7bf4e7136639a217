"""The protocol of losses: a nested `Config` whose `build` makes the loss, and the call."""

from dataclasses import dataclass
from typing import Any, ClassVar


class Configurable:
    """Gives each class's `Config` a `build`."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **kwargs: Any) -> Any:
            assert self._owner is not None
            return self._owner(config=self, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.Config._owner = cls


class BaseLoss(Configurable):
    """`loss(pred, labels, global_valid_tokens, **kwargs)` gives the scaled loss and metrics."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass
