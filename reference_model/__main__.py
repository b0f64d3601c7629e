"""The command `metris`, and what to say where its packages are missing."""

import sys


def main() -> int:
    """Run the command line; exit code 2 where only the library was installed."""
    try:
        from reference_model.cli import main as run
    except ModuleNotFoundError as error:
        print(f"metris: error: needs {error.name}; pip install 'metris-blocks[reference]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
