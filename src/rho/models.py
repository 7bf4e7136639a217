"""Hugging Face causal language models: made or loaded, fingerprinted, and taken apart into backbone and head."""

from __future__ import annotations

import json
import os
import shutil
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from rho.errors import ConfigError, MismatchError, check_path_or_name, unless_here
from rho.linear_loss import Head
from rho.runs import MANIFEST, hash_file, hash_json

disable_progress_bar()  # of loading and saving: seconds, beside the stages' own bars


class ModelConfig(BaseModel):
    """A causal language model: either loaded, or new with random weights.

    Attributes:
        path: a folder of rho or Transformers, or a Hugging Face name; NAME@REVISION gives both.
        architecture: settings of a `transformers` config, `model_type` among them; the vocabulary is the corpus's.
        revision: of a Hugging Face name.
        trust_remote_code: run code that comes with the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    architecture: dict[str, Any] | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, text: str) -> ModelConfig:
        """From the command line: a YAML or JSON file of a transformers config, else a path or name."""
        suffix = Path(text).suffix
        if suffix not in (".yaml", ".yml", ".json"):
            if Path(text).is_file():
                raise ConfigError(
                    f"{text}: expected a config in a file ending in .yaml, .yml or .json, found '{suffix}'."
                )
            return cls(path=text)
        try:
            return cls(architecture=yaml.safe_load(Path(text).read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{text}: not a model config ({error}).") from error

    @model_validator(mode="before")
    @classmethod
    def _revision_in_the_name(cls, tree: Any) -> Any:
        path = tree.get("path") if isinstance(tree, dict) else None
        if isinstance(path, str) and "@" in path and tree.get("revision") is None and not Path(path).exists():
            name, _, revision = path.rpartition("@")
            return {**tree, "path": name, "revision": revision}
        return tree

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either 'path' (a model to load) or 'architecture' (a new one), not both")
        return self


# What a config calls the soft cap of its logits. A capped head looks like a plain one as long as its logits are small.
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
Precision = Literal["float32", "bfloat16"]


def make_model(
    config: ModelConfig, vocab_size: int, seed: int = 0, precision: Precision = "float32"
) -> PreTrainedModel:
    """The model of `config`, in float32 unless asked otherwise; new weights are drawn with `seed`."""
    dtype = getattr(torch, precision)
    if config.architecture is not None:
        set_seed(seed)
        return _new_model({"vocab_size": vocab_size, **config.architecture}, dtype)
    path = str(config.path)
    check_path_or_name(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_folder(path),
            dtype=dtype,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.path}: no model could be loaded from here ({str(error).splitlines()[0]}).{unless_here(path)}"
        ) from error


def skeleton(config: ModelConfig, vocab_size: int | None = None) -> PreTrainedModel:
    """The model of `config` without its weights (on the meta device): shapes that can be counted, of any size.

    Args:
        config: of a new model, a folder, or a name on the Hub, of which only the config is read.
        vocab_size: of a new model whose settings don't say it.

    Raises:
        ConfigError: the config can't be read, or no model be made of it.
    """
    with torch.device("meta"):
        if config.architecture is not None:
            return _new_model({"vocab_size": vocab_size, **config.architecture}, torch.float32)
        check_path_or_name(str(config.path))
        try:
            revision, trusted = config.revision or "main", config.trust_remote_code
            path = model_folder(str(config.path))
            found = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted)
            return AutoModelForCausalLM.from_config(found, trust_remote_code=trusted)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"{config.path}: its config can't be read ({reason}). Check the path or name, or give the model's "
                "config as a YAML or JSON file (--model)."
            ) from error


def _new_model(settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        near = ", ".join(get_close_matches(str(kind), CONFIG_MAPPING_NAMES)) or "llama, qwen3, gpt2 ..."
        raise ConfigError(
            f"model.architecture.model_type: expected one that transformers knows ({near}), found {kind!r}."
        )
    try:
        defaults, config = AutoConfig.for_model(kind), AutoConfig.for_model(kind, **settings)
        known = {*defaults.to_dict(), *defaults.attribute_map}
        ignored = (settings.keys() & config.to_dict().keys()) - known  # transformers keeps any name, whatever it is
        if not ignored:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # each model checks its settings in its own way, or divides by them
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(f"model.architecture: no {kind} can be made with these settings ({reason}).") from error
    strange = min(ignored)
    near = ", ".join(get_close_matches(strange, known)) or ", ".join(sorted(known))
    raise ConfigError(f"model.architecture.{strange}: no setting of a {kind} config. Expected one of {near}.")


def ends_documents(model: PreTrainedModel, eos_id: int) -> None:
    """Tell a new model which token ends a document, and so begins the next: its config's default is another's."""
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = eos_id


def model_folder(path: str) -> str:
    """Where the Transformers files are: a stage folder of rho holds them in `model/`."""
    inner = Path(path) / "model"
    return str(inner) if (Path(path) / MANIFEST).is_file() and inner.is_dir() else path


def source_hash(config: ModelConfig, seed: int = 0) -> str:
    """Content hash of what `make_model` makes: of the weight files, or of the architecture and seed."""
    if config.path is None:
        return hash_json([config.architecture, seed])
    folder = Path(model_folder(config.path))
    if not folder.is_dir():
        return hash_json([config.path, config.revision])
    weights = [*folder.glob("*.safetensors"), *folder.glob("*model*.bin")]
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if not weights or not configs:
        raise ConfigError(f"{folder}: not a model folder: expected config.json and weights (*.safetensors).")
    found = [(file.name, hash_file(file)) for file in sorted([*weights, *configs])]
    if (adapter := folder / "adapter_config.json").is_file():  # the weights that it adapts are elsewhere
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
        found.append(("base", source_hash(ModelConfig(path=base)) if base else ""))
    return hash_json(found)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def hidden_states(
    model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor | None, **others: Any
) -> Tensor:
    """hidden_BTD, the head's input; row t is what the head predicts token t+1 from.

    No cache and, unless it is among the `others` for the backbone, no attention mask: only so does Transformers keep
    documents apart where position ids restart.
    """
    backbone = plain(model).base_model
    inputs = {"input_ids": input_ids_BT, "position_ids": position_ids_BT, **others}
    return backbone(**inputs, use_cache=False).last_hidden_state


def plain(model: Any) -> PreTrainedModel:
    """The Transformers model inside a peft one (its layers hold the adapters), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """What a model's config says of text: a part of that of a model which reads pictures too."""
    return plain(model).config.get_text_config()


