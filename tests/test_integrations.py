"""One model and one stream of rows give the same losses and gradients in every framework, and none without scores."""

from __future__ import annotations

import copy
import importlib
import json
import os
import socket
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import integration_cases as cases
import rho
from rho.errors import ConfigError, MismatchError
from rho.forward import make_selective
from rho.integrations.by_labels import LabelLoss
from rho.mixin import SelectiveMixin
from rho.objective import clm_loss, excess_loss, next_labels, select_top, token_loss
from rho.selection import Selector

HERE = Path(__file__).parent
# Of TRL, peft and Lightning:
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]
NAMES = ("input_ids", "labels", "ref_loss")


class MixedTrainer(SelectiveMixin, Trainer):
    """Any trainer of a user."""


def example(name: str) -> ModuleType:
    """A file of examples/ as a module."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def torchtitan() -> ModuleType:
    """The integration, on torchtitan itself where it is installed, else on a stub of its protocol."""
    if find_spec("torchtitan") is None:
        sys.path.insert(0, str(HERE / "stubs"))
    return importlib.import_module("rho.integrations.torchtitan")


@pytest.fixture(scope="module")
def processor() -> PreTrainedTokenizerFast:
    """A tokenizer for TRL, which wants one to pad with."""
    known = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>")


def only(row: dict[str, list], names: tuple[str, ...]) -> dict[str, list]:
    return {name: row[name] for name in names}


def plain_loop(architecture: dict, rows: list[dict] | None = None, sizes: tuple[int, ...] = (4, 4)) -> cases.Trained:
    network, rows = cases.model(architecture), rows or cases.rows()
    before, starts = cases.weights(network), [sum(sizes[:n]) for n in range(len(sizes))]
    batches = [cases.batch(rows[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    optimizer = torch.optim.SGD(network.parameters(), lr=cases.RATE)
    losses = example("selective_loss").train(network, [batches] * cases.STEPS, cases.SELECTOR, optimizer)
    return cases.Trained(losses, cases.changes(before, network))


def mixin(architecture: dict, out: Path, rows: list[dict], **settings: Any) -> Any:
    return MixedTrainer(
        model=cases.model(architecture),
        args=TrainingArguments(**cases.arguments(out, 4, 2)),
        train_dataset=Dataset.from_list(rows),
        **{"data_collator": cases.batch, "selector": cases.SELECTOR, **settings},
    )


def compute_loss_func(architecture: dict, out: Path, rows: list[dict], selector: Selector = cases.SELECTOR) -> Trainer:
    trainer = Trainer(
        model=cases.model(architecture),
        args=TrainingArguments(**cases.arguments(out, 4, 2)),
        train_dataset=Dataset.from_list(rows),
        data_collator=cases.batch,
        compute_loss_func=LabelLoss(selector),
    )
    trainer.accelerator.gradient_accumulation_steps = 1  # as docs/integrations.md says
    return trainer


def trl(architecture: dict, out: Path, rows: list[dict], processor: Any, packing: bool, **settings: Any) -> Any:
    pytest.importorskip("trl")
    from trl import SFTConfig

    from rho.integrations.trl import SelectiveSFTTrainer

    config = {name: settings.pop(name) for name in list(settings) if name != "selector"}
    size = 2 if packing else 4  # packed rows hold two
    arguments = {**cases.arguments(out, size, 2), "bf16": False, "packing": packing, "max_length": 32, **config}
    return SelectiveSFTTrainer(
        model=cases.model(architecture),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        **{"selector": cases.SELECTOR, **settings},
    )


def by_torchtitan(titan: ModuleType, architecture: dict, rows: list[dict]) -> cases.Trained:
    """What its trainer does with a loss: one count of labels over the step, one call for each micro-batch."""
    network = cases.model(architecture)
    before, losses = cases.weights(network), []
    optimizer = torch.optim.SGD(network.parameters(), lr=cases.RATE)
    loss_fn = titan.SelectiveLoss.Config(ratio=cases.SELECTOR.ratio, seq_len=16).build()
    batches = [cases.batch(rows[:4]), cases.batch(rows[4:])]
    labels = [next_labels(batch["labels"]) for batch in batches]
    count = torch.stack([(label != -100).sum() for label in labels]).sum()
    for _ in range(cases.STEPS):
        parts = []
        for batch, label in zip(batches, labels, strict=True):
            loss, metrics = loss_fn(network(input_ids=batch["input_ids"]).logits, label, count)
            assert metrics == {}
            loss.backward()
            parts.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts))
    return cases.Trained(losses, cases.changes(before, network))


def by_lightning(architecture: dict, rows: list[dict]) -> cases.Trained:
    """Every row in each step: its batch is the whole step's."""
    lightning = pytest.importorskip("lightning")
    network, losses = cases.model(architecture), []
    before = cases.weights(network)
    sgd = partial(torch.optim.SGD, lr=cases.RATE)
    module = example("lightning_module").SelectiveModule(network, cases.SELECTOR, sgd)
    settings = {"accelerator": "cpu", "precision": "64-true", "max_epochs": cases.STEPS, "log_every_n_steps": 1}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(**settings, **dict.fromkeys(quiet, False))
    module.on_train_batch_end = lambda outputs, batch, index: losses.append(outputs["loss"].item())
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=cases.batch))
    return cases.Trained(losses, cases.changes(before, network))


