"""Docstrings here are laid out by hand, arguments in columns: the site shows them as they are written."""

from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Fences every docstring, which Markdown would otherwise run together."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and not obj.docstring.value.startswith("```"):
            obj.docstring.value = f"```text\n{obj.docstring.value}\n```"
