"""What a run will cost: every number worked out by hand, and the paper's own times."""

import json
import sys
from pathlib import Path

import pytest

from rho import cli
from rho.config import load_config
from rho.errors import ConfigError
from rho.flops import Forward, forward_flops, train_flops
from rho.models import ModelConfig, make_model, skeleton
from rho.pipeline import DEMO
from rho.plan import CHECKPOINT_BYTES, MODEL_BYTES, PlanConfig, kept_checkpoints, plan, total
from rho.runs import Manifest, read_manifest
from rho.settings import validated
from rho.train import TrainConfig

RECIPES = DEMO.parent
SHAPES = {"tinyllama-math": "tinyllama-1.1b", "tinyllama-general": "tinyllama-1.1b", "mistral-math": "mistral-7b"}
H100 = 989e12
# The llama of conftest.py with 300 tokens: 16 wide, 1 layer, 2 heads of 8, MLP 32.
HEAD = 300 * 16
BACKBONE = 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16  # attention, MLP, norms
FORWARD = Forward(2 * BACKBONE, 4 * 16 * 8, 2 * HEAD)  # in windows of 8 tokens


@pytest.fixture
def run(tmp_path, architecture):
    """A config with blocks of 8 tokens, and dotted settings changed."""
    tree = {
        "name": "toy",
        "tokenizer": {"vocab_size": 300, "corpora": ["noisy"]},
        "corpora": {
            "curated": {"sources": ["curated.jsonl"], "block_length": 8, "max_tokens": 800},
            "noisy": {"sources": ["noisy.jsonl"], "block_length": 8, "max_tokens": 10_000, "heldout_fraction": 0.2},
            "target": {"sources": ["target.jsonl"], "block_length": 8, "heldout_fraction": 1.0},
        },
        "model": {"architecture": architecture},
        "reference": {"corpus": "curated", "arguments": {"per_device_train_batch_size": 4, "save_strategy": "no"}},
        "corpus": "noisy",
        "target": "target",
        "train": {
            "arms": {"clm": {}, "slm": {"ratio": 0.5}},
            "arguments": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 10},
        },
        "evaluate": {"sets": ["target"]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))

    def changed(*overrides: str):
        return load_config(tmp_path / "run.yaml", overrides)

    return changed


def by_stage(costs):
    return {cost.stage: cost for cost in costs}


def paper(recipe: str, *overrides: str, **settings):
    """The plan of a recipe on the paper's 32 H100."""
    shape = ModelConfig.parse(str(RECIPES / "models" / f"{SHAPES[recipe]}.yaml"))
    config = load_config(RECIPES / f"{recipe}.yaml", overrides)
    return by_stage(plan(PlanConfig(devices=32, **settings), config, shape))


# Shapes


@pytest.mark.parametrize(("tied", "parameters"), [(True, HEAD + BACKBONE), (False, 2 * HEAD + BACKBONE)])
def test_a_skeleton_has_the_parameters_of_the_model(architecture, tied, parameters):
    config = ModelConfig(architecture={**architecture, "tie_word_embeddings": tied})
    shape = skeleton(config, 300)
    assert shape.num_parameters() == make_model(config, 300).num_parameters() == parameters
    assert {weight.device.type for weight in shape.parameters()} == {"meta"}
    assert forward_flops(shape, 8) == FORWARD


@pytest.mark.parametrize(("name", "parameters"), [("tinyllama-1.1b", 1_100_048_384), ("mistral-7b", 7_241_732_096)])
def test_the_shapes_of_the_recipes_are_those_of_the_published_models(name, parameters):
    assert skeleton(ModelConfig.parse(str(RECIPES / "models" / f"{name}.yaml"))).num_parameters() == parameters


def test_the_shape_of_a_trained_model_is_read_from_its_config(reference, architecture):
    shape = skeleton(ModelConfig(path=str(reference)))
    assert shape.num_parameters() == skeleton(ModelConfig(architecture=architecture), 300).num_parameters()