@pytest.fixture(scope="module")
def expected(architecture: dict) -> cases.Trained:
    """By the equations alone: logits, Eq. 3, Eq. 5 by sorting, Eq. 4, one batch and autograd."""
    network = cases.model(architecture)

    def loss() -> torch.Tensor:
        kept = []
        for row in cases.rows():
            ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
            logits = network(input_ids=ids).logits[0]
            loss = {t: -logits[t - 1].log_softmax(-1)[labels[t]] for t in range(len(labels)) if labels[t] != -100}
            ranked = sorted(loss, key=lambda t: (float(row["ref_loss"][t] - loss[t].detach()), t))
            kept += [loss[t] for t in ranked[: round(0.6 * len(loss))]]
        return torch.stack(kept).mean()

    return cases.by_loss(network, loss)


def check_same(found: cases.Trained, expected: cases.Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.changes.keys() == expected.changes.keys()
    for name, change in expected.changes.items():
        assert (found.changes[name] - change).norm() < 1e-6 * change.norm(), name


# --- the same training everywhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (5, 1, 2)])
def test_the_plain_loop(architecture: dict, expected: cases.Trained, sizes: tuple[int, ...]) -> None:
    check_same(plain_loop(architecture, sizes=sizes), expected)


@pytest.mark.parametrize(
    "kind",
    [
        {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.01},
        {"model_type": "granite", "logits_scaling": 0.2},
        {"model_type": "phi"},
    ],
    ids=lambda kind: kind["model_type"],
)
def test_the_plain_loop_makes_the_logits_that_the_model_makes(architecture: dict, kind: dict) -> None:
    def trained(by: Any) -> list[float]:
        network = cases.model({**architecture, "tie_word_embeddings": False, **kind})
        if (bias := network.lm_head.bias) is not None:
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(network.parameters(), lr=cases.RATE)
        return by(network, [cases.batch(cases.rows())], optimizer)

    def ours(network: Any, batches: list, optimizer: Any) -> list[float]:
        return example("selective_loss").train(network, [batches], cases.SELECTOR, optimizer)

    def theirs(network: Any, batches: list, _: Any) -> list[float]:
        batch = batches[0]
        loss = token_loss(network(input_ids=batch["input_ids"]).logits, batch["labels"])
        eligible = (batch["labels"] != -100) & batch["ref_loss"].isfinite()
        chosen = select_top(excess_loss(loss, batch["ref_loss"]), eligible, cases.SELECTOR.ratio)
        return [loss[chosen].mean().item()]

    assert trained(ours) == pytest.approx(trained(theirs), rel=1e-6)


@pytest.mark.parametrize("transport", ["column", "labels"])
def test_the_mixin(architecture: dict, expected: cases.Trained, tmp_path: Path, transport: str) -> None:
    rows = [only(row, NAMES) if transport == "column" else cases.packed(row) for row in cases.rows()]
    check_same(cases.by_trainer(mixin(architecture, tmp_path, rows)), expected)


def test_compute_loss_func(architecture: dict, expected: cases.Trained, tmp_path: Path) -> None:
    trainer = compute_loss_func(architecture, tmp_path, [cases.packed(row) for row in cases.rows()])
    check_same(cases.by_trainer(trainer), expected)


@pytest.mark.parametrize("packing", [False, True, "wrapped"])
@pytest.mark.parametrize("transport", ["column", "labels", "completion_mask"])
def test_trl(
    architecture: dict, expected: cases.Trained, tmp_path: Path, processor: Any, packing: Any, transport: str
) -> None:
    names = {"column": NAMES, "completion_mask": ("input_ids", "completion_mask", "ref_loss")}
    rows = [only(row, names[transport]) if transport in names else cases.packed(row) for row in cases.rows()]
    settings: dict = {"completion_only_loss": True} if transport == "completion_mask" else {}
    if packing == "wrapped":
        # Rows are cut where they are full, so sequences are others: all that is tested is that it trains.
        trainer = trl(architecture, tmp_path, rows, processor, True, packing_strategy="wrapped", **settings)
        assert all(loss > 0 for loss in cases.by_trainer(trainer).losses)
        return
    check_same(cases.by_trainer(trl(architecture, tmp_path, rows, processor, packing, **settings)), expected)


@pytest.mark.parametrize(
    "selector",
    [
        Selector("excess", 0.55, "step"),
        Selector("excess", 0.5, retention=0.3),
        Selector("excess", 0.6, weighting="softmax"),
    ],
    ids=("step", "retention", "softmax"),
)
def test_packing_changes_no_other_selection_either(
    architecture: dict, tmp_path: Path, processor: Any, selector: Selector
) -> None:
    rows = [only(row, NAMES) for row in cases.rows()]
    one = cases.by_trainer(mixin(architecture, tmp_path, rows, selector=selector))
    check_same(cases.by_trainer(trl(architecture, tmp_path, rows, processor, True, selector=selector)), one)


def test_trl_trains_on_what_the_assistant_says_alone(architecture: dict, tmp_path: Path, processor: Any) -> None:
    rows = []
    for row in cases.rows():
        said = [int(t % 4 > 1) for t in range(len(row["input_ids"]))]
        rows.append({**only(row, ("input_ids", "ref_loss")), "assistant_masks": said})
    trainer = trl(architecture, tmp_path, rows, processor, True)
    seen = []
    trainer.model.register_forward_hook(lambda model, inputs, outputs: seen.append(outputs))
    cases.by_trainer(trainer)
    eligible = sum(int(outputs["eligible"].sum()) for outputs in seen[:2])
    assert eligible == sum(sum(row["assistant_masks"][1:]) for row in rows)
    assert all((outputs["selected"] <= outputs["eligible"]).all() for outputs in seen)


def test_lightning(architecture: dict, expected: cases.Trained) -> None:
    check_same(by_lightning(architecture, cases.rows()), expected)


def test_torchtitan(architecture: dict, expected: cases.Trained, torchtitan: ModuleType) -> None:
    check_same(by_torchtitan(torchtitan, architecture, [cases.packed(row) for row in cases.rows()]), expected)


@pytest.fixture(scope="module")
def fsdp2(architecture: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[cases.Trained, str]:
    """Two gloo processes with a half of the rows each; and what they say without scores."""
    out = tmp_path_factory.mktemp("fsdp2")
    job = {"architecture": architecture, "changes": str(out / "changes.safetensors"), "losses": str(out / "losses")}
    (out / "job.json").write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "integration_worker.py"), str(out / "job.json")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank}, stderr=-1, text=True)
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    found = json.loads(Path(job["losses"]).read_text())
    return cases.Trained(found["losses"], load_file(job["changes"])), found["refusal"]


