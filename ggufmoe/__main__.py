"""``python -m ggufmoe`` is the command line."""

from ggufmoe.cli.app import main

if __name__ == "__main__":
    main()