def test_the_heads_of_a_config_without_their_size_share_the_width():
    settings = {"model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    assert forward_flops(skeleton(ModelConfig(architecture=settings), 300), 10).attention == 4 * 3 * 32 * 10


# FLOPs


def test_plain_training_is_six_times_the_weights_and_twelve_times_the_attention():
    """PaLM, appendix B: 6 N + 12 L A T; of eight tokens, 8 (6 x 7,408 + 12 x 1 x 16 x 8)."""
    assert 8 * train_flops(FORWARD, TrainConfig(), 10) == 8 * (6 * 7_408 + 12 * 1 * 16 * 8) == 367_872


PLAIN = 3 * (2 * BACKBONE + 4 * 16 * 8)  # of the backbone


@pytest.mark.parametrize(
    ("settings", "flops"),
    [
        ({"ratio": 0.5}, PLAIN + 2 * 2 * HEAD),  # the head: once forward, twice backward for half of the tokens
        ({"ratio": 0.5, "scope": "running"}, PLAIN + 2 * 2 * HEAD),
        ({"ratio": 0.5, "scope": "step"}, 4 * PLAIN / 3 + 3 * 2 * HEAD),  # and all of it forward once more
        ({"ratio": 0.5, "scope": "step", "score": "random"}, PLAIN + 2 * 2 * HEAD),  # which is known before
        ({"ratio": 0.5, "second": {"score": "ref_entropy", "ratio": 0.7}}, 4 * PLAIN / 3 + 3 * 2 * HEAD),
        ({"ratio": 0.5, "retention": 0.1}, PLAIN + 3 * 2 * HEAD),
        ({"weighting": "softmax"}, PLAIN + 3 * 2 * HEAD),
        ({"ratio": 0.5, "backend": "torch"}, PLAIN + 2.5 * 2 * HEAD),
        ({"backend": "torch"}, PLAIN + 3 * 2 * HEAD),
        ({"ratio": 0.5, "filtered_backward": True}, PLAIN - 2 * BACKBONE + 2 * 2 * HEAD),
        ({"schedule": {"points": [[0, 1.0], [5, 0.5]]}}, PLAIN + 2.5 * 2 * HEAD),  # 0.75 of the tokens in ten steps
    ],
)
def test_selection_costs_what_docs_step_says(settings, flops):
    config = validated(TrainConfig, settings, "test")
    assert train_flops(FORWARD, config, steps=10, micro_batches=2) == pytest.approx(flops, rel=1e-12)


def test_a_step_of_one_micro_batch_is_ranked_in_one_pass():
    config = TrainConfig(ratio=0.5, scope="step")
    assert train_flops(FORWARD, config, steps=10, micro_batches=1) == PLAIN + 2 * 2 * HEAD


def test_an_online_reference_is_passed_forward_where_the_selection_needs_it():
    assert train_flops(FORWARD, TrainConfig(ratio=0.5), 10, 1, FORWARD) == PLAIN + 2 * 2 * HEAD + sum(FORWARD)
    assert train_flops(FORWARD, TrainConfig(), 10, 1, FORWARD) == PLAIN + 3 * 2 * HEAD


@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_more_kept_tokens_cost_more(scope):
    costs = [train_flops(FORWARD, TrainConfig(ratio=r / 10, scope=scope), 10, 1) for r in range(1, 11)]
    assert costs == sorted(set(costs))


# A run


def test_a_small_run_by_hand(run):
    settings = PlanConfig(devices=2, price=7.0, throughput={"train": 640, "train/slm-seed0": 320})
    costs = by_stage(plan(settings, run()))
    assert list(costs) == [
        *("corpus/curated", "corpus/noisy", "reference", "scores/reference", "train/clm-seed0", "train/slm-seed0")
    ]
    assert (costs["corpus/noisy"].tokens, costs["corpus/noisy"].bytes) == (10_000, 19_000)

    clm = costs["train/clm-seed0"]  # 10 steps of 4 blocks x 2 micro-batches x 2 devices x 8 tokens
    assert (clm.steps, clm.tokens, clm.flops) == (10, 1280, 1280 * 45_984)
    assert clm.device_hours == pytest.approx(2 / 3600)  # 1280 / 640 seconds
    assert (clm.hours, clm.price) == pytest.approx((clm.device_hours / 2, clm.device_hours * 7))
    assert clm.mfu == pytest.approx(640 * 45_984 / H100)
    assert clm.bytes == 7_408 * (4 + 12)  # the model, and the checkpoint of the last step

    slm = costs["train/slm-seed0"]
    assert (slm.tokens_per_second, slm.device_hours) == (320, pytest.approx(4 / 3600))

    reference = costs["reference"]  # 100 blocks, 8 a step: 13 steps an epoch, and three epochs
    assert (reference.steps, reference.tokens, reference.bytes) == (39, 2400, 7_408 * 4)
    assert reference.tokens_per_second == pytest.approx(0.3 * H100 / 45_984)

    scores = costs["scores/reference"]  # 8,000 tokens are not held out
    assert (scores.tokens, scores.steps) == (8000, None)
    assert scores.flops == 8000 * sum(FORWARD) == 8000 * (45_984 / 3)
    assert scores.bytes == pytest.approx(8000 * (1.64 + 1.48))

    whole = total(list(costs.values()))
    assert whole.price == pytest.approx(7 * whole.device_hours)
    assert whole.device_hours == pytest.approx(sum(cost.device_hours or 0 for cost in costs.values()))


def test_a_throughput_is_the_shares_of_the_peak_that_it_takes(run):
    costs = by_stage(plan(PlanConfig(device="a100", mfu=0.5), run()))
    assert costs["train/clm-seed0"].mfu == 0.5
    assert costs["train/clm-seed0"].tokens_per_second == pytest.approx(0.5 * 312e12 / 45_984)
    assert costs["train/clm-seed0"].price is None


def test_more_steps_and_more_tokens_cost_more(run):
    def spent(*overrides: str) -> float:
        return total(plan(PlanConfig(), run(*overrides))).device_hours or 0

    assert spent() < spent("train.arguments.max_steps=11")
    assert spent() < spent("corpora.noisy.max_tokens=20000")
    assert spent() < spent("train.seeds=[0, 1]")
    assert spent() > spent("train.arms.slm.ratio=0.3")


def test_windows_that_overlap_are_read_more_than_once(run):
    """Blocks of 8 in windows of 4, two of them read again: 4 + 4 + 4 tokens."""
    costs = by_stage(plan(PlanConfig(), run("score.context=4", "score.overlap=2", "score.entropy=false")))
    forward = 2 * BACKBONE + 4 * 16 * 4 + 2 * HEAD
    assert costs["scores/reference"].flops == pytest.approx(8000 * forward * 12 / 8)
    assert costs["scores/reference"].bytes == pytest.approx(8000 * 1.64)


def test_an_online_reference_is_paid_in_training(run):
    costs = by_stage(plan(PlanConfig(), run("reference.online=true")))
    assert "scores/reference" not in costs
    assert costs["train/slm-seed0"].flops == pytest.approx(1280 / 2 * (PLAIN + 2 * 2 * HEAD + sum(FORWARD)))


def test_a_history_is_paid_in_training_and_has_no_scores(run):
    arm = "train.arms.past={ratio: 0.5, score: retrospective, references: {history: {every: 2}}}"
    cost = by_stage(plan(PlanConfig(), run(arm)))["train/past-seed0"]
    assert cost.flops == pytest.approx(640 * (PLAIN + 2 * 2 * HEAD + sum(FORWARD)))


def test_an_arm_on_a_corpus_of_its_own_has_its_tokens(run):
    config = run(
        "train.arms.then={after: clm, corpus: curated, arguments: {max_steps: -1, num_train_epochs: 2}}",
        "corpora.curated.max_tokens=1600",
        "corpora.curated.block_length=16",
    )
    assert by_stage(plan(PlanConfig(), config))["train/then-seed0"].tokens == 2 * 1600


def test_a_served_reference_costs_its_price_a_token(run):
    served = "reference={api: {url: 'http://127.0.0.1:1', model: x, price: 5}}"
    cost = by_stage(plan(PlanConfig(price=100), run(served)))["scores/reference"]
    assert (cost.price, cost.device_hours) == (pytest.approx(8000 / 1e6 * 5), None)


def test_what_a_run_has_built_and_reached_is_taken_from_it(run, tmp_path):
    """95 blocks in all; the two processes of the one arm that has begun do 300 tokens a second after the first step."""
    splits, settings = {"train": {"blocks": 90}, "validation": {"blocks": 5}}, run().corpora["noisy"].settings
    for folder, made in {
        "corpus/noisy": Manifest("corpus", settings, {}, facts={"splits": splits}, status="complete"),
        "train/slm-seed0": Manifest("train", {}, {}, environment={"processes": 2}),
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        made.write(tmp_path / folder)
    lines = [json.dumps({"step": step, "tokens_per_second": rate}) for step, rate in enumerate([9, 200, 300, 400], 1)]
    (tmp_path / "train" / "slm-seed0" / "steps.jsonl").write_text("\n".join([*lines, '{"step": 5, "tok']))
    costs = by_stage(plan(PlanConfig(), run(), folder=tmp_path))
    assert costs["corpus/noisy"].tokens == 95 * 8
    assert costs["scores/reference"].tokens == 90 * 8
    assert costs["train/slm-seed0"].tokens_per_second == costs["train/clm-seed0"].tokens_per_second == 150
    assert costs["reference"].mfu == pytest.approx(0.3)
    more = by_stage(plan(PlanConfig(), run("corpora.noisy.max_tokens=20000"), folder=tmp_path))
    assert more["corpus/noisy"].tokens == 20_000  # what is there is of a corpus with other settings
    given = by_stage(plan(PlanConfig(throughput={"train": 7}), run(), folder=tmp_path))
    assert given["train/slm-seed0"].tokens_per_second == 7


def test_a_training_notes_how_many_processes_its_speed_is_of(reference):
    assert read_manifest(reference).environment["processes"] == 1


def test_a_checkpoint_has_the_bytes_that_are_planned(reference):
    parameters = skeleton(ModelConfig(path=str(reference))).num_parameters()
    checkpoint = reference / "checkpoints" / "checkpoint-12"
    weights = (checkpoint / "model.safetensors").stat().st_size
    states = (checkpoint / "optimizer.pt").stat().st_size
    assert 0 < weights - parameters * MODEL_BYTES < 5_000  # names and shapes
    assert 0 < weights + states - parameters * CHECKPOINT_BYTES < 30_000


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"save_steps": 4}, 3),  # after 4, 8 and the last of 10
        ({"save_steps": 4, "save_total_limit": 2}, 2),
        ({"save_steps": 0.25}, 4),  # after 3, 6, 9 and 10
        ({"save_strategy": "epoch"}, 2),
        ({"save_strategy": "no"}, 0),
    ],
)
def test_checkpoints_are_counted_as_they_are_kept(arguments, number):
    assert kept_checkpoints(TrainConfig(arguments=arguments), steps=10, epochs=1.5) == number


