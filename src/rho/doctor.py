"""`rho doctor`: what works with the packages that are installed here, and what a model's loss is made by."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from rho.errors import RhoError

# Oldest and newest version that the tests were run with.
TESTED = {
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("5.3.0", "5.23.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "peft": ("0.21.2", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
    "lightning": ("2.6.6", "2.6.6"),
    "torchtitan": ("0.3.0", "0.3.0"),
}


class Finding(NamedTuple):
    """A line of the report.

    Attributes:
        what: the integration, or the part of the loss.
        package: what it needs; empty for none.
        works: whether it was found to work here.
        note: why not, or what there is to know.
    """

    what: str
    package: str
    works: bool
    note: str

    @property
    def installed(self) -> str:
        """The version, or a dash."""
        try:
            return version(self.package) if self.package else "-"
        except PackageNotFoundError:
            return "-"

    @property
    def tested(self) -> str:
        """The versions that the tests were run with."""
        oldest, newest = TESTED.get(self.package, ("-", "-"))
        return oldest if oldest == newest else f"{oldest} to {newest}"


def examine(model: str | None = None) -> list[Finding]:
    """All that can be said of this installation, and of a model.

    Args:
        model: folder, Hugging Face name, or file of a transformers config.
    """
    integrations = [
        ("plain PyTorch", "torch", loss_is_exact),
        ("FSDP2 and DDP", "torch", fsdp2),
        ("transformers: Trainer", "transformers", trainer_hooks),
        ("Accelerate", "accelerate", lambda: imported("accelerate")),
        ("Lightning", "lightning", lambda: imported("lightning")),
        ("LoRA", "peft", lambda: imported("peft")),
        ("TRL: SFTTrainer", "trl", trl_hooks),
        ("TRL: DPOTrainer", "trl", dpo_hooks),
        ("torchtitan: loss and data loader", "torchtitan", lambda: imported("rho.integrations.torchtitan")),
    ]
    found = [tried(what, package, probe) for what, package, probe in integrations]
    for backend, package in (("torch", "torch"), ("liger", "liger-kernel"), ("cce", "cut-cross-entropy")):
        found.append(tried(f"loss by backend {backend}", package, partial(backend_is_there, backend)))
    found.append(tried("accelerator", "", accelerator))
    found.append(tried("torch.compile", "torch", compiler))
    return found + (examine_model(model) if model else [])


def tried(what: str, package: str, probe: Callable[[], str]) -> Finding:
    """The finding of a probe, which returns a note, or raises what is wrong."""
    if package and Finding(what, package, False, "").installed == "-":
        return Finding(what, package, False, f"{package} is not installed")
    try:
        return Finding(what, package, True, probe())
    except RhoError as error:
        return Finding(what, package, False, str(error))
    except Exception as error:  # whatever a foreign package raises while it is imported is the answer
        return Finding(what, package, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def imported(module: str) -> str:
    """Nothing, if a module can be imported."""
    import_module(module)
    return ""


def loss_is_exact() -> str:
    """The loss and its gradient on this machine's device against the formula on all logits."""
    from rho.models import device
    from rho.objective import excess_loss, select_top, slm_loss, token_loss
    from rho.selection import Selector
    from rho.selective import selective_loss

    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=draw).to(device()).requires_grad_()
    weight = torch.randn(30, 8, generator=draw).to(device()).requires_grad_()
    labels = torch.randint(0, 30, (2, 9), generator=draw).to(device())
    labels[:, 0] = -100
    ref_loss = torch.rand(2, 9, generator=draw).to(device())
    fast = selective_loss(hidden, weight, labels, ref_loss, Selector("excess", 0.5)).loss
    loss = token_loss(hidden @ weight.T, labels)
    selected = select_top(excess_loss(loss.detach(), ref_loss), labels != -100, 0.5)
    slow = slm_loss(loss, selected, selected.sum())
    pairs = zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (fast, slow)), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    if not (abs(float(fast.detach() - slow.detach())) < 1e-4 and difference < 1e-4):
        raise RhoError(f"loss or gradient differ from the formula's (by {difference:.1e}). Please report this.")
    return f"agrees with the formula on {device()}"