def test_fsdp2_on_two_processes(fsdp2: tuple[cases.Trained, str], expected: cases.Trained) -> None:
    check_same(fsdp2[0], expected)


def test_a_resumed_mixin_goes_on_with_its_running_threshold(architecture: dict, tmp_path: Path) -> None:
    rows, selector = [only(row, NAMES) for row in cases.rows()], Selector("excess", 0.5, "running")

    def trained(steps: int, start: Path | None = None) -> Any:
        trainer = mixin(architecture, tmp_path, rows, selector=selector)
        trainer.args.max_steps, trainer.args.save_strategy, trainer.args.save_steps = steps, "steps", 2
        trainer.train(resume_from_checkpoint=start and str(start))
        return trainer

    whole = trained(4)
    cut = trained(4, tmp_path / "checkpoint-2")
    assert cut._threshold == whole._threshold and cut._threshold.value is not None
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lora_through_the_mixin_reaches_the_adapters_alone(architecture: dict, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(cases.model(architecture), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trainer = MixedTrainer(
        model=adapted,
        args=TrainingArguments(**cases.arguments(tmp_path, 4, 2)),
        train_dataset=Dataset.from_list([only(row, NAMES) for row in cases.rows()]),
        data_collator=cases.batch,
        selector=cases.SELECTOR,
    )
    changed = {name for name, change in cases.by_trainer(trainer).changes.items() if change.any()}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("way", ["mixin", "compute_loss_func", "plain_loop"])
@pytest.mark.parametrize("selector", [Selector(), Selector("loss", 0.6)], ids=("all", "loss"))
def test_labels_of_first_tokens_change_nothing(
    architecture: dict, tmp_path: Path, way: str, selector: Selector
) -> None:
    """Transformers' own collators leave them in: `labels` is a copy of `input_ids`."""

    def trained(rows: list[dict]) -> list[float]:
        if way == "mixin":
            trainer = mixin(architecture, tmp_path, rows, selector=selector)
            return [*cases.by_trainer(trainer).losses, trainer.evaluate(trainer.train_dataset)["eval_loss"]]
        network, batch = cases.model(architecture), cases.batch(rows)
        if way == "compute_loss_func":
            return [LabelLoss(selector)(network(input_ids=batch["input_ids"]), batch["labels"]).item()]
        hidden = network.base_model(batch["input_ids"]).last_hidden_state
        total = rho.count_selected(batch["labels"], None, selector)
        out = rho.selective_loss(hidden, network.lm_head.weight, batch["labels"], None, selector, num_selected=total)
        return [out.loss.item(), float(total)]

    rows = [only(row, NAMES[:2]) for row in cases.rows()]
    ordinary = [{**row, "labels": row["input_ids"][:1] + row["labels"][1:]} for row in rows]
    assert trained(ordinary) == trained(rows)


@pytest.mark.parametrize("way", ["mixin", "compute_loss_func"])
def test_a_micro_batch_without_any_label_is_one_without_loss(architecture: dict, tmp_path: Path, way: str) -> None:
    rows = [cases.packed(row) for row in cases.rows()]
    rows += [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    make = {"mixin": mixin, "compute_loss_func": compute_loss_func}[way]
    trainer = make(architecture, tmp_path, rows)
    trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = 1, 16
    found = cases.by_trainer(trainer)
    check_same(found, cases.by_trainer(make(architecture, tmp_path, rows[:8])))


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}, {}], ids=str)
def test_an_adapted_head_is_what_peft_makes_of_it_or_refused(architecture: dict, setting: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    network = cases.model({**architecture, "tie_word_embeddings": False})
    network.lm_head.bias = torch.nn.Parameter(torch.zeros(cases.VOCABULARY, dtype=torch.float64))
    adapted = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **setting))
    if setting:
        with pytest.raises(ConfigError, match=f"lora.{next(iter(setting))}: not with an adapted head"):
            make_selective(adapted, Selector())
        return
    torch.nn.init.normal_(network.lm_head.lora_B["default"].weight)  # as after some steps
    ids = torch.arange(5, 15)[None]
    ours = make_selective(adapted, Selector())(input_ids=ids, labels=ids, selective=True)
    theirs = adapted(input_ids=ids, labels=ids).loss  # in float32
    torch.testing.assert_close((ours["loss"] / ours["eligible"].sum()).float(), theirs)


