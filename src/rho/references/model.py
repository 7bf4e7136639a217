"""A reference that is a Transformers model on this machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rho.corpus import Corpus
from rho.errors import ConfigError, MismatchError
from rho.linear_loss import linear_token_loss
from rho.models import (
    ModelConfig,
    Precision,
    check_head,
    check_isolation,
    device,
    head,
    hidden_states,
    make_model,
    model_folder,
    model_name,
    text_config,
)
from rho.objective import predictors, token_labels
from rho.references.scorer import Batch, MeanLoss, Scorer, mean_of
from rho.tokenizer import Tokenizer


def load_reference(
    reference: ModelConfig,
    corpus: Corpus,
    precision: Precision = "float32",
    context: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreTrainedModel:
    """The reference in eval mode, frozen, checked against what it is to read.

    Args:
        reference: where it is.
        corpus: what it scores.
        precision: of its weights and its forward.
        context: tokens that it is given at once; a whole block, if not given.
        tokenizer: its own, where it doesn't read the corpus's tokens.

    Raises:
        MismatchError: another tokenizer, too few embeddings or positions, or a kind of model that can't be scored with.
    """
    model = make_model(reference, (tokenizer or corpus).vocab_size, precision=precision)
    check_tokenizer(reference, corpus, tokenizer)
    corpus.check_model(text_config(model), model_name(reference), context, tokenizer)
    check_head(model)
    check_isolation(model, corpus.isolated)
    return model.to(device()).eval().requires_grad_(False)


def check_tokenizer(model: ModelConfig, corpus: Corpus, tokenizer: Tokenizer | None = None) -> None:
    """Refuse a model that comes with another tokenizer than the corpus's, or than it is said to have, naming both."""
    if model.path is None:
        return
    folder = Path(model_folder(model.path))
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        return  # comes without a tokenizer (the library would make one up): the vocabulary check is all there is
    expected = tokenizer or corpus.tokenizer
    try:
        own = Tokenizer.load(folder if folder.is_dir() else model.path, expected.eos)
    except ConfigError as error:
        if not folder.is_dir():
            return  # a name whose tokenizer is not to be had here
        found = f"does not know the end token {expected.eos} ({str(error).rstrip('.')})"
    else:
        if own.fingerprint == expected.fingerprint:
            return
        found = f"comes with {own.fingerprint[:12]} (vocabulary {own.vocab_size})"
    if tokenizer is None:
        what = f"{corpus.folder} was made with"
        advice = (
            f"Build the corpus with --tokenizer {model.path}, take another model, or (a reference only) have its "
            f"losses mapped onto the corpus's tokens with --reference-tokenizer {model.path} (the reference's "
            "tokenizer in a config)."
        )
    else:
        what = "the reference is said to read"
        advice = f"Give --reference-tokenizer {model.path} (the reference's tokenizer in a config)."
    raise MismatchError(
        f"the tokenizers differ: {what} {expected.fingerprint[:12]} (vocabulary {expected.vocab_size}), {model.path} "
        f"{found}. {advice}"
    )


@torch.no_grad()
def score_batch(model: PreTrainedModel, batch: dict[str, Tensor], entropy: bool = False) -> tuple[Tensor, Tensor]:
    """loss_BT (Eq. 1) and entropy_BT (Eq. 8; NaN unless asked for), nats, NaN where a token has no score.

    Every token is scored that has a predecessor in its window, special tokens too. The head's logits exist only for
    a chunk of rows at a time.
    """
    where = next(model.parameters()).device
    input_ids, position_ids = batch["input_ids"].to(where), batch["position_ids"].to(where)
    labels = token_labels(input_ids, position_ids)
    hidden = predictors(hidden_states(model, input_ids, position_ids)).flatten(0, 1)
    loss, entropies = linear_token_loss(hidden, head(model), labels.flatten(), entropy=entropy)
    if entropies is None:
        entropies = torch.full_like(loss, torch.nan)
    return loss.view_as(labels), entropies.view_as(labels)


def online_scorer(reference: ModelConfig, corpus: Corpus, entropy: bool) -> Scorer:
    """A reference that scores the batches of a training where they are, in bfloat16 on an accelerator."""
    model = load_reference(reference, corpus, "float32" if device().type == "cpu" else "bfloat16")

    def scorer(batch: Batch) -> dict[str, Tensor]:
        loss_BT, entropy_BT = score_batch(model, batch, entropy)
        return {"ref_loss": loss_BT, "ref_entropy": entropy_BT} if entropy else {"ref_loss": loss_BT}

    return scorer


def mean_loss(model: PreTrainedModel, corpus: Corpus, batch_size: int = 8) -> MeanLoss:
    """The model's loss on all labelled tokens of one split of a corpus."""
    was_training = model.training
    model.eval()
    found = mean_of(lambda batch: {"ref_loss": score_batch(model, batch)[0].cpu()}, corpus, batch_size)
    model.train(was_training)
    return found
