"""Arguments that are looked at before tyro, or without it."""


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments."""
    for i, arg in enumerate(args):
        if arg == name:
            if i + 1 == len(args):
                raise ValueError(f"{name}: expected a value behind it")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(name + "="):
            return arg.partition("=")[2], args[:i] + args[i + 1 :]
    return None, args


def require_no_arguments(args: list[str]) -> None:
    """ValueError if there are any."""
    if args:
        raise ValueError(f"expected no further argument, got {' '.join(args)}")
