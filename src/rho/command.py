"""What every subcommand of `rho` does: it says something before it loads, and a user's mistake ends in a message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rho.errors import RhoError, Stopped
from rho.progress import say

CorpusFolder = Annotated[Path, typer.Option("--corpus", help="Folder that `rho corpus` wrote.")]


class Command(TyperCommand):
    """One subcommand; imports take seconds, so that it says something before them."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        say("rho: loading")
        return super().invoke(ctx)


class Commands(TyperGroup):
    """The subcommands; what a user causes ends in a message and an exit code, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the one asked for."""
        try:
            done = super().invoke(ctx)
        except Stopped as stopped:
            say(str(stopped))
            done = None
        except RhoError as error:
            say(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted. Nothing finished is lost: run the same command again to go on.")
            raise typer.Exit(130) from None
        except Exception as error:
            from rho.runs import refusal

            if (refused := refusal(error)) is None:
                raise
            say(f"error: {refused}")
            raise typer.Exit(1) from None
        if "RANK" in os.environ:  # of several processes, as their launchers say
            from rho.distributed import leave

            leave()
        return done