def test_a_mix_has_at_most_what_its_sources_give(run):
    sources = "corpora.noisy.sources=[{source: a, max_tokens: 6000}, {source: b, max_tokens: 3000}]"
    assert run(sources).corpora["noisy"].most_tokens == 9000
    assert run(sources, "corpora.noisy.max_tokens=null").corpora["noisy"].most_tokens == 9000
    assert run("corpora.noisy.sources=[{source: a, max_tokens: 6000}, b]").corpora["noisy"].most_tokens == 10_000


# The paper


def test_the_plan_has_the_papers_times():
    """15 billion tokens by 32 H100 in 3.5 h are 37,202 tokens/s each; 50 billion take 12 h then, 80 billion 19 h."""
    rate = 15e9 / (3.5 * 3600 * 32)
    assert rate == pytest.approx(37_202, abs=1)
    math = paper("tinyllama-math", throughput={"train": rate})["train/slm-seed0"]
    assert math.tokens == 14_305 * 2**20 == pytest.approx(15e9, rel=1e-4)
    assert math.hours == pytest.approx(3.5, rel=1e-4)
    assert math.device_hours == pytest.approx(112, rel=1e-4)
    # 2 x 968,976,384 weights of the backbone and 4 x 22 x 2048 x 2048 of attention three times, and of the head
    # 2 x 65,536,000 once and 0.6 of that twice: 7.208 GFLOP a token, of which an H100 could do 137,208 a second.
    assert math.flops == pytest.approx(math.tokens * (3 * 2 * 968_976_384 + 3 * 369_098_752 + 2.2 * 131_072_000))
    assert math.mfu == pytest.approx(0.271, abs=0.001)

    more = paper("tinyllama-math", "train.arguments.max_steps=47684", throughput={"train": rate})["train/slm-seed0"]
    assert more.tokens == pytest.approx(50e9, rel=1e-4)
    assert more.hours == pytest.approx(12, rel=0.05)
    general = paper("tinyllama-general", throughput={"train": rate})["train/slm-seed0"]
    assert general.tokens == pytest.approx(80e9, rel=1e-4)
    assert general.hours == pytest.approx(19, rel=0.05)