def test_what_the_loss_would_pass_by_is_refused(architecture: dict) -> None:
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(ConfigError, match="PromptTuningConfig: the loss is made from the model that it adapts"):
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        make_selective(get_peft_model(cases.model(architecture), prompt), Selector())
    experts = {**architecture, "model_type": "mixtral", "num_local_experts": 2, "output_router_logits": True}
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef 0\.\d+: the experts' auxiliary loss"):
        make_selective(cases.model(experts).float(), Selector())
    make_selective(cases.model({**experts, "router_aux_loss_coef": 0.0}).float(), Selector())


# --- without scores ----------------------------------------------------------------------------------------------


def test_the_plain_loop_refuses_to_go_without_scores(architecture: dict) -> None:
    rows = [{**row, "ref_loss": None} for row in cases.rows()]
    batch = cases.batch([only(row, NAMES[:2]) for row in rows])
    hidden, weight = torch.zeros(8, 16, 16), torch.zeros(cases.VOCABULARY, 16)
    with pytest.raises(ValueError, match="needs the reference's ref_loss, found none"):
        rho.selective_loss(hidden, weight, batch["labels"], None, cases.SELECTOR)
    nothing = torch.full(batch["labels"].shape, torch.nan)
    with pytest.raises(ValueError, match="no token was selected: 80 have a label, 0 of them"):
        rho.selective_loss(hidden, weight, batch["labels"], nothing, cases.SELECTOR)


