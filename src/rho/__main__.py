"""`python -m rho`, and what `accelerate launch -m rho` starts: the `rho` command."""

from rho.cli import main

main()