def head(model: PreTrainedModel) -> Head:
    """What makes logits of `hidden_states`, with what peft adds to it where the head is tuned."""
    config = text_config(model)
    caps = [cap for name in LOGIT_CAPS if (cap := getattr(config, name, None)) is not None]
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    weight, bias = _weight_and_bias(model)
    return Head(weight, bias, float(scale), float(caps[0]) if caps else None)


def _weight_and_bias(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    layer: Any = plain(model).get_output_embeddings()
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight, getattr(layer, "bias", None)
    base = layer.get_base_layer()
    weight = base.weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
    return weight, getattr(base, "bias", None)


def with_lora(model: PreTrainedModel, lora: dict[str, Any] | None, seed: int = 0) -> Any:
    """The model with new LoRA adapters, drawn with `seed`.

    Args:
        model: what is adapted.
        lora: fields of `peft.LoraConfig`; None leaves the model as it is.
        seed: of the adapters.

    Raises:
        ConfigError: unknown settings, or adapters whose loss or merged model would be wrong.
    """
    if lora is None:
        return model
    if lora.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ConfigError(
            f"lora.init_lora_weights: '{lora['init_lora_weights']}' changes the weights of the model itself, which "
            "checkpoints of adapters do not hold. Leave it out, or take gaussian or orthogonal."
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("lora: needs peft. Install it with `pip install rho-lm[peft]`.") from None
    set_seed(seed)
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {error}. Its settings are fields of peft.LoraConfig.") from error
    _check_merging(adapted)
    check_trainable(adapted)
    return adapted


def _check_merging(model: Any) -> None:
    """Refuse adapters that can't be merged into one of two layers with one weight."""
    network = plain(model)
    embedding, layer = network.get_input_embeddings(), network.get_output_embeddings()
    adapted = [hasattr(one, "get_delta_weight") or hasattr(one, "modules_to_save") for one in (embedding, layer)]
    if any(adapted) and network.config.tie_word_embeddings:
        raise ConfigError(
            "lora: its target_modules or modules_to_save name the embeddings or the head, which are one weight in this "
            "model: merging would change both. Leave them out, or take a model with tie_word_embeddings: false."
        )


def check_trainable(model: Any) -> None:
    """Refuse a model whose training would go wrong here without a word.

    Raises:
        ConfigError: adapters that the loss would pass by, or an auxiliary loss, naming the setting.
    """
    adapted_head = hasattr(plain(model).get_output_embeddings(), "get_delta_weight")
    for settings in getattr(model, "peft_config", {}).values():
        if settings.is_prompt_learning:
            raise ConfigError(
                f"{type(settings).__name__}: the loss is made from the model that it adapts, without what it puts "
                "before the text. Take LoRA, or another adapter of the layers."
            )
        unlike = [name for name in ("use_dora", "lora_bias", "lora_dropout") if getattr(settings, name, None)]
        if adapted_head and unlike:
            raise ConfigError(
                f"lora.{unlike[0]}: not with an adapted head, whose weight is read as a whole. Leave the head out of "
                "target_modules, or this setting."
            )
    config = text_config(model)
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0):
        raise ConfigError(
            f"router_aux_loss_coef {config.router_aux_loss_coef}: the experts' auxiliary loss is not added here. Set "
            "it to 0 (in TRL among the arguments), or output_router_logits of the model's config to false."
        )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not those that `head` makes of `hidden_states`: its losses would be wrong here.

    Raises:
        MismatchError: with the largest difference seen.
    """
    ids = torch.arange(8, device=model.device)[None] % text_config(model).vocab_size
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    own = head(model).logits(hidden_states(model, ids, torch.arange(8, device=model.device)[None]))
    model.train(was_training)
    difference, largest = (logits - own).abs().max().item(), logits.abs().max().item()
    if not difference <= 2e-2 * largest:
        raise MismatchError(
            f"{type(model).__name__}: its logits (up to {largest:.3g}) differ from those of its head by up to "
            f"{difference:.3g}: it scales, caps or mixes them in a way rho does not know. Take another model."
        )


@torch.no_grad()
def check_isolation(model: PreTrainedModel, isolated: bool) -> None:
    """Refuse, for isolated documents, a model that lets one document of a block see another.

    Restarting position ids keep documents apart in most models, but not where attention or state does not read them.

    Raises:
        MismatchError: changing the first document changed the second.
    """
    if not isolated:
        return
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device) % text_config(model).vocab_size
    changed = ids.clone()
    changed[:4] = ids[4:].flip(0)
    positions = torch.arange(4, device=model.device).repeat(2)[None]
    seen = [hidden_states(model, row[None], positions)[0, 4:].float() for row in (ids, changed)]
    model.train(was_training)
    difference = (seen[0] - seen[1]).abs().max().item()
    if not difference <= 1e-3 * max(1.0, seen[0].abs().max().item()):
        raise MismatchError(
            f"{type(model).__name__}: documents in a block see each other in it (by {difference:.3g}), whatever their "
            "position ids say. Build the corpus without --isolated, or take another model."
        )


def model_name(config: ModelConfig) -> str:
    """For messages."""
    return config.path or f"new {config.architecture and config.architecture.get('model_type')}"


def save_model(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a plain Transformers model, or other `weights` of it, into `folder`, which appears whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    model.save_pretrained(partial, state_dict=weights)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