def test_the_plan_has_the_papers_time_of_the_large_model():
    """15 billion tokens by 32 H100 in 18 h: 7,234 tokens/s each."""
    rate = 15e9 / (18 * 3600 * 32)
    assert rate == pytest.approx(7_234, abs=1)
    costs = paper("mistral-math", throughput={"train": rate})
    assert costs["train/slm-seed0"].hours == pytest.approx(18, rel=1e-4)
    assert costs["train/clm-seed0"].mfu == pytest.approx(0.359, abs=0.001)


@pytest.mark.parametrize("recipe", SHAPES)
def test_a_full_scale_recipe_takes_a_million_tokens_a_step(recipe):
    costs = paper(recipe)
    trained = [cost for stage, cost in costs.items() if stage.startswith("train/")]
    assert {cost.tokens / cost.steps for cost in trained} == {2**20}
    assert costs["reference"].tokens / costs["reference"].steps == pytest.approx(2**20, rel=1e-3)
    # At the default share of the peak the times are of the paper's size.
    hours = {"tinyllama-math": 3.5, "tinyllama-general": 19, "mistral-math": 18}[recipe]
    assert costs["train/slm-seed0"].hours == pytest.approx(hours, rel=0.2)


def test_the_general_mix_is_six_to_three_to_one():
    parts = load_config(RECIPES / "tinyllama-general.yaml").corpora["noisy"].parts
    tokens = {"SlimPajama": 0, "starcoderdata": 0, "open-web-math": 0}
    for part in parts:
        [name] = [name for name in tokens if name in part.source]
        tokens[name] += part.max_tokens or 0
    assert tokens == {"SlimPajama": 48 * 10**9, "starcoderdata": 24 * 10**9, "open-web-math": 8 * 10**9}


