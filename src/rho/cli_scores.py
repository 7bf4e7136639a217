"""`rho scores`: look into score stores. As in `rho.cli`, heavy modules are imported inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rho.command import Command, CorpusFolder
from rho.errors import ConfigError

scores_app = typer.Typer(no_args_is_help=True, help="Look into score stores.")
Store = Annotated[Path, typer.Argument(help="Folder that `rho score` wrote.")]


@scores_app.command("ls", cls=Command)
def scores_ls(folder: Annotated[Path, typer.Argument(help="Where to look, this folder and below.")]) -> None:
    """The stores in a folder, a JSON line each."""
    from rho.store import ScoreStore
    from rho.tables import stores_in, summary

    for store in stores_in(folder):
        print(json.dumps(summary(ScoreStore(store))))


@scores_app.command("show", cls=Command)
def scores_show(
    store: Store, corpus: CorpusFolder, block: Annotated[int, typer.Option(help="Its number, from 0.")] = 0
) -> None:
    """One block, a line a token: position, loss, entropy, text."""
    from rho.corpus import Corpus
    from rho.store import ScoreStore
    from rho.tables import token_rows

    scores, text = ScoreStore(store), Corpus(corpus)
    scores.check_corpus(text)
    if not 0 <= block < len(scores):
        raise ConfigError(f"--block: expected 0 to {len(scores) - 1}, found {block}.")
    rows = token_rows(scores, text, block)
    for row in zip(rows["position"], rows["ref_loss"], rows["ref_entropy"], rows["text"], strict=True):
        print("{:5d} {:9.4f} {:9.4f}  {!r}".format(*row))  # repr: no escape sequence of a text reaches the terminal


@scores_app.command("export", cls=Command)
def scores_export(
    store: Store, corpus: CorpusFolder, out: Annotated[Path, typer.Option(help="The Parquet file to write.")]
) -> None:
    """Parquet with one row a token."""
    from rho.corpus import Corpus
    from rho.store import ScoreStore
    from rho.tables import export

    print(f"{export(ScoreStore(store), Corpus(corpus), out):,} rows in {out}")
