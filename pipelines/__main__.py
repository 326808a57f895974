"""``python -m pipelines``: the command line where it is not installed."""

from pipelines import main

main()
