"""rho: Selective Language Modeling (Rho-1, arXiv 2404.07965)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rho.integrations.labels import attach_scores, split_labels
    from rho.selection import Selector
    from rho.selective import SelectiveLoss, count_selected, selective_loss

__version__ = "0.1.0"
__all__ = ["SelectiveLoss", "Selector", "attach_scores", "count_selected", "selective_loss", "split_labels"]

_WHERE = {
    "SelectiveLoss": "rho.selective",
    "Selector": "rho.selection",
    "attach_scores": "rho.integrations.labels",
    "count_selected": "rho.selective",
    "selective_loss": "rho.selective",
    "split_labels": "rho.integrations.labels",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only then: the command line starts without torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'rho' has no attribute '{name}'")
