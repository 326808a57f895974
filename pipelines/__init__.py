"""What spans the stages: the command line, the chain of a recipe, the audit."""

import sys


def main() -> None:
    """Entry point of ``mwm``: refuse to run on somebody else's package called ``shared``."""
    import shared

    if getattr(shared, "PRODUCT", None) != "mask-what-matters":
        print(
            "error[incompatible]: another distribution's package 'shared' is imported instead of mwm's\n"
            "hint: install mwm in a fresh virtual environment, or uninstall that distribution",
            file=sys.stderr,
        )
        sys.exit(5)
    from pipelines.cli import main as run

    run()
