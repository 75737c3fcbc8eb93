"""What a process of the pool runs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import torch
import transformers
import zoo_backend
from zoo_classes import ZooClass
from zoo_results import ClassResult
from zoo_worker import check_class


def check(entry: ZooClass, version: str, dtypes: Sequence[str], *, compiled: bool) -> ClassResult:
    """Check one class with one thread.

    Dynamo makes so many objects that Python's collector would take a good part of the time; the process is short.
    """
    gc.disable()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    return check_class(entry, zoo_backend.compiled if compiled else zoo_backend.pass_only, version, dtypes)
