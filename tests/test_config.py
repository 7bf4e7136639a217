"""The configuration of a run: typed, closed, and every problem named by its key."""

import copy

import pytest
import yaml

from rho.config import load_config, save_config
from rho.errors import ConfigError
from rho.pipeline import DEMO

TREE = {
    "name": "toy",
    "tokenizer": {"vocab_size": 300, "corpora": ["noisy"]},
    "corpora": {
        "curated": {"sources": ["curated.jsonl"]},
        "noisy": {"sources": ["noisy.jsonl"]},
        "target": {"sources": ["target.jsonl"], "heldout_fraction": 1.0},
    },
    "model": {"architecture": {"model_type": "llama"}},
    "reference": {"corpus": "curated"},
    "corpus": "noisy",
    "target": "target",
    "train": {"arms": {"clm": {}, "slm": {"ratio": 0.6, "arguments": {"max_steps": 7}}}, "arguments": {"max_steps": 5}},
    "evaluate": {"sets": ["target"]},
}


@pytest.fixture
def load(tmp_path):
    """Load `TREE` with dotted keys set to other values (or removed: None)."""

    def load_changed(changes: dict | None = None, overrides: tuple[str, ...] = ()):
        tree = copy.deepcopy(TREE)
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is None:
                del section[last]
            else:
                section[last] = value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        return load_config(tmp_path / "run.yaml", overrides)

    return load_changed


def test_a_config_is_read_with_its_defaults(load):
    config = load()
    assert config.corpora["noisy"].block_length == 1024
    assert config.train.seeds == [0]
    assert config.train.arms["clm"].ratio == 1.0


