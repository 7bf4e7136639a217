"""Models made from a config, or told apart from one that can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from rho.errors import ConfigError, MismatchError
from rho.models import (
    ModelConfig,
    check_head,
    ends_documents,
    head,
    hidden_states,
    make_model,
    save_model,
    source_hash,
    text_config,
)
from rho.objective import token_entropy, token_labels, token_loss
from rho.score import score_batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, r"architecture.model_type: expected one that transformers knows \(llama, .*'lama'"),
        ({"model_type": None}, r"architecture.model_type: expected one .* found None"),
        ({"hiden_size": 8}, r"architecture.hiden_size: no setting of a llama config. Expected one of hidden_size"),
        ({"hidden_size": "wide"}, r"no llama can be made with these settings .*hidden_size.*expected int"),
        ({"num_attention_heads": 5}, r"no llama can be made with these settings .*attention heads"),
        ({"num_attention_heads": 0}, r"no llama can be made with these settings"),
    ],
)
def test_an_architecture_that_can_not_be_made_is_named(architecture: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model(ModelConfig(architecture={**architecture, **changes}), 300)


def test_a_model_that_is_no_causal_language_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no t5 can be made with these settings .*AutoModelForCausalLM"):
        make_model(ModelConfig(architecture={"model_type": "t5"}), 300)


def test_a_model_that_is_neither_here_nor_on_the_hub_may_be_a_misspelt_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = r"slmm: no model could be loaded from here .*No file or folder of that name is in .*check the path"
    with pytest.raises(ConfigError, match=said):
        make_model(ModelConfig(path="slmm"), 300)
    (tmp_path / "slmm").mkdir()
    with pytest.raises(ConfigError) as caught:
        make_model(ModelConfig(path="slmm"), 300)
    assert "No file or folder" not in str(caught.value)


def test_names_of_older_transformers_configs_are_understood(architecture: dict) -> None:
    older = {"rope_theta": 5e5, "torch_dtype": "float32", "attn_implementation": "eager"}
    model = make_model(ModelConfig(architecture={**architecture, **older}), 300)
    assert model.config.rope_parameters["rope_theta"] == 5e5


def test_new_weights_are_those_of_the_seed(architecture: dict) -> None:
    config = ModelConfig(architecture=architecture)
    one, same, other = (make_model(config, 300, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_model_ends_its_text_with_the_corpus_end_token(architecture: dict, tmp_path: Path) -> None:
    model = make_model(ModelConfig(architecture=architecture), 300)
    ends_documents(model, 7)
    save_model(model, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text())["eos_token_id"] == 7


def test_the_content_hash_of_an_adapter_holds_the_weights_that_it_adapts(architecture: dict, tmp_path: Path) -> None:
    base = make_model(ModelConfig(architecture=architecture), 300)
    save_model(base, tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    told = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(told)
    before = source_hash(ModelConfig(path=str(tmp_path / "adapter")))
    assert before == source_hash(ModelConfig(path=str(tmp_path / "adapter")))
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    save_model(base, tmp_path / "base")
    assert source_hash(ModelConfig(path=str(tmp_path / "adapter"))) != before


def test_the_content_hash_is_that_of_weights_and_config_wherever_they_are(architecture: dict, tmp_path: Path) -> None:
    model = make_model(ModelConfig(architecture=architecture), 300)
    for folder in ("a", "b"):
        save_model(model, tmp_path / folder)
    a, b = (source_hash(ModelConfig(path=str(tmp_path / folder))) for folder in ("a", "b"))
    assert a == b
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(model, tmp_path / "b")
    assert source_hash(ModelConfig(path=str(tmp_path / "b"))) != a
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"not a model folder: expected config[.]json and weights"):
        source_hash(ModelConfig(path=str(tmp_path / "b")))


SCALED_AND_CAPPED = {
    "granite": {"logits_scaling": 8.0, "initializer_range": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8, "initializer_range": 0.5},
    "hyperclovax": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize(("kind", "settings"), SCALED_AND_CAPPED.items(), ids=SCALED_AND_CAPPED)
def test_scaled_and_capped_logits_are_known_or_refused(architecture: dict, kind: str, settings: dict) -> None:
    model = make_model(ModelConfig(architecture={**architecture, "model_type": kind, **settings}), 50)
    if kind == "hyperclovax":  # multiplies by what Granite of the same name divides by
        with pytest.raises(MismatchError, match="scales, caps or mixes them in a way rho does not know"):
            check_head(model)
        return
    check_head(model)
    ids, positions = torch.arange(10).view(2, 5), torch.arange(5).expand(2, 5)
    loss, entropy = score_batch(model, {"input_ids": ids, "position_ids": positions}, entropy=True)
    logits, labels = model(ids).logits, token_labels(ids, positions)
    torch.testing.assert_close(loss, token_loss(logits, labels), equal_nan=True)
    torch.testing.assert_close(entropy, token_entropy(logits, labels), equal_nan=True)
    plain = head(model)._replace(scale=1.0, cap=None).logits(hidden_states(model, ids, positions))
    assert not torch.allclose(plain, logits, rtol=0.1)


def test_of_a_model_that_reads_pictures_too_the_text_counts() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"head_dim": 8, "intermediate_size": 32, "vocab_size": 50}
    picture = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    picture |= {"image_size": 8, "patch_size": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=picture))
    check_head(model)
    assert text_config(model).vocab_size == 50


def test_a_name_may_hold_its_revision_and_a_folder_an_at_sign(architecture: dict, tmp_path: Path) -> None:
    at = ModelConfig(path="someone/model@step1000")
    assert (at.path, at.revision) == ("someone/model", "step1000")
    assert source_hash(at) != source_hash(ModelConfig(path="someone/model@step2000"))
    folder = tmp_path / "me@home"
    make_model(ModelConfig(architecture=architecture), 32).save_pretrained(folder)
    assert ModelConfig(path=str(folder)).revision is None
    assert make_model(ModelConfig(path=str(folder)), 32).config.vocab_size == 32
