"""Two stores as one score: the rules of others that need no code of their own (docs/selection.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX, token_loss
from rho.score import ScoreConfig, score_corpus
from rho.selection import Selector
from rho.store import ScoreStore
from rho.train import TrainConfig, train

CONTEXT, OVERLAP = 6, 2


@pytest.fixture
def short_and_full(corpus: Path, reference: Path, tmp_path: Path) -> dict[str, ScoreStore]:
    """The losses of one model, with its context cut and with all of it."""
    for name, window in (("short", {"context": CONTEXT, "overlap": OVERLAP}), ("full", {})):
        config = ScoreConfig(dtype="float32", **window)
        score_corpus(config, Corpus(corpus), ModelConfig(path=str(reference)), tmp_path / name)
    return {name: ScoreStore(tmp_path / name) for name in ("short", "full")}


def test_the_weights_of_longce_are_the_losses_a_short_context_adds(
    corpus: Path, reference: Path, short_and_full: dict[str, ScoreStore]
) -> None:
    data = TrainingBlocks(Corpus(corpus), short_and_full, "weights", {"short": -1.0, "full": 1.0})
    batch = collate([data[block] for block in range(4)])
    selector = Selector("ref_loss", weighting="exponential", clip=1.5)
    eligible = selector.eligible(batch["labels"], batch)
    score = selector.scores(None, batch, None, batch["labels"].shape[1], 0)
    found = selector.soft_weights(score, eligible)

    model = make_model(ModelConfig(path=str(reference)), Corpus(corpus).vocab_size).eval()
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        full = token_loss(model(input_ids=ids).logits, labels)
        short = full.clone()  # of the first window
        done = CONTEXT
        while done < ids.shape[1]:
            start, stop = done - OVERLAP, min(done - OVERLAP + CONTEXT, ids.shape[1])
            window = token_loss(model(input_ids=ids[:, start:stop]).logits, labels[:, start:stop])
            short[:, done:stop] = window[:, OVERLAP:]
            done = stop
    weight = (short - full).exp().clamp(max=1.5).masked_fill(labels == IGNORE_INDEX, 0.0)
    assert (weight == 1.5).any() and (weight[labels != IGNORE_INDEX] < 1.0).any()
    expected = weight * (labels != IGNORE_INDEX).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_training_by_longce_needs_no_selection_option_of_its_own(
    corpus: Path, reference: Path, short_and_full: dict[str, ScoreStore], tmp_path: Path
) -> None:
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    config = TrainConfig(
        score="ref_loss",
        weighting="exponential",
        clip=5.0,
        references={"combine": "weights", "weights": {"short": -1.0, "full": 1.0}},
        arguments=arguments,
    )
    start = ModelConfig(path=str(reference))
    train(config, Corpus(corpus), start, tmp_path / "out", short_and_full)
    train(TrainConfig(arguments=arguments), Corpus(corpus), start, tmp_path / "plain")
    steps = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    assert [step["selected"] == step["eligible"] > 0 for step in steps] == [True, True]  # weighs, leaves none out
    weighted, plain = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert weighted != plain


def test_the_gain_of_the_reference_over_the_base_model_is_ranked_over_the_data_set(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    make_model(ModelConfig(architecture=architecture), Corpus(corpus).vocab_size).save_pretrained(tmp_path / "base")
    base = ModelConfig(path=str(tmp_path / "base"))
    score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), base, tmp_path / "scores")
    stores = {"base": ScoreStore(tmp_path / "scores"), "reference": ScoreStore(scores)}
    data = TrainingBlocks(Corpus(corpus), stores, "weights", {"base": -1.0, "reference": 1.0})
    selector = Selector("ref_loss", 0.4, "dataset")
    cut = data.cut(selector)
    gains, kept = [], []
    for block in range(len(data)):
        row = {name: value[None] for name, value in data[block].items()}
        gain = torch.tensor(stores["base"].row(block, ("ref_loss",))["ref_loss"])
        gain = gain - torch.tensor(stores["reference"].row(block, ("ref_loss",))["ref_loss"])
        eligible = selector.eligible(row["labels"], row)
        mask = cut.mask(selector.scores(None, row, None, len(gain), 0), eligible, row["block"])
        gains.append(gain[eligible[0]])
        kept.append(mask[0][eligible[0]])
    gain, mask = torch.cat(gains), torch.cat(kept)
    assert int(mask.sum()) == round(0.4 * len(gain))
    assert gain[mask].min() >= gain[~mask].max()
