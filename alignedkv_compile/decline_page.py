"""``docs/declined.md``: what each kind of reason for declining a site means, and what a user can do."""

from __future__ import annotations

import sys
from pathlib import Path

from .reasons import Reason

_HEAD = """\
# Why a site was declined

`alignedkv_compile.report()` has a line for each attention call over a KV cache. One that was not rewritten runs as stock
PyTorch runs it, and its line ends with what was met and, in brackets, one of these kinds. `strict=True` raises instead. This
page is generated from `alignedkv_compile/reasons.py` (`make docs`).
"""


def render() -> str:
    """The page as Markdown."""
    sections = [f"## {reason.value}\n\n{reason.meaning}\n\n*What to do:* {reason.remedy}\n" for reason in Reason]
    return "\n".join([_HEAD, *sections])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
