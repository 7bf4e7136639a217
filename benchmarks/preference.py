"""Preference training on pairs whose key tokens are known: does selection pick them, and does it help?

    python benchmarks/preference.py [--seeds 0 1 2]      a quarter of an hour on one slow core

Every word is a token. A prompt names things; an answer says of each what it is, between words that say nothing and are
drawn alike for every answer. Key are the tokens that say what a thing is: the right value in the chosen answer, a
common error in the rejected. For each seed, all of it drawn anew:

    base     a small model trained on answers, of which as many say the error of a thing as the right value
    oracle   a smaller one, trained on such answers and then, briefly, with plain DPO on pairs of its own
    arms     the base model trained on other pairs: `dpo` on all tokens; `selected`, DPO on the oracle's tokens; `sepo`,
             the reference-free loss on the same tokens; `random`, DPO on as many tokens drawn at random; `key`, DPO on
             the tokens that are known to be key

The measure is one for all arms: the share of held-out pairs of whose two answers the chosen one has gained more
log-probability over the base model, all tokens counted. Every arm has the learning rate of `RATES` that gave it the
highest mean of this over the training with another seed (`TUNING`), which is in no result; so were the oracle's
settings and the ratio found.

Appends a line for each seed to benchmarks/results/preference.jsonl; seeds that are there are left alone. `python
benchmarks/write_results.py` makes docs/results.md of it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig

from rho.integrations.preference import REWARDS, answer_labels, positions, score_pairs, select_in_pairs
from rho.integrations.trl_dpo import SelectiveDPOTrainer
from rho.models import ModelConfig, make_model
from rho.objective import token_loss
from rho.references.model import score_batch
from rho.runs import environment
from rho.selection import Selector

RESULT = Path(__file__).parent / "results" / "preference.jsonl"
THINGS, VALUES, FILLERS, FACTS = 24, 12, 150, 3  # words of each kind, and things in a prompt
BETWEEN = (10, 18)  # words that say nothing before each fact
SAID = 0.4  # how often the base model's text says the right value of a thing, and how often its error
SELECTOR = Selector("excess", ratio=0.06)
BETA, GAMMA = 0.1, 2.0  # of DPO; of SePO's loss
STEPS, PAIRS, EVERY = 40, 2, 2  # of an arm; pairs a step
ORACLE = {"steps": 60, "pairs": 16, "rate": 3e-4, "beta": 0.5}
RATES = (1e-4, 1e-3)
HELD_OUT = 200
TUNING = 100  # a seed
SIDES = ("chosen", "rejected")
ARMS = ("dpo", "selected", "sepo", "random", "key")
KINDS = {"thing": THINGS, "value": VALUES, "word": FILLERS}
ID = {name: n for n, name in enumerate(["<pad>", "<eos>", ":", *(f"{k}{n}" for k in KINDS for n in range(KINDS[k]))])}


class World:
    """What is right, what is a common error, and text of both, by one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.right = [self.draw.randrange(VALUES) for _ in range(THINGS)]
        self.error = [(value + self.draw.randrange(1, VALUES)) % VALUES for value in self.right]

    def prompt(self) -> tuple[list[int], list[int]]:
        """Things, and the tokens that ask for them."""
        things = self.draw.sample(range(THINGS), FACTS)
        return things, [*(ID[f"thing{thing}"] for thing in things), ID[":"]]

    def answer(self, things: list[int], values: list[int]) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are key."""
        ids: list[int] = []
        key: list[bool] = []
        for thing, value in zip(things, values, strict=True):
            fill = [ID[f"word{self.draw.randrange(FILLERS)}"] for _ in range(self.draw.randint(*BETWEEN))]
            ids += [*fill, ID[f"thing{thing}"], ID[f"value{value}"]]
            key += [*[False] * (len(fill) + 1), True]
        return [*ids, ID["<eos>"]], [*key, False]

    def pairs(self, number: int) -> Dataset:
        """Tokenised pairs, and of each answer which tokens are key."""
        found = []
        for _ in range(number):
            things, prompt = self.prompt()
            pair: dict[str, list] = {"prompt_ids": prompt}
            for side, values in (("chosen", self.right), ("rejected", self.error)):
                pair[f"{side}_ids"], pair[f"{side}_key"] = self.answer(things, [values[t] for t in things])
            found.append(pair)
        return Dataset.from_list(found)

    def text(self) -> list[int]:
        """A prompt and an answer that is right as often as it makes the common error."""
        things, prompt = self.prompt()
        kinds = self.draw.choices(("right", "error", "any"), (SAID, SAID, 1 - 2 * SAID), k=FACTS)
        values = {"right": self.right, "error": self.error}
        said = [
            values[k][t] if k in values else self.draw.randrange(VALUES) for k, t in zip(kinds, things, strict=True)
        ]
        return prompt + self.answer(things, said)[0]


def pretrained(world: World, width: int, steps: int, seed: int) -> PreTrainedModel:
    """A one-layer model trained on the world's text."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1, "num_attention_heads": 4}
    architecture = {"model_type": "llama", **sizes, "num_key_value_heads": 4, "max_position_embeddings": 128}
    model = make_model(ModelConfig(architecture=architecture), len(ID), seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        ids = pad_sequence([torch.tensor(world.text()) for _ in range(16)], batch_first=True)
        labels = answer_labels(ids, ids != ID["<pad>"])
        token_loss(model(input_ids=ids).logits, labels).nanmean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def margins(model: PreTrainedModel, pairs: Dataset) -> Tensor:
    """Log-probability of each chosen answer less that of the rejected, nats."""
    found = []
    for rows in pairs.iter(50):
        texts = [p + a for side in SIDES for p, a in zip(rows["prompt_ids"], rows[f"{side}_ids"], strict=True)]
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        loss, _ = score_batch(model, {"input_ids": ids, "position_ids": positions(ids)})
        of_answer = (ids != ID["<pad>"]) & (positions(ids) > FACTS)
        chosen, rejected = loss.masked_fill(~of_answer, 0.0).sum(-1).chunk(2)
        found.append(rejected - chosen)
    return torch.cat(found)


class Accuracy(TrainerCallback):
    """Follows the measure over a training."""

    def __init__(self, base: PreTrainedModel, held_out: Dataset) -> None:
        self.held_out, self.before = held_out, margins(base, held_out)
        self.found: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After every few steps."""
        if state.global_step % EVERY == 0:
            model.eval()
            self.found[state.global_step] = (margins(model, self.held_out) > self.before).double().mean().item()
            model.train()


def trained(base: PreTrainedModel, rows: Dataset, settings: dict[str, Any], **others: Any) -> PreTrainedModel:
    """A copy of the model, trained on the pairs; its reference is the model itself."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<pad>"))
    model = deepcopy(base)
    common = {"max_length": None, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    common |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as out:
        SelectiveDPOTrainer(
            model,
            None if others.get("reference_free") else deepcopy(base),
            args=DPOConfig(out, **common, **settings),
            train_dataset=rows,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
            **others,
        ).train()
    return model.eval()


def arm(name: str, base: PreTrainedModel, rows: Dataset, held_out: Dataset, rate: float, seed: int) -> dict[int, float]:
    """The measure after every few steps of an arm."""
    if name == "random":
        draw = random.Random(seed)
        rows = rows.map(lambda row: {rewards: [draw.random() for _ in row[rewards]] for rewards in REWARDS})
    if name == "key":
        signs = zip(REWARDS, SIDES, (1.0, -1.0), strict=True)
        columns = {rewards: (side, sign) for rewards, side, sign in signs}
        rows = rows.map(lambda row: {r: [sign * key for key in row[f"{s}_key"]] for r, (s, sign) in columns.items()})
    follow = Accuracy(base, held_out)
    settings = {"per_device_train_batch_size": PAIRS, "max_steps": STEPS, "learning_rate": rate, "seed": seed}
    settings |= {"lr_scheduler_type": "constant", "beta": BETA}
    if name == "sepo":
        settings |= {"beta": GAMMA, "loss_type": "sigmoid_norm"}
    selector = Selector() if name == "dpo" else SELECTOR
    trained(base, rows, settings, selector=selector, reference_free=name == "sepo", callbacks=[follow])
    return follow.found


def precision_and_recall(rows: Dataset) -> dict[str, list[float]]:
    """By side: the share of the selected tokens that are key, and the share of the key tokens that are selected."""
    hits, picked, key = (dict.fromkeys(SIDES, 0) for _ in range(3))
    for row in rows:
        rewards = pad_sequence([torch.tensor(row[name]) for name in REWARDS], True, torch.nan)
        masks = select_in_pairs(rewards, torch.zeros_like(rewards).long(), SELECTOR)
        for side, mask in zip(SIDES, masks, strict=True):
            true = torch.tensor(row[f"{side}_key"])
            hits[side] += int((mask[: len(true)] & true).sum())
            picked[side] += int(mask.sum())
            key[side] += int(true.sum())
    return {side: [hits[side] / picked[side], hits[side] / key[side]] for side in SIDES}


def run(seed: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Base, oracle and every arm at some learning rates, in the world of one seed."""
    world = World(seed)
    base, before = pretrained(world, 64, 500, seed), pretrained(world, 32, 400, seed)
    settings = {"per_device_train_batch_size": ORACLE["pairs"], "max_steps": ORACLE["steps"], "beta": ORACLE["beta"]}
    settings |= {"learning_rate": ORACLE["rate"], "seed": seed}
    oracle = trained(before, world.pairs(ORACLE["steps"] * ORACLE["pairs"]), settings, selector=Selector())
    rows = score_pairs(world.pairs(STEPS * PAIRS), oracle, before)
    held_out = world.pairs(HELD_OUT)
    arms = {name: {rate: arm(name, base, rows, held_out, rate, seed) for rate in rates[name]} for name in rates}
    oracle_accuracy = (margins(oracle, held_out) > margins(before, held_out)).double().mean().item()
    print(seed, precision_and_recall(rows), arms, flush=True)
    return {"selection": precision_and_recall(rows), "oracle_accuracy": oracle_accuracy, "arms": arms}


def main() -> None:
    """Find each arm's learning rate, if that was not done, and run what is left to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.is_file() else []
    of_seed = {line["seed"]: line for line in done}
    for seed in (TUNING, *arguments.seeds):
        if seed in of_seed:
            continue
        rates = {name: list(RATES) for name in ARMS} if seed == TUNING else of_seed[TUNING]["best"]
        found = {"seed": seed, **run(seed, rates), "environment": environment()}
        if seed == TUNING:
            # The mean over training: what counts is the accuracy at every number of updates.
            found["best"] = {
                name: [max(of_rate, key=lambda rate: mean(of_rate[rate].values()))]
                for name, of_rate in found["arms"].items()
            }
            shape = {"things": THINGS, "values": VALUES, "fillers": FILLERS, "facts": FACTS, "between": BETWEEN}
            found["settings"] = {**shape, "ratio": SELECTOR.ratio, "beta": BETA, "gamma": GAMMA, "steps": STEPS}
            found["settings"] |= {"pairs": PAIRS, "held_out": HELD_OUT, "oracle": ORACLE, "rates": RATES}
        of_seed[seed] = found
        with arguments.out.open("a") as file:
            file.write(json.dumps(found, sort_keys=True) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
