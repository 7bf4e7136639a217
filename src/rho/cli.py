"""The `rho` command: one subcommand a stage. No logic: each builds a config and calls the stage's function."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rho.errors import RhoError
from rho.progress import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Selective Language Modeling (Rho-1): train a language model on the tokens that matter.",
)

Out = Annotated[Path, typer.Option("--out", help="Output folder.")]
Set = Annotated[list[str], typer.Option("--set", help="key=value: any further setting of the stage, by its name.")]


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory. [default: runs/demo]")] = None,
    overrides: Set = [],
) -> None:
    """The whole pipeline on text that is on this machine already; ends in a report."""
    from rho.pipeline import DEMO

    run(DEMO, out, overrides)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's YAML, for instance recipes/demo.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Run directory. [default: runs/<name>]")] = None,
    overrides: Set = [],
) -> None:
    """Every stage of a config, in order; what is fresh is left alone, what was interrupted goes on."""
    say("rho: starting")
    from rho import config as configs
    from rho import pipeline

    print(pipeline.run(configs.load_config(config, overrides), out))


def main() -> None:
    """Run the command line; a user's error is printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except RhoError as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted. Nothing finished is lost: run the same command again to go on.")
        sys.exit(130)
