"""The command line, also as ``python -m ggufmoe``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line also while its modules are being imported."""
    try:
        from ggufmoe.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        sys.exit(130)
    app.main()


if __name__ == "__main__":
    main()
