"""`python -m launch` and the command `flowcache`. From the first line on, a signal ends it with a line and a status."""

from launch.ending import handle_signals


def main() -> None:
    """Run the command line of this process and exit."""
    handle_signals()
    from launch.cli import main as run

    run()


if __name__ == "__main__":
    main()
