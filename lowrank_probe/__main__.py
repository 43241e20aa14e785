"""The command `probe`, and `python -m lowrank_probe`: light, so that Ctrl-C while the rest is imported is one line."""

from lowrank_probe import interrupts


def main() -> None:
    """Entry point of `probe`: imports the command line, then hands over to it."""
    with interrupts.ending_at_once():
        from lowrank_probe import cli
    cli.main()


if __name__ == "__main__":
    main()
