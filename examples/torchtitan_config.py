"""torchtitan: what a function of its `config_registry` sets for a selective training. Tested against torchtitan 0.3.

The corpus is one of `rho corpus --tokenizer ... --block-length SEQ_LEN`, the scores of `rho score`.
"""

from typing import Any

from rho.integrations.torchtitan import SelectiveDataLoader, SelectiveLoss


def selective(config: Any, corpus: str, scores: str, ratio: float = 0.6) -> Any:
    """A trainer's config, for instance of `llama3_8b()`, with selection: return it from a registry function."""
    config.loss = SelectiveLoss.Config(ratio=ratio, seq_len=config.training.seq_len)  # no ChunkedLossWrapper around it
    config.dataloader = SelectiveDataLoader.Config(corpus=corpus, scores=scores)
    return config
