"""The `rho` command: one subcommand a stage. No logic: each builds a config and calls the stage's function.

Heavy modules are imported inside the commands, so that `rho --help` answers at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rho.cli_scores import scores_app
from rho.command import Command, Commands, CorpusFolder
from rho.errors import ConfigError, DataError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Selective Language Modeling (Rho-1): train a language model on the tokens that matter.",
)
app.add_typer(scores_app, name="scores")

Out = Annotated[Path, typer.Option(help="Output folder: new, or the same one again to go on.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/NAME unless given.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key.of.it=value: override a setting of the config.")]
Arguments = Annotated[
    list[str] | None, typer.Option("--set", help="name=value: a field of transformers.TrainingArguments.")
]
Target = Annotated[
    Path | None,
    typer.Option(help="Corpus whose validation split is the wanted domain: a reference must be better on it."),
]
ModelPath = Annotated[
    str,
    typer.Option(help="Model folder or Hugging Face name, or YAML/JSON file of a transformers config."),
]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text.")]
SkipBadRecords = Annotated[bool, typer.Option(help="Count and list unreadable records, don't stop.")]
Seed = Annotated[int, typer.Option(help="Seed of new weights, data order and random selection.")]


@app.command(cls=Command)
def demo(out: RunFolder = None, overrides: Set = None) -> None:
    """The whole pipeline on text that is on this machine already; ends in a report."""
    from rho.pipeline import DEMO

    run(DEMO, out, overrides=overrides)


@app.command(cls=Command)
def run(
    config: Annotated[Path, typer.Argument(help="The run's YAML, for instance recipes/demo.yaml.")],
    out: RunFolder = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A stage: corpus, reference, scores, train, train/ARM-seedN ... (repeat).")
    ] = None,
    overrides: Set = None,
) -> None:
    """Every stage of a config, in order; what is fresh is left alone, what was interrupted goes on."""
    from rho import pipeline
    from rho.config import load_config

    print(pipeline.run(load_config(config, overrides or []), out, only or []))


@app.command(cls=Command)
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML.")],
    devices: Annotated[int, typer.Option(help="Accelerators that share each stage.")] = 1,
    device: Annotated[Literal["a100", "h100", "h200"], typer.Option(help="What they are.")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of their peak FLOP/s, where no throughput is known.")] = 0.3,
    throughput: Annotated[
        list[str] | None, typer.Option(help="STAGE=tokens a second of one device; reference, scores, train ...")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of one device for an hour.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Counted instead of the run's model: a folder, or its config as YAML or JSON.")
    ] = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Run directory that has begun: its sizes and speeds are taken.")
    ] = None,
    overrides: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What a run will cost: FLOPs, hours, money, disk. Nothing is built."""
    from rich.console import Console

    from rho import plan as stage
    from rho.config import load_config
    from rho.models import ModelConfig
    from rho.settings import validated

    rates = _named("--throughput", throughput or [], what="tokens a second")
    settings = {"devices": devices, "device": device, "mfu": mfu, "price": price, "throughput": rates}
    planned, run = validated(stage.PlanConfig, settings, "rho plan"), load_config(config, overrides or [])
    costs = stage.plan(planned, run, ModelConfig.parse(model) if model else None, run_folder)
    if as_json:
        print(stage.as_json(planned, run, costs))
    else:
        Console(width=1000, highlight=False).print(stage.table(planned, run, costs))  # no number cut short


