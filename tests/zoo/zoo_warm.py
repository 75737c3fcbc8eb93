"""Importing this compiles a first model: processes that are forked afterwards inherit what Dynamo learns once per process.

That is a good part of the time that a class takes: tables of what to trace, sources of transformers' functions, meta kernels.
"""

from __future__ import annotations

import torch
import transformers
from zoo_backend import ZooBackend, stock
from zoo_classes import ZooClass
from zoo_decode import decode_compiled
from zoo_models import CACHES, tiny_model

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
with torch.no_grad():
    for _kind in CACHES:
        decode_compiled(tiny_model(ZooClass("LlamaForCausalLM", "llama", "causal")), _kind, ZooBackend({"": {}}, stock))
torch._dynamo.reset()
