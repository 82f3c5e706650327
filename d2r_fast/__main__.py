"""The command `d2r`, also `python -m d2r_fast`. Without the packages of the training extra it says how to get them."""

import sys


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        from d2r_fast import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "d2r_fast":
            raise
        print(
            f"d2r needs the training extra ({error.name} is not installed): pip install 'd2r_fast[train]'",
            file=sys.stderr,
        )
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
