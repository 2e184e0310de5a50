"""The command `qwenedit`, and `python -m qwenedit`."""

import sys

from qwenedit.cli.process import ended_by_interrupts, ignore_interrupts

__all__ = ["main"]


def main() -> int:
    """Run the command of this process; returns its exit status."""
    with ended_by_interrupts():
        from qwenedit.cli.options import main as run
    try:
        return run()
    finally:
        ignore_interrupts()


if __name__ == "__main__":
    sys.exit(main())
