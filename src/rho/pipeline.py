"""`rho run`: every stage of a config, in order, in one run directory; what is fresh is left alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from rho.config import RunConfig, StageName, save_config
from rho.corpus import Corpus, build_corpus
from rho.distributed import rank, ranks
from rho.dynamics import DynamicsConfig, follow
from rho.errors import ConfigError
from rho.evaluate import Checkpoint, EvaluateConfig, Exploration, checkpoints_of, evaluate, finished
from rho.models import ModelConfig, make_model
from rho.progress import say
from rho.references.model import load_reference, mean_loss
from rho.report import write_report
from rho.report.data import CONFIG, reference_folder
from rho.runs import MANIFEST, Manifest, hash_file, is_made_from, make_folder
from rho.score import ScoreConfig, Source, score_corpus
from rho.selection import Selector
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer, train_tokenizer
from rho.train import TrainConfig, check_reference, compare_reference, train

DEMO = Path(str(files("rho") / "recipes" / "demo.yaml"))


TOGETHER = ("reference", "train")  # what several processes of one launch do together


def run(config: RunConfig, folder: str | os.PathLike[str] | None = None, only: Sequence[str] = ()) -> Path:
    """Run every stage of `config` that is not fresh; return the report's page, or the run directory if not made.

    Under `torchrun` or `accelerate launch` every process calls it, with `only` the stages that they do together.

    Args:
        config: the whole run.
        folder: the run directory, `runs/<name>` unless given.
        only: the stages to run, by kind or folder (`RunConfig.stages`); all unless given.

    Raises:
        ConfigError: no such stage, or several processes for a stage that one does.
    """
    stages = config.stages(only)
    alone = [stage.folder for stage in stages if stage.kind not in TOGETHER]
    if ranks() > 1 and alone:
        raise ConfigError(
            f"{ranks()} processes were started; {alone[0]} is for one. Run {', '.join(alone)} without a launcher, and "
            "the others in one with --only."
        )
    pipeline = Pipeline(config, Path(folder) if folder is not None else Path("runs") / config.name)
    pipeline.begin()
    for stage in stages:
        pipeline.do(stage)
    return pipeline.page if stages[-1].kind == "report" else pipeline.folder


class Pipeline:
    """The stages of one run; each method runs one, reading what the earlier ones wrote.

    Args:
        config: the whole run.
        folder: the run directory.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.page = folder / "report" / "index.html"

    def do(self, stage: StageName) -> None:
        """Run one stage."""
        match stage.kind:
            case "corpus":
                self.corpora()
            case "reference":
                self.reference(stage.name)
            case "scores":
                self.scores(stage.name)
            case "train":
                self.check_references()
                self.train(stage.name, stage.seed)
            case "evaluate":
                self.evaluate()
            case "dynamics":
                self.dynamics()
            case "report":
                self.report()

    def begin(self) -> None:
        """Make the run directory. The config is there from the start, so that a run halfway can be reported."""
        make_folder(self.folder)
        if rank() == 0 and not (self.folder / CONFIG).exists():
            save_config(self.config, self.folder / CONFIG)

    def corpora(self) -> None:
        """The tokenizer, where one is trained, and every corpus."""
        config = self.config.tokenizer
        path = config.path
        if config.vocab_size is not None:
            corpora = [self.config.corpora[name] for name in config.corpora]
            pairs = [(part.source, part.text_field or corpus.text_field) for corpus in corpora for part in corpus.parts]
            train_tokenizer(
                [source for source, _ in pairs],
                config.vocab_size,
                self.folder / "tokenizer",
                [text_field for _, text_field in pairs],
                config.max_characters,
                any(corpus.skip_bad_records for corpus in corpora),
            )
            path = str(self.folder / "tokenizer" / "tokenizer")
        tokenizer = Tokenizer.load(str(path), config.eos)
        for name, corpus in self.config.corpora.items():
            build_corpus(corpus, tokenizer, self.corpus_folder(name))
        for name, reference in self.config.references.items():
            if reference.corpus is not None and reference.tokenizer is not None:
                curated = self.config.corpora[reference.corpus]
                build_corpus(curated, Tokenizer.load(reference.tokenizer), self.own_corpus_folder(name))
        self.sets()  # an empty one is an error now, not after the training

    def sets(self) -> dict[str, Corpus]:
        """The held-out sets, by name."""
        return {name: Corpus(self.corpus_folder(name), "validation") for name in self.config.evaluate.sets}

    def corpus_folder(self, name: str) -> Path:
        """Where a corpus is."""
        return self.folder / "corpus" / name

    def own_corpus_folder(self, name: str) -> Path:
        """The curated text in the tokens of a reference that has a tokenizer of its own."""
        return self.folder / "reference_corpus" / name

    def target(self) -> Corpus:
        """Held-out text of the wanted domain."""
        return Corpus(self.corpus_folder(self.config.target), "validation")

    def reference(self, name: str) -> None:
        """Train a reference, unless it is a finished or a served one."""
        config = self.config.references[name]
        start = config.model or self.config.model
        if config.after is not None:
            start = ModelConfig(path=str(self.train_folder(config.after, self.config.train.seeds[0])))
        own = config.tokenizer is not None
        curated = self.own_corpus_folder(name) if own else self.corpus_folder(str(config.corpus))
        settings = TrainConfig(seed=config.seed, arguments=config.arguments)
        train(settings, Corpus(curated), start, self.folder / reference_folder(name))

    def source(self, name: str) -> Source:
        """What scores: a reference trained here, a finished one, or one that is served."""
        config = self.config.references[name]
        return Source(config.api or self.reference_model(name), config.tokenizer)

    def reference_model(self, name: str) -> ModelConfig:
        """A reference that is a model here."""
        return ModelConfig(path=self.config.references[name].path or str(self.folder / reference_folder(name)))

    def score_config(self) -> ScoreConfig:
        """How references read."""
        return ScoreConfig(**self.config.score.model_dump(exclude={"engine", "workers"}))

    def scores(self, name: str) -> None:
        """Score the noisy corpus by a reference."""
        config, source = self.config.score, self.source(name)
        score_corpus(
            self.score_config(),
            Corpus(self.corpus_folder(self.config.corpus)),
            source.reference,
            self.scores_folder(name),
            self.target(),
            source.tokenizer,
            config.engine,
            config.workers,
        )

    def scores_folder(self, name: str) -> Path:
        """Where a reference's scores are."""
        return self.folder / "scores" / name

    def check_references(self) -> None:
        """Before anything is trained: a weak reference should not show only when the plain arm is done.

        Of several processes each would need the device for it; and what comes `after` an arm is not there yet.
        """
        config, seed = self.config.train, self.config.train.seeds[0]
        if ranks() > 1 or any(one.after for one in self.config.references.values()):
            return
        if any(self.train_folder(arm, seed).exists() for seed in config.seeds for arm in config.arms):
            return
        starting = [arm for arm, section in config.arms.items() if section.after is None]  # from the run's model
        names = {n for arm in starting for n in config.arm(arm, seed).judged(self.config.references_of(arm))}
        target = self.target()
        model = make_model(self.config.model, target.vocab_size, seed)
        for name in sorted(names):
            if self.config.references[name].online:
                loss = mean_loss(load_reference(self.reference_model(name), target), target).nats_per_token
                compare_reference(model, loss, target, config.allow_weak_reference)
            else:
                check_reference(model, ScoreStore(self.scores_folder(name)), target, config.allow_weak_reference)

    def train_folder(self, arm: str, seed: int) -> Path:
        """Where a training is."""
        return self.folder / "train" / f"{arm}-seed{seed}"

    def train(self, arm: str, seed: int) -> None:
        """Train an arm with one seed, after the arm that it goes on after."""
        config, section, names = self.config.train, self.config.train.arms[arm], self.config.references_of(arm)
        online = any(self.config.references[name].online for name in names)
        start = self.config.model
        if section.after is not None:
            self.train(section.after, seed)
            start = ModelConfig(path=str(self.train_folder(section.after, seed)))
        train(
            config.arm(arm, seed),
            Corpus(self.corpus_folder(section.corpus or self.config.corpus)),
            start,
            self.train_folder(arm, seed),
            {} if online else {name: ScoreStore(self.scores_folder(name)) for name in names},
            self.target(),
            config.allow_weak_reference,
            self.reference_model(names[0]) if online else None,
        )

    def evaluate(self) -> None:
        """Each reference, then every checkpoint of every arm and seed, each in a folder of its own.

        Of a reference that is served, or has another tokenizer, the loss on the target is known, from its store.
        """
        config = self.config.evaluate
        sets = self.sets()
        settings = EvaluateConfig(**config.model_dump(exclude={"sets", "explore"}))
        for name in self.config.references:
            source = self.source(name)
            label = reference_folder(name)
            whole = self.config.score.context is None  # one that is read in windows may not read more
            if isinstance(source.reference, ModelConfig) and source.tokenizer is None and whole:
                model = finished(str(source.reference.path), label)
                evaluate(settings, [model], sets, self.folder / "evaluate" / label)
        for seed in self.config.train.seeds:
            for arm in self.config.train.arms:
                folder = self.train_folder(arm, seed)
                explore = self.exploration(config.explore, arm, seed) if config.explore is not None else None
                evaluate(settings, self.checkpoints(arm, seed), sets, self.folder / "evaluate" / folder.name, explore)

    def checkpoints(self, arm: str, seed: int) -> list[Checkpoint]:
        """Those of a finished training, with tokens counted from the beginning of the first arm that it goes on after.

        What an arm was given before its own first step counts where arms are compared.
        """
        found = checkpoints_of(self.train_folder(arm, seed), arm)
        after = self.config.train.arms[arm].after
        if after is None:
            return found
        before = self.checkpoints(after, seed)[-1]
        return [
            replace(
                one,
                tokens_seen=(before.tokens_seen or 0) + (one.tokens_seen or 0),
                tokens_selected=(before.tokens_selected or 0) + (one.tokens_selected or 0),
            )
            for one in found
        ]

    def exploration(self, name: str, arm: str, seed: int) -> Exploration:
        """The held-out split of the corpus `name`, with the references and the selection of an arm."""
        text = Corpus(self.corpus_folder(name), "validation")
        names = self.config.references_of(arm)
        selection = self.config.train.arm(arm, seed)
        # What a history picked can't be told from a checkpoint's weights: shown beside the references, as a plain arm.
        selector = selection.selector if names else Selector()
        used = {reference: self.source(reference) for reference in names or self.config.references}
        how = selection.references
        return Exploration(text, used, selector, how.combine, how.weights, self.score_config())

    def dynamics(self) -> None:
        """Single tokens over the checkpoints of every arm asked for, and what its selection would pick of them."""
        config = self.config.dynamics
        if config is None:
            return
        settings = DynamicsConfig(**config.model_dump(exclude={"set", "arms"}))
        for seed in self.config.train.seeds:
            for arm in config.arms or self.config.train.arms:
                folder = self.train_folder(arm, seed)
                explore = self.exploration(config.set, arm, seed)
                selects = explore if explore.selector.selective else None
                models = self.checkpoints(arm, seed)
                if len(models) < 2:
                    say(f"dynamics {folder.name}: left out, it needs two checkpoints or more: lower its save_steps")
                    continue
                follow(settings, models, explore.corpus, self.folder / "dynamics" / folder.name, selects)

    def report(self) -> None:
        """The page, made anew if any stage's output is new."""
        page = self.page
        inputs = {str(path.parent.relative_to(self.folder)): hash_file(path) for path in self.manifests()}
        made = Manifest("report", self.config.model_dump(mode="json"), inputs)
        if page.is_file() and is_made_from(page.parent, made):
            say(f"every stage in {self.folder} is fresh: nothing to do. Report: {page}")
            return
        save_config(self.config, self.folder / CONFIG)
        write_report(self.folder)
        made.status = "complete"
        made.write(page.parent)
        say(f"report: {page}")

    def manifests(self) -> list[Path]:
        """Those of every stage."""
        found = sorted(self.folder.rglob(MANIFEST))
        return [path for path in found if path.parent != self.folder / "report"]