def test_the_launchers_configs_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    ddp, fsdp = (load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml")) for name in ("ddp", "fsdp2"))
    assert (ddp.distributed_type.value, ddp.num_processes, ddp.num_machines) == ("MULTI_GPU", 32, 4)
    assert (fsdp.distributed_type.value, fsdp.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    assert fsdp.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


# What a user can get wrong


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"throughput": {"training": 1}}, (), "no stage 'training' in this run; found corpus, reference"),
        ({"throughput": {"evaluate": 1}}, (), "throughput of evaluate: only that of reference, scores, train"),
        (
            {},
            ("corpora.noisy.max_tokens=null",),
            "corpora.noisy: how many tokens it has is not known: it has no max_tokens. Say it with --set "
            "corpora.noisy.max_tokens=N",
        ),
        ({}, ("model={path: TinyLlama/TinyLlama-1.1B}",), "TinyLlama/TinyLlama-1.1B: its config can't be read"),
        ({}, ("model={path: ./nothing}",), "nothing: no such file or folder"),
        ({}, ("model.architecture.model_type=lama",), "expected one that transformers knows"),
    ],
)
def test_what_is_not_known_is_asked_for(run, settings, overrides, message):
    with pytest.raises(ConfigError) as caught:
        plan(PlanConfig(**settings), run(*overrides))
    assert message in str(caught.value)