def test_an_arms_own_arguments_go_on_top_of_those_of_all(load):
    train = load().train
    assert train.arm("clm", 3).arguments == {"max_steps": 5}
    assert train.arm("slm", 3).arguments == {"max_steps": 7}
    assert (train.arm("slm", 3).seed, train.arm("slm", 3).ratio) == (3, 0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora.noisy.blok_length": 8}, "corpora.noisy.blok_length: no such setting, found 8"),
        ({"speed": "fast"}, "speed: no such setting, found 'fast'"),
        ({"train.arms.slm.ratoi": 0.5}, "train.arms.slm.ratoi: no such setting"),
        ({"corpora.noisy.block_length": "long"}, "corpora.noisy.block_length: Input should be a valid integer"),
        ({"corpora.noisy.sources": "a.jsonl"}, "corpora.noisy.sources: Input should be a valid list"),
        ({"train.seeds": ["x"]}, "train.seeds.0: Input should be a valid integer"),
        ({"model": None}, "model: Field required"),
        ({"train.arms": {}}, "train.arms: "),
        ({"train.arms.slm.score": "best"}, "train.arms.slm.score: Input should be 'excess'"),
        ({"train.arms.slm.arguments": {"seed": 3}}, "train.arms.slm.arguments: seed: set by rho"),
        ({"reference.arguments": {"seed": 3}}, "reference.arguments: seed: set by rho"),
        ({"train.arguments": {"max_stepz": 3}}, "train.arguments: max_stepz: no field of transformers"),
        ({"train.arguments": {"max_steps": "many"}}, "max_steps: Input should be a valid integer"),
        ({"train.arguments": {"learning_rate": float("nan")}}, "learning_rate: expected a finite number, found nan"),
        ({"train.arguments": {"per_device_train_batch_size": 0}}, "batch_size: expected 1 or more, found 0"),
        ({"train.arguments": {"max_steps": 0}}, "max_steps: expected a number above 0, found 0"),
        ({"train.arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor: without effect"),
        ({"train.arms.slm.seed": 3}, "train.arms.slm.seed: every arm trains with each of train.seeds"),
        ({"train.seeds": [-1]}, "train.seeds.0: Input should be greater than or equal to 0"),
        ({"corpus": "nosy"}, "corpus: no corpus 'nosy'; found curated, noisy, target"),
        ({"target": "aim"}, "target: no corpus 'aim'"),
        ({"reference.corpus": "books"}, "reference.corpus: no corpus 'books'"),
        ({"tokenizer.corpora": ["all"]}, "tokenizer.corpora: no corpus 'all'"),
        ({"evaluate.explore": "page"}, "evaluate.explore: no corpus 'page'"),
        ({"dynamics": {"set": "page"}}, "dynamics.set: no corpus 'page'"),
        ({"dynamics": {"set": "noisy", "arms": ["other"]}}, "dynamics.arms: no arm 'other'"),
        ({"dynamics": {"set": "noisy", "arms": []}}, "dynamics.arms: List should have at least 1 item"),
        ({"evaluate.sets": ["noisy"]}, "evaluate.sets: the target 'target' must be among them"),
        ({"tokenizer": {"vocab_size": 300}}, "'corpora': name the corpora"),
        ({"tokenizer.path": "gpt2"}, "give either 'path' (a tokenizer to load) or 'vocab_size'"),
        ({"reference.path": "model"}, "give one of 'corpus' (train the reference on it), 'path'"),
        ({"reference.model": {"path": "a"}, "reference.after": "clm"}, "give either 'model' or 'after'"),
        ({"reference.after": "clm", "reference.tokenizer": "x"}, "'after' starts from a model of the run's tokenizer"),
        ({"reference": None}, "references: Field required"),
        ({"references": {"a": {"corpus": "curated"}}}, "give either 'reference' (one) or 'references'"),
        ({"reference.after": "cml"}, "references.reference.after: no arm 'cml'; found clm, slm"),
        ({"reference.after": "slm"}, "references.reference.after: no earlier reference 'reference'; found none"),
        ({"train.arms.slm.references": {"names": ["b"]}}, "train.arms.slm.references.names: no reference 'b'"),
        ({"train.arms.slm.references": {"weights": {"b": 1}}}, "train.arms.slm.references: 'weights'"),
        (
            {"train.arms.slm.references": {"combine": "weights", "weights": {"b": 1}}},
            "train.arms.slm.references.weights: name each of reference once",
        ),
        ({"train.arms.reference-2": {}}, "train.arms.reference-2: such a name is that of a reference"),
        ({"train.arms.clm.corpus": "mixed"}, "train.arms.clm.corpus: no corpus 'mixed'; found curated, noisy, target"),
        ({"train.arms.slm.corpus": "curated"}, "train.arms.slm: only 'noisy' is scored"),
        (
            {"train.arms.clm": {"corpus": "curated", "references": {"names": ["reference"]}}},
            "train.arms.clm: only 'noisy' is scored",
        ),
        ({"train.arms.slm.after": "cml"}, "train.arms.slm.after: no arm 'cml'; found clm, slm"),
        ({"train.arms.slm.after": "slm"}, "train.arms.slm.after: goes in a circle, slm after slm"),
        (
            {"train.arms": {"a": {"after": "b"}, "b": {"after": "c"}, "c": {"after": "b"}}},
            "train.arms.a.after: goes in a circle, a after b after c after b",
        ),
        ({"train.arms.a/b": {}}, "train.arms.a/b.[key]: String should match pattern"),
        ({"train.arms.slm.second": {"ratoi": 0.5}}, "train.arms.slm.second.ratoi: no such setting"),
        ({"train.arms.slm.schedule": {"points": [[1, 0.5]]}}, "schedule: a schedule's steps must rise"),
        ({"train.arms.slm.temperature": 0}, "temperature and clip must be above 0, found 0.0"),
        ({"model.path": "gpt2"}, "give either 'path' (a model to load) or 'architecture'"),
        ({"name": "../up"}, "name: String should match pattern"),
    ],
)
def test_a_setting_that_can_not_be_used_is_named(load, tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load(changes)
    assert message in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_number_that_yaml_takes_for_text_is_read_as_a_number(load):
    arguments = load(overrides=("train.arguments.learning_rate=1e-3",)).train.arguments
    assert arguments["learning_rate"] == 0.001


@pytest.mark.parametrize("ratio", [0, 1.5, -0.1, float("nan"), float("inf"), "half"])
def test_a_ratio_outside_zero_to_one_is_refused(load, ratio):
    with pytest.raises(ConfigError, match=rf"train\.arms\.slm\.ratio: .*found '?{ratio}"):
        load({"train.arms.slm.ratio": ratio})


def test_all_problems_are_told_at_once(load):
    with pytest.raises(ConfigError, match=r"3 setting\(s\) can't be used"):
        load({"speed": 1, "train.arms.slm.ratio": 2, "corpora.noisy.block_length": 1})


def test_a_setting_can_be_overridden(load):
    overrides = ("train.arms.slm.ratio=0.3", "train.seeds=[1, 2]", "corpora.noisy.max_tokens=100", "name=other")
    config = load(overrides=overrides)
    assert (config.train.arms["slm"].ratio, config.train.seeds, config.name) == (0.3, [1, 2], "other")
    assert config.corpora["noisy"].max_tokens == 100


def test_an_override_of_an_unknown_setting_is_named(load):
    with pytest.raises(ConfigError, match=r"train\.spede: no such setting"):
        load(overrides=("train.spede=1",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seeds", "expected name=value"),
        ("name.first=x", "'name' is not a section"),
        ("train.seeds=[1", "the value is not YAML"),
    ],
)
def test_an_override_that_can_not_be_understood_is_shown(load, override, message):
    with pytest.raises(ConfigError) as caught:
        load(overrides=(override,))
    assert f"--set {override}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of settings, found list"),
        (b"", "expected a mapping of settings, found NoneType"),
        (b"hello", "expected a mapping of settings, found str"),
        (b"a: [1", "not readable as YAML"),
        (b"a: 2024-13-45", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_config_is_an_error(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="a folder; expected a config file"):
        load_config(tmp_path)


def test_a_missing_config_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")


def test_the_resolved_config_reads_back_the_same(load, tmp_path):
    config = load()
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_one_reference_is_several_with_one_name(load):
    one, several = load(), load({"reference": None, "references": {"reference": {"corpus": "curated"}}})
    assert one == several
    assert one.references_of("slm") == ["reference"]


def test_an_arm_uses_all_references_or_those_it_names(load):
    two = {"first": {"corpus": "curated"}, "second": {"corpus": "curated", "after": "clm"}}
    names = {"train.arms.clm.references": {"names": ["first"]}}
    config = load({"reference": None, "references": two, **names})
    assert (config.references_of("clm"), config.references_of("slm")) == (["first"], ["first", "second"])


def test_an_arm_may_train_on_another_corpus_and_go_on_after_another_arm(load):
    arms = {"train.arms.mixed": {"corpus": "curated"}, "train.arms.slm.after": "clm"}
    random = {"train.arms.random": {"corpus": "curated", "score": "random", "ratio": 0.5, "after": "slm"}}
    config = load({**arms, **random})
    assert [config.references_of(arm) for arm in ("clm", "mixed", "random")] == [["reference"], [], []]
    assert [config.lineage(arm) for arm in ("clm", "random")] == [["clm"], ["clm", "slm", "random"]]
    assert not {"corpus", "after"} & config.train.arm("random", 0).model_dump().keys()


def test_a_reference_waits_for_those_of_all_the_arms_it_goes_on_after(load):
    two = {"first": {"corpus": "curated"}, "second": {"corpus": "curated", "after": "later"}}
    arms = {"clm": {"references": {"names": ["second"]}}, "later": {"corpus": "curated", "after": "clm"}}
    with pytest.raises(ConfigError, match=r"references.second.after: no earlier reference 'second'; found first"):
        load({"reference": None, "references": two, "train.arms": arms})


def test_the_stages_of_a_run_are_in_order_each_once(load):
    references = {
        "first": {"corpus": "curated"},
        "given": {"path": "model"},
        "later": {"corpus": "curated", "after": "slm"},
    }
    names = {f"train.arms.{arm}.references": {"names": ["first"]} for arm in ("clm", "slm")}
    config = load({"reference": None, "references": references, "train.seeds": [3, 4], **names})
    assert [stage.folder for stage in config.stages()] == [
        *("corpus", "reference-first", "scores/first", "scores/given", "train/slm-seed3", "reference-later"),
        *("scores/later", "train/clm-seed3", "train/clm-seed4", "train/slm-seed4", "evaluate", "dynamics", "report"),
    ]
    chosen = config.stages(["train/clm-seed4", "reference"])
    assert [stage.folder for stage in chosen] == ["reference-first", "reference-later", "train/clm-seed4"]
    with pytest.raises(ConfigError, match=r"no stage 'train/clm' in this run; found corpus, reference, .*clm-seed3"):
        config.stages(["train/clm"])


def test_an_online_reference_is_a_model_that_is_here_and_the_only_one_of_its_arm(load):
    with pytest.raises(ConfigError, match="'online' is for a model that is here"):
        load({"reference": {"corpus": "curated", "tokenizer": "other", "online": True}})
    two = {"first": {"corpus": "curated"}, "second": {"corpus": "curated", "online": True}}
    with pytest.raises(ConfigError, match="must be its only reference"):
        load({"reference": None, "references": two})
    with pytest.raises(ConfigError, match="dataset needs stored scores"):
        load({"reference.online": True, "train.arms.slm.scope": "dataset", "train.arms.slm.score": "ref_loss"})
    with pytest.raises(ConfigError, match="only rho's own knows"):
        load({"train.arms.slm.backend": "torch", "train.arms.slm.retention": 0.1})


@pytest.mark.parametrize(
    "changes",
    [
        {"score.entropy": False},
        {"reference": {"corpus": "curated", "tokenizer": "other"}},
        {"reference": {"api": {"url": "http://localhost", "model": "m"}}},
    ],
)
def test_entropies_that_will_not_be_there_are_refused_before_anything_runs(load, changes):
    load(changes)  # no arm needs them
    for score in ({"score": "ref_entropy"}, {"score": "ref_loss", "second": {"score": "ref_entropy"}}):
        with pytest.raises(ConfigError, match=r"train\.arms\.slm: it needs entropies, and those of 'reference'"):
            load({**changes, "train.arms.slm": {"ratio": 0.6, **score}})
    load({"score.entropy": False, "reference.online": True, "train.arms.slm.score": "ref_entropy"})


def test_an_override_changes_one_of_two_sections_that_yaml_made_the_same(tmp_path):
    text = yaml.safe_dump({**TREE, "reference": None}).replace(
        "reference: null", "references: {a: &one {corpus: curated, arguments: {max_steps: 5}}, b: *one}"
    )
    (tmp_path / "run.yaml").write_text(text)
    references = load_config(tmp_path / "run.yaml", ["references.a.arguments.max_steps=7"]).references
    assert [one.arguments["max_steps"] for one in references.values()] == [7, 5]


@pytest.mark.parametrize("recipe", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_config_of_its_own_name(recipe):
    config = load_config(recipe)
    assert config.name == recipe.stem
    assert "clm" in config.train.arms


def test_fsdp_may_be_switched_on_as_transformers_says_it(load):
    assert load({"train.arguments": {"fsdp": True}}).train.arguments["fsdp"] is True


def test_a_strategy_of_no_is_not_read_as_false(load):
    config = load(overrides=["train.arguments.save_strategy=no"])
    assert config.train.arguments["save_strategy"] == "no"
