"""`python -m fxcalib`: the command line."""

from fxcalib.cli import main

main()
