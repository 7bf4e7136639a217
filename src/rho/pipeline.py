"""`rho run`: every stage of a config, in order, in one run directory; what is fresh is left alone."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from rho.config import RunConfig, save_config
from rho.corpus import Corpus, build_corpus
from rho.dynamics import DynamicsConfig, follow
from rho.errors import ConfigError
from rho.evaluate import EvaluateConfig, Exploration, checkpoints_of, evaluate, finished
from rho.models import ModelConfig, make_model
from rho.progress import say
from rho.references.model import load_reference, mean_loss
from rho.report import write_report
from rho.report.data import CONFIG, reference_folder
from rho.runs import MANIFEST, Manifest, hash_file, is_made_from
from rho.score import ScoreConfig, Source, score_corpus
from rho.selection import Selector
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer, train_tokenizer
from rho.train import TrainConfig, check_reference, compare_reference, train

DEMO = Path(str(files("rho") / "recipes" / "demo.yaml"))


def run(config: RunConfig, folder: str | os.PathLike[str] | None = None) -> Path:
    """Run every stage of `config` that is not fresh and return the report's page.

    Args:
        config: the whole run.
        folder: the run directory, `runs/<name>` unless given.
    """
    pipeline = _Pipeline(config, Path(folder) if folder is not None else Path("runs") / config.name)
    pipeline.begin()
    pipeline.corpora()
    for name, reference in config.references.items():
        if reference.after is not None:
            pipeline.train(reference.after, config.train.seeds[0])
        pipeline.reference(name)
        if not reference.online:
            pipeline.scores(name)
    pipeline.check_references()
    for seed in config.train.seeds:
        for arm in config.train.arms:
            pipeline.train(arm, seed)
    pipeline.evaluate()
    pipeline.dynamics()
    return pipeline.report()


class _Pipeline:
    """The stages of one run; each method runs one, reading what the earlier ones wrote."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    def begin(self) -> None:
        """Make the run directory. The config is there from the start, so that a run halfway can be reported."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder}: the run directory can't be made ({error.strerror}).") from error
        if not (self.folder / CONFIG).exists():
            save_config(self.config, self.folder / CONFIG)

    def corpora(self) -> None:
        config = self.config.tokenizer
        path = config.path
        if config.vocab_size is not None:
            corpora = [self.config.corpora[name] for name in config.corpora]
            pairs = [(source, corpus.text_field) for corpus in corpora for source in corpus.sources]
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
        self.sets()  # an empty one is an error now, not after the training

    def sets(self) -> dict[str, Corpus]:
        """The held-out sets, by name."""
        return {name: Corpus(self.corpus_folder(name), "validation") for name in self.config.evaluate.sets}

    def corpus_folder(self, name: str) -> Path:
        return self.folder / "corpus" / name

    def target(self) -> Corpus:
        return Corpus(self.corpus_folder(self.config.target), "validation")

    def reference(self, name: str) -> None:
        config = self.config.references[name]
        if config.corpus is not None:
            start = config.model or self.config.model
            if config.after is not None:
                start = ModelConfig(path=str(self.train_folder(config.after, self.config.train.seeds[0])))
            curated = self.corpus_folder(config.corpus)
            if config.tokenizer is not None:
                curated = self.folder / "reference_corpus" / name
                build_corpus(self.config.corpora[config.corpus], Tokenizer.load(config.tokenizer), curated)
            settings = TrainConfig(seed=config.seed, arguments=config.arguments)
            train(settings, Corpus(curated), start, self.folder / reference_folder(name))

    def source(self, name: str) -> Source:
        """What scores: a reference trained here, a finished one, or one that is served."""
        config = self.config.references[name]
        return Source(config.api or self.reference_model(name), config.tokenizer)

    def reference_model(self, name: str) -> ModelConfig:
        return ModelConfig(path=self.config.references[name].path or str(self.folder / reference_folder(name)))

    def score_config(self) -> ScoreConfig:
        return ScoreConfig(**self.config.score.model_dump(exclude={"engine", "workers"}))

    def scores(self, name: str) -> None:
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
        return self.folder / "scores" / name

    def check_references(self) -> None:
        """Before anything is trained: a weak reference should not show only when the plain arm is done."""
        config, seed = self.config.train, self.config.train.seeds[0]
        if any(self.train_folder(arm, seed).exists() for seed in config.seeds for arm in config.arms):
            return
        names = {n for arm in config.arms for n in config.arm(arm, seed).judged(self.config.references_of(arm))}
        target = self.target()
        model = make_model(self.config.model, target.vocab_size, seed)
        for name in sorted(names):
            if self.config.references[name].online:
                loss = mean_loss(load_reference(self.reference_model(name), target), target).nats_per_token
                compare_reference(model, loss, target, config.allow_weak_reference)
            else:
                check_reference(model, ScoreStore(self.scores_folder(name)), target, config.allow_weak_reference)

    def train_folder(self, arm: str, seed: int) -> Path:
        return self.folder / "train" / f"{arm}-seed{seed}"

    def train(self, arm: str, seed: int) -> None:
        config, names = self.config.train, self.config.references_of(arm)
        online = any(self.config.references[name].online for name in names)
        train(
            config.arm(arm, seed),
            Corpus(self.corpus_folder(self.config.corpus)),
            self.config.model,
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
                evaluate(settings, checkpoints_of(folder, arm), sets, self.folder / "evaluate" / folder.name, explore)

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
                models = checkpoints_of(folder, arm)
                if len(models) < 2:
                    say(f"dynamics {folder.name}: left out, it needs two checkpoints or more: lower its save_steps")
                    continue
                follow(settings, models, explore.corpus, self.folder / "dynamics" / folder.name, selects)

    def report(self) -> Path:
        """The page, made anew if any stage's output is new."""
        page = self.folder / "report" / "index.html"
        inputs = {str(path.parent.relative_to(self.folder)): hash_file(path) for path in self.manifests()}
        made = Manifest("report", self.config.model_dump(mode="json"), inputs)
        if page.is_file() and is_made_from(page.parent, made):
            say(f"every stage in {self.folder} is fresh: nothing to do. Report: {page}")
            return page
        save_config(self.config, self.folder / CONFIG)
        write_report(self.folder)
        made.status = "complete"
        made.write(page.parent)
        say(f"report: {page}")
        return page

    def manifests(self) -> list[Path]:
        found = sorted(self.folder.rglob(MANIFEST))
        return [path for path in found if path.parent != self.folder / "report"]
