"""Where the command line starts: help needs no more than this, everything else what takes long to import."""

from __future__ import annotations

import sys

from milora_lightning.cli.help import help_text


def main() -> None:
    """Run the command line; see ``python main.py --help``."""
    text = help_text(sys.argv[1:])
    if text is not None:
        print(text)
        return
    from milora_lightning.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
