"""Floating-point operations of models, counted from their shapes: what a budget is reckoned in.

Of one token, with N weights that multiply (all but the input embedding, which is looked up; the head's count, also
where it is the embedding), L layers, attention heads of A numbers together, and a window of T tokens:

    forward     2 N + 4 L A T
    backward    twice that; of the head only for the kept share of the tokens (docs/step.md)

A plain training step has 6 N + 12 L A T, as in appendix B of PaLM (arXiv 2204.02311), whose utilisation (MFU) this
count gives: attention is counted over the whole window, though a causal one needs half of it, and what a step makes
twice to save memory (gradient checkpointing) is not counted. Every weight counts: a mixture of experts costs less.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from rho.train import TrainConfig

SAMPLED = 1000  # steps of a ratio schedule that are looked at


class Forward(NamedTuple):
    """FLOPs of one token's forward: in the weights of the backbone, in attention, and in the head."""

    weights: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.attention + self.head


def forward_flops(model: PreTrainedModel, length: int) -> Forward:
    """FLOPs of one token's forward in windows of `length` tokens; the model may be a `rho.models.skeleton`."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    lookup = 0 if head is embedding else embedding.numel()
    backbone = sum(weight.numel() for weight in model.parameters()) - head.numel() - lookup
    heads = getattr(config, "num_attention_heads", 0)  # 0: a model without attention
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Forward(2.0 * backbone, 4.0 * config.num_hidden_layers * heads * size * length, 2.0 * head.numel())


def train_flops(
    forward: Forward, config: TrainConfig, steps: int, micro_batches: int = 1, reference: Forward | None = None
) -> float:
    """FLOPs of one token in training, the mean over `steps`.

    Args:
        forward: of the model.
        config: the selection, which decides what is passed backward, and whether anything is passed forward twice. Of
            two selections the first one's ratio counts; LoRA counts as if all weights were trained.
        steps: optimizer steps, for a ratio that changes with them.
        micro_batches: of an optimizer step.
        reference: one that scores each batch as it comes; a history is one, and known from `config`.
    """
    selector = config.selector
    everything = selector.weighting != "mask" or selector.retention > 0  # every token has a gradient
    looked_at = range(0, max(steps, 1), max(1, steps // SAMPLED)) if selector.schedule else [0]
    kept = 1.0 if everything else sum(selector.at(step).ratio for step in looked_at) / len(looked_at)
    # The losses of the whole step come before any gradient (`SelectiveTrainer._decide`).
    twice = not everything and not selector.static
    twice &= selector.second is not None or (selector.scope == "step" and micro_batches > 1)
    head = 1 + 2 * kept + twice
    if config.backend != "rho" and selector.selective:  # our losses first, then another library's of the kept rows
        head += kept
    weights = 1 + 2 * (kept if config.filtered_backward else 1.0) + twice
    if config.references.history is not None:  # the model itself, as it was
        reference = forward
    own = forward.weights * weights + forward.attention * (3 + twice) + forward.head * head
    return own + (reference.total if reference is not None and selector.columns else 0.0)