def test_the_mixin_refuses_to_train_without_scores(architecture: dict, tmp_path: Path) -> None:
    trainer = mixin(architecture, tmp_path, [only(row, NAMES[:2]) for row in cases.rows()])
    with pytest.raises(MismatchError, match=r"needs the reference's ref_loss, found none.*The training rows have"):
        trainer.train()


def test_columns_of_another_length_and_random_draws_without_numbers_are_refused(
    architecture: dict, tmp_path: Path
) -> None:
    rows = [only(row, NAMES) for row in cases.rows()]
    batch = cases.batch(rows)
    cut = {**batch, "ref_loss": batch["ref_loss"][:, 1:]}  # as the loss of logits[:-1] for labels[1:] has it
    with pytest.raises(MismatchError, match=r"expected a ref_loss for each label \(8, 16\).*found \(8, 15\)"):
        mixin(architecture, tmp_path, rows).eligible(cut)
    random = Selector("random", 0.6)
    with pytest.raises(ValueError, match="score 'random' needs the rows' numbers, a column `block`"):
        mixin(architecture, tmp_path, rows, selector=random).train()
    numbered = [{**row, "block": number} for number, row in enumerate(rows)]

    def collate(some: list[dict]) -> dict:
        return {**cases.batch(some), "block": torch.tensor([row["block"] for row in some])}

    mixin(architecture, tmp_path, numbered, selector=random, data_collator=collate).train()


def test_compute_loss_func_refuses_to_train_without_scores(architecture: dict, tmp_path: Path) -> None:
    trainer = compute_loss_func(architecture, tmp_path, [only(row, NAMES[:2]) for row in cases.rows()])
    with pytest.raises(ValueError, match="labels hold no score: these are plain token ids"):
        trainer.train()


@pytest.mark.parametrize("packing", [False, True])
def test_trl_refuses_to_train_without_scores(architecture: dict, tmp_path: Path, processor: Any, packing: bool) -> None:
    with pytest.raises(MismatchError, match="the training rows need input_ids and ref_loss"):
        trl(architecture, tmp_path, [only(row, ("input_ids",)) for row in cases.rows()], processor, packing)
    trainer = trl(architecture, tmp_path, [only(row, NAMES[:2]) for row in cases.rows()], processor, packing)
    with pytest.raises(MismatchError, match="needs the reference's ref_loss, found none"):
        trainer.train()


def test_lightning_refuses_to_train_without_scores(architecture: dict) -> None:
    with pytest.raises(ValueError, match="needs the reference's ref_loss, found none"):
        by_lightning(architecture, [only(row, NAMES[:2]) for row in cases.rows()])


def test_torchtitan_refuses_to_train_without_scores(architecture: dict, torchtitan: ModuleType) -> None:
    with pytest.raises(ValueError, match="labels hold no score"):
        by_torchtitan(torchtitan, architecture, [only(row, NAMES[:2]) for row in cases.rows()])


def test_fsdp2_refuses_to_train_without_scores(fsdp2: tuple[cases.Trained, str]) -> None:
    assert "needs the reference's ref_loss, found none" in fsdp2[1]


# --- what is said of the trainers' limits ------------------------------------------------------------------------


def test_a_count_of_labels_gives_eq_4_but_for_one_factor(architecture: dict, tmp_path: Path) -> None:
    rows = [{name: values[:9] for name, values in only(row, NAMES).items()} for row in cases.rows()]
    rows = [row for row in rows if len(row["input_ids"]) == 9]
    exact = cases.by_trainer(mixin(architecture, tmp_path, rows))
    found = cases.by_trainer(compute_loss_func(architecture, tmp_path, [cases.packed(row) for row in rows]))
    labels = [sum(label != -100 for label in row["labels"]) for row in rows]
    factor = sum(round(0.6 * n) for n in labels) / (0.6 * sum(labels))
    assert factor != 1.0 and found.losses[0] == pytest.approx(factor * exact.losses[0], rel=1e-9)


