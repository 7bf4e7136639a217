"""DPO on selected tokens: TRL's own training at ratio 1, the literal sums at any other, and nothing without rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import integration_cases as cases
from rho.errors import ConfigError, DataError, MismatchError
from rho.integrations.preference import REWARDS, answer_labels, check_pairs_selector, score_pairs, select_in_pairs
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX, token_loss
from rho.selection import Schedule, Selector

trl = pytest.importorskip("trl")
from rho.integrations.trl_dpo import SelectiveDPOTrainer, tokenised_pairs  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_disable|_enable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
HALF = Selector("excess", 0.5)
LENGTHS = ((3, 6, 4), (1, 3, 7), (5, 8, 2), (2, 4, 4))  # of prompt, chosen and rejected answer
NAN = float("nan")


@pytest.fixture(scope="module")
def processor() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, cases.VOCABULARY)}}
    known = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>")


def network(architecture: dict, seed: int = 0) -> Any:
    model = make_model(ModelConfig(architecture=architecture), cases.VOCABULARY)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # an untrained model says nearly the same of every token
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def pairs() -> list[dict[str, list]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for lengths in LENGTHS:
        prompt, chosen, rejected = (torch.randint(5, cases.VOCABULARY, (n,), generator=draw).tolist() for n in lengths)
        rewards = [torch.randn(n, generator=draw).tolist() for n in lengths[1:]]
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        found.append({**ids, **dict(zip(REWARDS, rewards, strict=True))})
    return found


def without(rows: list[dict], *names: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def trainer(architecture: dict, out: Path, processor: Any, rows: list[dict], **settings: Any) -> Any:
    """Over all pairs in each step, so that their order is of no matter; the reference is another model."""
    own = ("selector", "reference_free", "eval_dataset", "kind", "ref_model", "peft_config")
    others = {name: settings.pop(name) for name in list(settings) if name in own}
    kind = others.pop("kind", SelectiveDPOTrainer)
    if kind is SelectiveDPOTrainer:
        others.setdefault("selector", HALF)
    if not others.get("reference_free"):
        others.setdefault("ref_model", network(architecture, 1))
    arguments = {**cases.arguments(out, 4, 1), "bf16": False, "max_length": None, "beta": 0.5, **settings}
    return kind(
        model=network(architecture),
        args=trl.DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        **others,
    )


def check_same(found: cases.Trained, expected: cases.Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, change in expected.changes.items():
        assert change.norm() > 0, name
        assert (found.changes[name] - change).norm() < 1e-4 * change.norm(), name


# --- the loss ----------------------------------------------------------------------------------------------------


def text_rows() -> list[dict]:
    """The pairs as text: what TRL itself takes."""
    words = [
        {name: " ".join(f"w{n}" for n in row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
        for row in pairs()
    ]
    return [{name: f" {text}" if name != "prompt" else text for name, text in row.items()} for row in words]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
def test_at_ratio_one_it_is_trls_own_training(
    architecture: dict, tmp_path: Path, processor: Any, loss_type: str
) -> None:
    plain = cases.by_trainer(
        trainer(architecture, tmp_path, processor, text_rows(), kind=trl.DPOTrainer, loss_type=loss_type)
    )
    args = trl.DPOConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True)
    rows = tokenised_pairs(Dataset.from_list(text_rows()), processor, args)
    assert rows["chosen_ids"] == [[*row["chosen_ids"], 1] for row in pairs()]  # TRL ends answers
    ours = trainer(architecture, tmp_path, processor, rows.to_list(), selector=Selector(ratio=1.0), loss_type=loss_type)
    found = cases.by_trainer(ours)
    assert found.losses == pytest.approx(plain.losses, abs=1e-6)
    for name, change in plain.changes.items():
        torch.testing.assert_close(found.changes[name], change, rtol=0.0, atol=1e-6, msg=name)


def literal(architecture: dict, ratio: float, sepo: bool, beta: float = 0.5) -> cases.Trained:
    """Pair by pair and token by token, with sorting and autograd."""
    policy, reference = network(architecture).train(), network(architecture, 1)

    def log_probs(model: Any, prompt: list[int], answer: list[int]) -> list[Tensor]:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return [logits[len(prompt) + t - 1, token] for t, token in enumerate(answer)]

    def loss() -> Tensor:
        of_pairs = []
        for row in pairs():
            sides = []
            for side, best_first in (("chosen", True), ("rejected", False)):
                ids, rewards = row[f"{side}_ids"], row[f"{side}_rewards"]
                ranked = sorted(range(len(ids)), key=lambda t: (-rewards[t] if best_first else rewards[t], t))
                kept = ranked[: round(ratio * len(ids))]
                own = log_probs(policy, row["prompt_ids"], ids)
                with torch.no_grad():
                    theirs = log_probs(reference, row["prompt_ids"], ids)
                if sepo:
                    sides.append(sum(own[t] for t in kept) / len(kept))
                else:
                    sides.append(sum(own[t] - theirs[t] for t in kept))
            of_pairs.append(-torch.nn.functional.logsigmoid(beta * (sides[0] - sides[1])))
        return torch.stack(of_pairs).mean()

    return cases.by_loss(policy, loss)


@pytest.mark.parametrize("sepo", [False, True])
def test_selected_tokens_give_the_literal_loss_and_gradient(
    architecture: dict, tmp_path: Path, processor: Any, sepo: bool
) -> None:
    settings = {"reference_free": True, "loss_type": "sigmoid_norm"} if sepo else {}
    found = trainer(architecture, tmp_path, processor, pairs(), **settings)
    check_same(cases.by_trainer(found), literal(architecture, 0.5, sepo))
    [share] = {entry["ratio"] for entry in found.state.log_history if "ratio" in entry}
    tokens = [n for lengths in LENGTHS for n in lengths[1:]]
    assert share == pytest.approx(sum(round(0.5 * n) for n in tokens) / sum(tokens))


def test_micro_batches_of_pairs_are_the_same_training(architecture: dict, tmp_path: Path, processor: Any) -> None:
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = cases.by_trainer(trainer(architecture, tmp_path, processor, pairs(), **settings))
    expected = literal(architecture, 0.5, sepo=False)
    for name, change in expected.changes.items():
        assert (parts.changes[name] - change).norm() < 1e-4 * change.norm(), name


def test_without_a_reference_none_is_loaded(architecture: dict, tmp_path: Path, processor: Any) -> None:
    settings: dict[str, Any] = {"reference_free": True, "loss_type": "sigmoid_norm", "eval_dataset": None}
    found = trainer(architecture, tmp_path, processor, pairs(), **settings)
    assert not isinstance(found.ref_model, torch.nn.Module)
    assert "ref_chosen_logps" not in found.train_dataset.column_names
    found.train()
    # Also where TRL would refuse, because a reference is gone after training.
    [row] = pairs()[:1]
    report = found.evaluate(Dataset.from_list([row]))
    logp = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = IGNORE_INDEX
        logits = found.model.eval()(input_ids=ids).logits.detach()
        logp.append(-float(token_loss(logits, labels).nanmean()))
    expected = torch.nn.functional.softplus(torch.tensor(0.5 * (logp[1] - logp[0])))
    assert report["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("sepo", [False, True])
def test_adapters_alone_are_trained_also_without_a_reference(
    architecture: dict, tmp_path: Path, processor: Any, sepo: bool
) -> None:
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"reference_free": True, "loss_type": "sigmoid_norm"} if sepo else {"ref_model": None}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    found = trainer(architecture, tmp_path, processor, pairs(), peft_config=lora, **settings)
    changed = {name for name, change in cases.by_trainer(found).changes.items() if bool(change.any())}
    assert changed and all("lora_" in name for name in changed)


# --- what is selected --------------------------------------------------------------------------------------------


def test_a_hand_made_case() -> None:
    reward = torch.tensor([[9.0, 9.0, 0.1, 0.4, 0.3, 0.2], [-9.0, 0.5, -0.5, -0.4, 9.0, -9.0]])
    answer = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    labels = answer_labels(torch.arange(12).view(2, 6), answer)
    assert select_in_pairs(reward, labels, HALF).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]


def test_nothing_predicts_the_first_token_of_a_row() -> None:
    labels = answer_labels(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 1, 0]]))
    assert labels.tolist() == [[IGNORE_INDEX, 8, IGNORE_INDEX]]


def recorded(found: Any) -> list[tuple[dict, Tensor]]:
    """Each training batch as the collator made it, and the mask of what was selected of it."""
    seen: list = []
    compute = trl.DPOTrainer._compute_loss

    def spy(self: Any, model: Any, inputs: dict, return_outputs: bool) -> Any:
        seen.append((inputs, inputs["completion_mask"].bool()))
        return compute(self, model, inputs, return_outputs)

    found._compute_loss = spy.__get__(found)
    return seen


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(("mode", "limit"), [("keep_start", 7), ("keep_end", 7), ("keep_end", 4), ("keep_start", None)])
def test_rewards_stay_with_their_tokens_where_trl_cuts_and_pads(
    architecture: dict, tmp_path: Path, processor: Any, mode: str, limit: int | None
) -> None:
    rows = pairs()
    # Each token's reward is its id, so that what is selected can be read off the ids.
    for row in rows:
        row["chosen_rewards"], row["rejected_rewards"] = (
            [float(i) for i in row[n]] for n in ("chosen_ids", "rejected_ids")
        )
    settings = {"max_length": limit, "truncation_mode": mode, "pad_to_multiple_of": 8}
    found = trainer(architecture, tmp_path, processor, rows, **settings)
    seen = recorded(found)
    found.train()
    for inputs, selected in seen:
        assert "rewards" not in inputs and inputs["input_ids"].shape[1] % 8 == 0
        for n, (ids, mask, real) in enumerate(
            zip(inputs["input_ids"].tolist(), selected.tolist(), inputs["attention_mask"].tolist(), strict=True)
        ):
            side = "chosen_ids" if n < len(rows) else "rejected_ids"
            [(row, kept)] = [
                (row, whole)
                for row in rows
                for whole in [row["prompt_ids"] + row[side]]
                if (whole[:limit] if mode == "keep_start" or limit is None else whole[-limit:]) == ids[: sum(real)]
            ]
            cut = 0 if mode == "keep_start" or limit is None else max(0, len(kept) - limit)
            first = max(len(row["prompt_ids"]) - cut, 1 if cut else 0)
            answer = range(max(first, 1), sum(real))
            ranked = sorted(answer, key=lambda t: -ids[t] if side == "chosen_ids" else ids[t])
            wanted = set(ranked[: round(0.5 * len(answer))])
            assert {t for t, chosen in enumerate(mask) if chosen} == wanted


def test_tokens_without_a_reward_are_never_selected(architecture: dict, tmp_path: Path, processor: Any) -> None:
    rows = pairs()
    for row in rows:
        row["chosen_rewards"][1] = NAN
    found = trainer(architecture, tmp_path, processor, rows, selector=Selector("excess", 0.99))
    seen = recorded(found)
    found.train()
    unscored = {(tuple(row["prompt_ids"]), len(row["prompt_ids"]) + 1) for row in rows}
    for inputs, selected in seen:
        for ids, mask in zip(inputs["input_ids"][:4].tolist(), selected[:4].tolist(), strict=True):
            [place] = [place for prompt, place in unscored if tuple(ids[: len(prompt)]) == prompt]
            assert not mask[place] and any(mask)


def test_a_schedule_gives_each_step_its_ratio(architecture: dict, tmp_path: Path, processor: Any) -> None:
    selector = Selector("excess", schedule=Schedule(((0, 1.0), (1, 0.5))))
    found = trainer(architecture, tmp_path, processor, pairs(), selector=selector)
    seen = recorded(found)
    found.train()
    answers = sum(n for lengths in LENGTHS for n in lengths[1:])
    counts = [int(selected.sum()) for _, selected in seen]
    assert counts == [answers, sum(round(0.5 * n) for lengths in LENGTHS for n in lengths[1:])]


def test_evaluation_is_trls_own_with_or_without_rewards(architecture: dict, tmp_path: Path, processor: Any) -> None:
    plain = trainer(architecture, tmp_path, processor, text_rows(), kind=trl.DPOTrainer)
    expected = plain.evaluate(Dataset.from_list(text_rows()))
    args = trl.DPOConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True)
    rows = tokenised_pairs(Dataset.from_list(text_rows()), processor, args)
    scored = score_pairs(rows, network(architecture, 2), network(architecture, 1))
    for held_out in (rows, scored, Dataset.from_list(text_rows())):
        found = trainer(architecture, tmp_path, processor, pairs(), eval_dataset=held_out).evaluate()
        for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rewards_are_what_the_oracle_gained_on_each_token(architecture: dict, batch_size: int) -> None:
    oracle, before = network(architecture, 2), network(architecture, 1)
    scored = score_pairs(Dataset.from_list(without(pairs(), *REWARDS)), oracle, before, batch_size)
    for row in scored:
        for side in ("chosen", "rejected"):
            ids, prompt = row[f"{side}_ids"], row["prompt_ids"]
            for t, (token, reward) in enumerate(zip(ids, row[f"{side}_rewards"], strict=True)):
                logp = [
                    model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) + t - 1].log_softmax(-1)[token]
                    for model in (oracle, before)
                ]
                assert reward == pytest.approx(float((logp[0] - logp[1]).detach()), abs=1e-4)


def test_scoring_refuses_what_would_select_nothing_sensible(architecture: dict) -> None:
    model = network(architecture)
    rows = Dataset.from_list(without(pairs(), *REWARDS))
    with pytest.raises(MismatchError, match="reward 0: the oracle and the model before it are the same"):
        score_pairs(rows, model, network(architecture))
    with pytest.raises(MismatchError, match="chosen_ids not found among prompt_ids, rejected_ids"):
        score_pairs(rows.remove_columns("chosen_ids"), model, model)
    other = make_model(ModelConfig(architecture=architecture), 50)
    with pytest.raises(MismatchError, match="vocabulary has 300 entries, that of the model before it 50"):
        score_pairs(rows, model, other)


# --- nothing silently ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [("chosen_rewards",), ("rejected_rewards",), REWARDS, ("prompt_ids",)])
def test_it_refuses_to_train_without_scores(
    architecture: dict, tmp_path: Path, processor: Any, taken: tuple[str, ...]
) -> None:
    with pytest.raises(MismatchError, match=r"the training rows need prompt_ids, .*rejected_rewards; found"):
        trainer(architecture, tmp_path, processor, without(pairs(), *taken))
    with pytest.raises(MismatchError, match="tokenised_pairs and score_pairs"):
        trainer(architecture, tmp_path, processor, text_rows())


def test_rewards_that_get_lost_on_the_way_are_an_error(architecture: dict, tmp_path: Path, processor: Any) -> None:
    found = trainer(architecture, tmp_path, processor, pairs())
    found.train_dataset = found.train_dataset.remove_columns("rejected_rewards")
    with pytest.raises(MismatchError, match="the batch has no rewards"):
        found.train()


def test_rewards_of_other_tokens_are_an_error(architecture: dict, tmp_path: Path, processor: Any) -> None:
    rows = pairs()
    rows[2]["rejected_rewards"].append(0.0)
    with pytest.raises(
        MismatchError, match=r"a reward for each token, found tokens and rewards \[\(8, 8\), \(2, 3\)\]"
    ):
        trainer(architecture, tmp_path, processor, rows).train()


def test_an_answer_of_which_nothing_is_selected_is_an_error(architecture: dict, tmp_path: Path, processor: Any) -> None:
    with pytest.raises(DataError, match=r"ratio 0\.2 of 2 tokens with a reward selects none, in 1 of 8 answers"):
        trainer(architecture, tmp_path, processor, pairs(), selector=Selector("excess", 0.2)).train()


@pytest.mark.parametrize(
    "selector",
    [
        Selector("random", 0.5),
        Selector("ref_loss", 0.5),
        Selector("excess", 0.5, "step"),
        Selector(weighting="softmax"),
    ],
)
def test_other_selections_are_refused(selector: Selector) -> None:
    with pytest.raises(ConfigError, match="an answer's tokens by their rewards"):
        check_pairs_selector(selector)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"reference_free": True, "ref_model": object()}, "leave one of the two out"),
    ],
)
def test_settings_that_would_sum_other_tokens_are_refused(
    architecture: dict, tmp_path: Path, processor: Any, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(architecture, tmp_path, processor, pairs(), **settings)