def test_a_size_that_nothing_needs_is_not_asked_for(run):
    costs = plan(PlanConfig(), run("reference.online=true", "corpora.noisy.max_tokens=null"))
    assert [cost.stage for cost in costs if cost.stage.startswith("corpus")] == ["corpus/curated"]


@pytest.fixture
def rho(monkeypatch, capsys):
    """Run the command; its exit code and what it prints."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rho", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        shown = capsys.readouterr()
        return int(exit_.value.code or 0), shown.out, shown.err

    return command


def test_the_command_prints_a_row_a_stage_or_json(run, rho, tmp_path):
    options = ["plan", tmp_path / "run.yaml", "--devices", 4, "--price", 2.5, "--throughput", "train=100"]
    run()
    code, out, _ = rho(*options)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].strip() == "toy, on 4 x h100; tokens/s are those of one"
    assert lines[1].split()[:3] == ["stage", "tokens", "steps"]
    assert lines[-3].split()[:4] == ["train/clm-seed0", "2,560", "10", "1.2e+08"]
    assert lines[-1].startswith("total")
    code, out, _ = rho(*options, "--json")
    tree = json.loads(out)
    assert (tree["run"], tree["config"]["devices"]) == ("toy", 4)
    assert tree["total"]["price"] == pytest.approx(2.5 * tree["total"]["device_hours"])
    assert {stage["stage"]: stage["tokens"] for stage in tree["stages"]}["train/clm-seed0"] == 2560


def test_a_long_name_of_an_arm_cuts_no_number_short(run, rho, tmp_path):
    run()
    name = "an-arm-" + 80 * "x"
    code, out, _ = rho("plan", tmp_path / "run.yaml", "--set", f"train.arms.{name}={{}}")
    assert code == 0 and f"train/{name}-seed0" in out and "…" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--throughput", "100"], "--throughput: expected name=tokens a second"),
        (["--throughput", "train=fast"], "throughput.train: Input should be a valid number"),
        (["--throughput", "train=0"], "throughput.train: Input should be greater than 0"),
        (["--mfu", "1.5"], "mfu: Input should be less than or equal to 1"),
        (["--devices", "0"], "devices: Input should be greater than or equal to 1"),
        (["--model", "missing.yaml"], "missing.yaml: not a model config"),
    ],
)
def test_a_wrong_option_is_named(run, rho, tmp_path, options, message):
    run()
    code, out, err = rho("plan", tmp_path / "run.yaml", *options)
    assert (code, out) == (1, "")
    assert message in err


def test_a_model_that_can_not_be_reached_is_given_as_its_config(rho, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RECIPES / "tinyllama-math.yaml"
    code, _, err = rho("plan", path)
    assert code == 1
    assert "TinyLlama-1.1B-intermediate-step-1431k-3T: its config can't be read" in err and "--model" in err
    assert rho("plan", path, "--model", RECIPES / "models" / "tinyllama-1.1b.yaml")[0] == 0
    assert not Path("runs").exists()  # nothing is built


def test_the_plans_in_the_documentation_are_what_the_commands_print(rho, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    shown: dict[str, list[str]] = {}
    for line in (root / "docs" / "full-scale.md").read_text().partition("\n$ ")[2].partition("\n```")[0].splitlines():
        if line.removeprefix("$ ").startswith("rho plan"):
            shown[line.removeprefix("$ ")] = []
        else:
            shown[list(shown)[-1]].append(line)
    assert len(shown) == 3
    for command, lines in shown.items():
        _, out, _ = rho(*command.split()[1:])
        assert [line.rstrip() for line in out.splitlines()] == lines