def test_a_padding_free_batch_ranks_each_sequence_by_itself(architecture: dict, tmp_path: Path) -> None:
    trainer = mixin(architecture, tmp_path, [only(row, NAMES) for row in cases.rows()])
    flat = {
        "labels": torch.tensor([[-100, 11, 12, -100, 21]]),
        "ref_loss": torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
    }
    rows = trainer._unpacked(flat)
    assert rows["labels"].tolist() == [[-100, 11, 12], [-100, 21, -100]]
    assert rows["ref_loss"][0].tolist() == [0.0, 1.0, 2.0] and rows["ref_loss"][1, 1] == 4.0
    assert rows["rows"].tolist() == [[0, 1, 2], [3, 4, 0]]


@pytest.mark.parametrize("labels", ["plain", "packed"])
def test_evaluation_counts_every_label_with_or_without_scores(architecture: dict, tmp_path: Path, labels: str) -> None:
    rows = [only(row, NAMES[:2]) if labels == "plain" else cases.packed(row) for row in cases.rows()]
    trainer = mixin(architecture, tmp_path, rows)
    trainer.args.per_device_eval_batch_size = 8
    batch = cases.batch([only(row, NAMES[:2]) for row in cases.rows()])
    logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
    mean = clm_loss(token_loss(logits, batch["labels"]).nan_to_num(), batch["labels"] != -100)
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert found == pytest.approx(float(mean.detach()), rel=1e-5)


@pytest.mark.parametrize("way", ["mixin", "trl", "compute_loss_func"])
def test_loss_weights_need_no_reference(architecture: dict, tmp_path: Path, processor: Any, way: str) -> None:
    draw = torch.Generator().manual_seed(1)
    rows, kept = [], []
    for row in cases.rows():
        weights = torch.randint(1, 4, (len(row["labels"]),), generator=draw) / 2
        rows.append({**only(row, NAMES[:2]), "loss_weights": weights.tolist()})
    network = cases.model(architecture)
    for row in rows:
        loss = token_loss(network(input_ids=torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]]))[0]
        kept += [w * v for w, v, label in zip(row["loss_weights"], loss, row["labels"], strict=True) if label != -100]
    selector = Selector(weighting="loss_weights")
    if way == "mixin":
        trainer = mixin(architecture, tmp_path, rows, selector=selector)
    elif way == "trl":
        trainer = trl(architecture, tmp_path, rows, processor, True, selector=selector)
    else:
        both = [{**row, "ref_loss": row["loss_weights"]} for row in rows]
        trainer = compute_loss_func(architecture, tmp_path, [cases.packed(row) for row in both], selector)
    assert cases.by_trainer(trainer).losses[0] == pytest.approx(float(torch.stack(kept).detach().mean()), rel=1e-6)


def test_weights_of_one_and_zero_are_a_mask(architecture: dict) -> None:
    batch = cases.batch([only(row, NAMES) for row in cases.rows()])
    network = cases.model(architecture)
    hidden = network.base_model(input_ids=batch["input_ids"]).last_hidden_state.detach().requires_grad_()
    weight, labels = network.lm_head.weight, batch["labels"]
    one = rho.selective_loss(hidden, weight, labels, batch["ref_loss"], cases.SELECTOR)
    mask = one.selected_BT.float()
    two = rho.selective_loss(hidden, weight, labels, None, Selector(weighting="loss_weights"), loss_weights_BT=mask)
    assert torch.equal(one.selected_BT, two.selected_BT) and one.num_selected == two.num_selected == 48
    for found in (one.loss, two.loss):
        found.backward()
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=0.0)