@app.command(cls=Command)
def tokenizer(
    sources: Annotated[list[str], typer.Argument(help="Text: files, folders, hf:NAME, docstrings:PACKAGE ...")],
    out: Out,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 32_000,
    text_field: TextField = "text",
    skip_bad_records: SkipBadRecords = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from rho.tokenizer import train_tokenizer

    train_tokenizer(sources, vocab_size, out, [text_field], skip_bad_records=skip_bad_records)
    print(out / "tokenizer")


@app.command(cls=Command)
def corpus(
    sources: Annotated[list[str], typer.Argument(help="Text: files, folders, hf:NAME, docstrings:PACKAGE ...")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, folder, or Hugging Face name.")],
    out: Out,
    block_length: Annotated[int, typer.Option(help="Tokens in a block.")] = 1024,
    isolated: Annotated[bool, typer.Option(help="Documents in a block don't see each other.")] = False,
    heldout_fraction: Annotated[float, typer.Option(help="Share of documents for the validation split.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after the document that reaches this.")] = None,
    text_field: TextField = "text",
    prompt_field: Annotated[str | None, typer.Option(help="Instead: field of a prompt, not to be trained on.")] = None,
    completion_field: Annotated[str | None, typer.Option(help="With it: field of the answer, to be.")] = None,
    messages_field: Annotated[str | None, typer.Option(help="Instead: a chat; what the assistant says is.")] = None,
    eos: Annotated[str | None, typer.Option(help="The tokenizer's end-of-document token.")] = None,
    skip_bad_records: SkipBadRecords = False,
    seed: Annotated[int, typer.Option(help="Of the choice of held-out documents.")] = 0,
) -> None:
    """Tokenize text and pack it into blocks."""
    from rho.corpus import CorpusConfig, build_corpus
    from rho.settings import validated
    from rho.tokenizer import Tokenizer

    settings = {
        "sources": sources,
        "text_field": text_field,
        "prompt_field": prompt_field,
        "completion_field": completion_field,
        "messages_field": messages_field,
        "block_length": block_length,
        "isolated": isolated,
        "heldout_fraction": heldout_fraction,
        "max_tokens": max_tokens,
        "seed": seed,
        "skip_bad_records": skip_bad_records,
    }
    build_corpus(validated(CorpusConfig, settings, "rho corpus"), Tokenizer.load(tokenizer, eos), out)
    print(out)


@app.command(cls=Command)
def reference(corpus: CorpusFolder, model: ModelPath, out: Out, seed: Seed = 0, arguments: Arguments = None) -> None:
    """Train a reference: plain language modeling on a curated corpus."""
    train(corpus, model, out, seed=seed, arguments=arguments)


@app.command(cls=Command)
def score(
    corpus: CorpusFolder,
    reference: Annotated[
        str, typer.Option(help="The reference: folder or Hugging Face name; with --api the name it is served under.")
    ],
    out: Out,
    target: Target = None,
    api: Annotated[str | None, typer.Option(help="URL of a server that has the reference (key: RHO_API_KEY).")] = None,
    api_setting: Annotated[
        list[str] | None,
        typer.Option(help="name=value: another setting of rho.references.api.ApiConfig, such as kind=sglang."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored columns: float16 or float32.")] = "float16",
    precision: Annotated[str, typer.Option(help="Of the forward: float32 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Blocks a forward.")] = 8,
    reference_tokenizer: Annotated[
        str | None, typer.Option(help="The reference's own tokenizer: its losses are mapped onto the corpus's tokens.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens that the reference reads at once; else a block.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Of these, read again in the next window; else half.")] = None,
    entropy: Annotated[
        bool, typer.Option(help="Store the entropies too; most selections need the losses alone.")
    ] = True,
    compile: Annotated[bool, typer.Option(help="Compile the reference.")] = False,
    workers: Annotated[int, typer.Option(help="Processes: one for each accelerator, or sharing the CPU.")] = 1,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who runs the workers.")] = "local",
    task_index: Annotated[int, typer.Option(help="Of an array job whose tasks share --out: this one's number.")] = 0,
    num_tasks: Annotated[int, typer.Option(help="Of an array job: how many tasks.")] = 1,
) -> None:
    """Store the reference's loss and entropy of every token of a corpus."""
    from rho.corpus import Corpus
    from rho.models import ModelConfig
    from rho.references.api import ApiConfig
    from rho.score import ScoreConfig, score_corpus
    from rho.settings import assignments, validated

    settings = {"dtype": dtype, "precision": precision, "batch_size": batch_size}
    settings |= {"context": context, "overlap": overlap, "entropy": entropy, "compile": compile}
    config = validated(ScoreConfig, settings, "rho score")
    held_out = Corpus(target, "validation") if target else None
    task = (task_index, num_tasks)
    model: ModelConfig | ApiConfig = ModelConfig(path=reference)
    if api is not None:
        served = {"url": api, "model": reference, **assignments(api_setting or [], "--api-setting")}
        model = validated(ApiConfig, served, "rho score --api")
    score_corpus(config, Corpus(corpus), model, out, held_out, reference_tokenizer, engine, workers, task)
    print(out)


@app.command(cls=Command)
def train(
    corpus: CorpusFolder,
    model: ModelPath,
    out: Out,
    scores: Annotated[
        list[str] | None,
        typer.Option(help="Folder that `rho score` wrote; of several references, name=folder for each."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Instead of --scores: a model that scores each batch as it comes, every epoch.")
    ] = None,
    target: Target = None,
    ratio: Annotated[float, typer.Option(help="Share of tokens to train on; 1.0 is plain CLM.")] = 1.0,
    select: Annotated[
        str, typer.Option(help="What ranks the tokens: excess, retrospective, loss, ref_loss, ref_entropy or random.")
    ] = "excess",
    scope: Annotated[
        str, typer.Option(help="Tokens ranked together: sequence, batch, step, running or dataset.")
    ] = "sequence",
    selection: Annotated[
        list[str] | None,
        typer.Option(help="key.of.it=value: any other setting of rho.train.TrainConfig, such as retention=0.1."),
    ] = None,
    on_nonfinite: Annotated[
        str, typer.Option(help="At a loss or gradient that is not finite: stop, or skip=N (leave out up to N steps).")
    ] = "stop",
    seed: Seed = 0,
    allow_weak_reference: Annotated[bool, typer.Option(help="Go on if the reference is no better.")] = False,
    arguments: Arguments = None,
) -> None:
    """Train a model on the selected tokens."""
    from rho.corpus import Corpus
    from rho.models import ModelConfig
    from rho.settings import assignments, validated
    from rho.store import ScoreStore
    from rho.train import TrainConfig
    from rho.train import train as stage

    settings: dict[str, Any] = {"score": select, "ratio": ratio, "scope": scope, "seed": seed}
    settings |= {"skip_nonfinite": _steps_to_skip(on_nonfinite), "arguments": assignments(arguments or [])}
    settings |= assignments(selection or [], "--selection")
    config = validated(TrainConfig, settings, "rho train")
    stage(
        config,
        Corpus(corpus),
        ModelConfig.parse(model),
        out,
        {name: ScoreStore(folder) for name, folder in _named("--scores", scores or [], only="reference").items()},
        Corpus(target, "validation") if target else None,
        allow_weak_reference,
        ModelConfig(path=reference) if reference else None,
    )
    print(out / "model")


@app.command(cls=Command)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models or checkpoints: folders or Hugging Face names.")],
    out: Out,
    held_out: Annotated[
        list[str] | None, typer.Option(help="name=corpus folder, whose validation split is evaluated.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks, or questions, a forward.")] = 8,
    suite: Annotated[
        str | None, typer.Option(help="Benchmarks instead, by lm_eval: math, general or extra; of one model.")
    ] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with the suite's data; else the Hub's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task.")] = None,
    max_gen_toks: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For a suite: of a model that comes without.")] = None,
) -> None:
    """Loss and bits per byte of models on held-out sets, or a model's accuracy in a suite of benchmarks."""
    if (suite is None) == (not held_out):
        raise ConfigError("give either --held-out (losses) or --suite (benchmarks).")
    if suite is not None:
        from rho.settings import validated
        from rho.suites import SuiteConfig, evaluate_suite, table

        settings = {"suite": suite, "limit": limit, "max_gen_toks": max_gen_toks, "batch_size": batch_size}
        config = validated(SuiteConfig, settings, "rho evaluate --suite")
        print(table(evaluate_suite(config, models, out, task_data, tokenizer)))
        return
    from rho import evaluate as stage
    from rho.corpus import Corpus

    sets = {name: Corpus(folder, "validation") for name, folder in _named("--held-out", held_out or []).items()}
    entries = [stage.finished(model) for model in models]
    stage.evaluate(stage.EvaluateConfig(batch_size=batch_size), entries, sets, out)
    print((out / "losses.jsonl").read_text(), end="")


@app.command(cls=Command)
def tokens(
    text: Annotated[str | None, typer.Argument(help="A file, folder, hf:NAME ..., or - for standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face name; with --run, ARM-seedN.")] = None,
    reference: Annotated[str | None, typer.Option(help="What it is compared with, maybe of another tokenizer.")] = None,
    against: Annotated[str | None, typer.Option(help="A second model, shown beside the first.")] = None,
    against_reference: Annotated[str | None, typer.Option(help="A second reference, likewise.")] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Run directory, instead of text and models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page (HTML), and print none of the text.")] = None,
    colour: Annotated[
        Literal["excess", "loss", "reference", "rank", "dynamics", "difference"], typer.Option(help="What is coloured.")
    ] = "excess",
    ratio: Annotated[float, typer.Option(help="Share of each document's tokens that is selected.")] = 0.6,
    context: Annotated[int, typer.Option(help="Tokens that a model reads at once, at most.")] = 2048,
    max_tokens: Annotated[int, typer.Option(help="The text is cut after as many.")] = 10_000,
    precision: Annotated[str, typer.Option(help="Of the forward: float32 or bfloat16.")] = "float32",
    tokenizer: Annotated[str | None, typer.Option(help="The model's tokenizer, if it comes without one.")] = None,
    text_field: TextField = "text",
) -> None:
    """A text token by token: what a model could still learn of it, by a reference that has."""
    from rho.explore import ExploreConfig, explore, pairs_of
    from rho.report.explorer import rows_of_run, write_page
    from rho.report.terminal import show
    from rho.settings import validated

    if run_folder is not None and text is None and reference is None:
        rows = rows_of_run(run_folder, [name for name in (model, against) if name])
    elif run_folder is not None or text is None or model is None or reference is None:
        raise ConfigError("rho tokens: expected either a text, --model and --reference, or --run and no text.")
    else:
        settings = {"ratio": ratio, "context": context, "max_tokens": max_tokens, "precision": precision}
        config = validated(ExploreConfig, settings, "rho tokens")
        pairs = pairs_of(model, reference, against, against_reference)
        rows = explore(config, text, pairs, text_field, tokenizer)
    if out is None:
        show(rows, colour)
    else:
        write_page(rows, Path(text or run_folder or "").name, out)
        print(out)


@app.command(cls=Command)
def dynamics(
    models: Annotated[list[str], typer.Argument(help="A folder that `rho train` wrote, or checkpoints in order.")],
    held_out: Annotated[Path, typer.Option(help="Corpus folder, whose validation split is followed.")],
    out: Out,
    reference: Annotated[
        str | None, typer.Option(help="Also what the run's selection would pick, by this reference: folder or name.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the set, in whole blocks spread over it.")] = 320_000,
    threshold: Annotated[float, typer.Option(help="Nats of change that make a token L->H or H->L.")] = 0.2,
    accuracies: Annotated[
        Path | None,
        typer.Option(help="To be fitted by the loss of selected tokens: JSON {step: accuracy}, or a folder of suites."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks a forward.")] = 8,
) -> None:
    """Which tokens are learned, which never, which are noise: losses of single tokens over the checkpoints of a run."""
    from rho import dynamics as stage
    from rho.corpus import Corpus
    from rho.settings import validated
    from rho.trajectories import CLASSES

    settings = {"max_tokens": max_tokens, "threshold": threshold, "batch_size": batch_size}
    config, corpus = validated(stage.DynamicsConfig, settings, "rho dynamics"), Corpus(held_out, "validation")
    checkpoints = stage.checkpoints_in(models)
    explore = stage.selection_of(models, reference, corpus) if reference else None
    found = stage.read_accuracies(accuracies, checkpoints) if accuracies else None
    stage.follow(config, checkpoints, corpus, out, explore, found)
    classes = json.loads((out / "summary.json").read_bytes())["classes"]
    for name in CLASSES:
        print(f"{name}  {classes[name]['share']:6.1%}  {classes[name]['tokens']:9,} tokens")


@app.command(cls=Command)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `rho evaluate` wrote; the first's is the base.")],
) -> None:
    """Differences of the losses of evaluated models, with 95 % intervals (paired bootstrap over blocks)."""
    from rho import compare as stage

    print(stage.table(stage.compare(folders)))


@app.command(cls=Command)
def report(run_folder: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Make the report of a run directory."""
    from rho.report import write_report

    print(write_report(run_folder))


@app.command(cls=Command)
def verify(
    folders: Annotated[list[Path], typer.Argument(help="Run directories, or folders of single stages.")],
) -> None:
    """Read every byte that was written and compare it with the hashes recorded of it."""
    from rho.verify import verify as check

    damaged = 0
    for folder in folders:
        for stage, wrong in check(folder):
            print(f"{stage}: {'; '.join(wrong) if wrong else 'good'}")
            damaged += bool(wrong)
    if damaged:
        raise DataError(f"{damaged} folder(s) are not as they were written. Restore the files named or make them anew.")


@app.command(cls=Command)
def doctor(model: Annotated[str | None, typer.Option(help="Also examine this model.")] = None) -> None:
    """Which integrations work with what is installed here, which versions are tested, and why not."""
    from rho.doctor import examine, show

    show(examine(model))


def _named(option: str, values: list[str], only: str | None = None, what: str = "folder") -> dict[str, str]:
    """`["a=x", "b=y"]` as a mapping; a single value without a name gets the name `only`."""
    if only is not None and len(values) == 1 and "=" not in values[0]:
        return {only: values[0]}
    pairs = [value.partition("=") for value in values]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"{option}: expected name={what}, each name once, found {' '.join(values)}.")
    return {name: folder for name, _, folder in pairs}


def _steps_to_skip(on_nonfinite: str) -> int:
    what, _, number = on_nonfinite.partition("=")
    if on_nonfinite == "stop":
        return 0
    if what != "skip" or not number.isdecimal():
        raise ConfigError(f"--on-nonfinite: expected stop, or skip=N for up to N steps, found {on_nonfinite}.")
    return int(number)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