def fsdp2() -> str:
    """Whether torch can shard."""
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    if not torch.distributed.is_available():
        raise RhoError("torch was built without torch.distributed")
    return "Accelerate and Trainer run DDP where FSDP2 is asked for on a CPU" if not torch.cuda.is_available() else ""


def trainer_hooks() -> str:
    """Whether `Trainer` has the methods that are overridden."""
    from transformers import Trainer

    from rho.durable import HOOKS

    if missing := [name for name in HOOKS if not hasattr(Trainer, name)]:
        raise RhoError(f"its Trainer has no {', '.join(missing)}. Install transformers 5.3 or later.")
    return ""


def trl_hooks() -> str:
    """Whether `SFTTrainer` prepares rows as it did when it was tested."""
    from trl import SFTTrainer

    imported("rho.integrations.trl")
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    if (found := list(inspect.signature(SFTTrainer._prepare_dataset).parameters)) != expected:
        raise RhoError(f"its SFTTrainer._prepare_dataset takes {', '.join(found)}. Install the tested version.")
    return ""


def dpo_hooks() -> str:
    """Whether `DPOTrainer` makes its loss from what it did when it was tested."""
    from trl import DPOTrainer

    imported("rho.integrations.trl_dpo")
    expected = {
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    }
    for name, arguments in expected.items():
        if (found := list(inspect.signature(getattr(DPOTrainer, name)).parameters)) != arguments:
            raise RhoError(f"its DPOTrainer.{name} takes {', '.join(found)}. Install the tested version.")
    return ""


def backend_is_there(name: str) -> str:
    """Whether another library's loss can be used."""
    from rho.backends import linear_loss

    linear_loss(name)  # type: ignore[arg-type]
    return "optional; the default is rho's own"


def accelerator() -> str:
    """The device that is used."""
    from rho.models import device

    if device().type == "cpu":
        raise RhoError("none: the CPU is used")
    return f"{device()}, {torch.accelerator.device_count()} of them"


def compiler() -> str:
    """Whether backbones can be compiled."""
    if not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")):
        raise RhoError("on a CPU it needs a C++ compiler, and there is none. Training works without.")
    return "of the backbone only, where torch_compile is asked for"


def examine_model(name: str) -> list[Finding]:
    """What a model's loss is made by, and what it is not fit for."""
    from rho.filtered import FilteredBackward
    from rho.models import ModelConfig, check_head, check_isolation, check_trainable, head, make_model

    try:
        model = make_model(ModelConfig.parse(name), vocab_size=1000)
    except RhoError as error:
        return [Finding(f"{name}: loading", "transformers", False, str(error))]

    def one_pass() -> str:
        check_trainable(model)
        check_head(model)
        return "selection, loss and gradients in one pass over the head, without all logits"

    def other_losses() -> str:
        own = head(model)
        has = {"a bias": own.bias_V is not None, "a scale": own.scale != 1.0, "a soft cap": own.cap is not None}
        if special := [what for what, there in has.items() if there]:
            raise RhoError(f"its head has {' and '.join(special)}, which only rho's own loss knows")
        return ""

    def isolation() -> str:
        check_isolation(model, True)
        return "documents in a block don't see each other"

    def filtered() -> str:
        FilteredBackward(model)
        return "an approximation; see docs/step.md"

    probes = [
        ("the loss's fast path", one_pass),
        ("other libraries' losses", other_losses),
        ("isolated documents, packing", isolation),
        ("filtered backward", filtered),
    ]
    return [tried(f"{name}: {what}", "", probe) for what, probe in probes]


def show(findings: list[Finding], console: Console | None = None) -> None:
    """The findings as a table."""
    table = Table("", "installed", "tested with", "works", "", title="rho doctor", title_justify="left")
    for finding in findings:
        works = "[green]yes[/]" if finding.works else "[yellow]no[/]"
        table.add_row(finding.what, finding.installed, finding.tested, works, finding.note.replace("[", r"\["))
    (console or Console()).print(table)