def test_other_losses_and_settings_are_refused(architecture: dict, tmp_path: Path, processor: Any) -> None:
    rows = [only(row, NAMES) for row in cases.rows()]
    with pytest.raises(ConfigError, match="compute_loss_func: the selection makes the loss"):
        mixin(architecture, tmp_path, rows, compute_loss_func=lambda *_, **__: None)
    with pytest.raises(ConfigError, match="scope dataset needs the cut"):
        mixin(architecture, tmp_path, rows, selector=Selector("ref_loss", 0.5, "dataset"))
    for selector in (Selector("excess", 0.5, "step"), Selector("random", 0.5)):
        with pytest.raises(ValueError, match=r"one selection of scope sequence or batch|block numbers"):
            LabelLoss(selector)
    with pytest.raises(ValueError, match="scope running needs the whole step or past ones"):
        LabelLoss(Selector("excess", 0.5, "running"))
    with pytest.raises(ConfigError, match="loss_type dft"):
        trl(architecture, tmp_path, rows, processor, False, loss_type="dft")
    two = Selector("ref_loss", 0.5, second=Selector("ref_entropy", 0.5))
    with pytest.raises(ConfigError, match="one column fits into the labels"):
        trl(architecture, tmp_path, rows, processor, False, selector=two)


def test_torchtitan_refuses_parts_of_sequences(torchtitan: ModuleType) -> None:
    loss_fn = torchtitan.SelectiveLoss.Config(ratio=0.6, seq_len=16).build()
    with pytest.raises(ValueError, match=r"expected logits \(B, 16, V\).*ChunkedLossWrapper"):
        loss_fn(torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64), torch.tensor(8))


def test_torchtitans_loader_gives_each_rank_its_blocks_and_goes_on(
    torchtitan: ModuleType, corpus: Path, scores: Path
) -> None:
    def loader(rank: int, **settings: Any) -> Any:
        config = torchtitan.SelectiveDataLoader.Config(corpus=str(corpus), scores=str(scores), **settings)
        return config.build(dp_world_size=2, dp_rank=rank, seq_len=16, local_batch_size=2, tokenizer=None)

    seen = set()
    for rank in (0, 1):
        batches = iter(loader(rank))
        some = [next(batches) for _ in range(3)]
        seen |= {tuple(row) for inputs, _ in some for row in inputs["input"].tolist()}
        plain, _ = rho.split_labels(some[0][1])
        inputs = some[0][0]["input"]
        here = plain[:, :-1] != -100
        assert here.any() and torch.equal(plain[:, :-1][here], inputs[:, 1:][here]) and (plain[:, -1] == -100).all()
    assert len(seen) == 12
    one, other = loader(0), loader(0)
    batches = iter(one)
    _, state = [next(batches) for _ in range(2)], one.state_dict()
    other.load_state_dict(state)
    assert torch.equal(next(iter(other))[1], next(batches)[1])
    with pytest.raises(MismatchError, match=r"blocks have 16 tokens, training.seq_len is 32"):
        config = torchtitan.SelectiveDataLoader.Config(corpus=str(corpus), scores=str(scores))
        config.build(dp_world_size=1, dp_rank=0, seq_len=32, local_batch_size=2, tokenizer=None)
    with pytest.raises(ConfigError, match="num_workers 2"):
        loader(0, num_workers=2)


def test_a_selective_model_is_for_everybody_else_what_it_was(architecture: dict) -> None:
    network = cases.model(architecture).eval()
    ids = torch.arange(5, 15)[None]
    before = network(input_ids=ids).logits
    make_selective(network, cases.SELECTOR)
    assert torch.equal(network(input_ids=ids).logits, before)


def test_a_copy_of_a_selective_model_passes_through_its_own_weights(architecture: dict) -> None:
    network = make_selective(cases.model(architecture).eval(), cases.SELECTOR)
    ids = torch.arange(5, 15)[None]
    twin, before = copy.deepcopy(network), network(input_ids=ids).logits
    with torch.no_grad():
        loss = twin(input_ids=ids, labels=ids, selective=True)["loss"]
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(twin(input_ids=ids).logits, before)
        assert torch.equal(twin(input_ids=ids, labels=ids, selective=True)["loss"], loss)


def test_a_selective_model_in_eval_mode_does_not_train_on_every_label(architecture: dict) -> None:
    network = make_selective(cases.model(architecture).eval(), cases.SELECTOR)
    ids, ref_loss = torch.arange(5, 16)[None], torch.zeros(1, 11)
    with pytest.raises(ConfigError, match=r"eval mode.*call model.train\(\)"):
        network(input_ids=ids, labels=ids, ref_loss=ref_loss, selective=True)
    with torch.no_grad():
        assert network(input_ids=ids, labels=ids, selective=True)["selected"].sum() == 10
    assert network.train()(input_ids=ids, labels=ids, ref_loss=ref_loss, selective=True)["selected"].sum() == 6
