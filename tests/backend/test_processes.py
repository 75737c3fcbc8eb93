"""Fresh processes: the backend by its name alone, Inductor's caches across processes, and TORCH_LOGS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alignedkv_compile
from alignedkv_compile import lowering, passes

STEP = """
import json, sys, torch
import torch.nn.functional as F
assert "alignedkv_compile" not in sys.modules or {imported}

def step(query, key, value, keys, values, positions, mask):
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

torch.manual_seed(0)
compiled = torch.compile(step, backend="alignedkv", fullgraph=True, options={options})
keys, values = torch.zeros(1, 2, 96, 16), torch.zeros(1, 2, 96, 16)
mask = (torch.arange(96) <= 3)[None, None, None]
args = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), keys, values, torch.tensor([3]), mask
with torch.no_grad():
    output = compiled(*args)
    torch.testing.assert_close(output, step(*args), rtol=1e-5, atol=1e-5)
torch.compiler.save_cache_artifacts()
from torch._dynamo.utils import counters
from alignedkv_compile import report
print(json.dumps(dict(counters["aot_autograd"]) | dict(counters["inductor"]) | dict(rewritten=report().rewritten)))
"""


def run(
    cache: Path, options: str = "{'strict': True, 'tolerance': 0.0}", imported: bool = False, **environment: str
) -> tuple[dict[str, int], str]:
    """Run the step in a new process; its counters and what it wrote to stderr."""
    result = subprocess.run(
        [sys.executable, "-c", STEP.replace("{options}", options).replace("{imported}", str(imported))],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counts: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    assert counts["rewritten"] == 1
    return counts, result.stderr


@pytest.mark.slow
def test_the_name_is_enough_and_caches_hit_until_an_option_or_a_template_changes(tmp_path: Path) -> None:
    """One test, since each step is a process and they build on one another."""
    package = copy_of_the_package(tmp_path / "copy")
    cache, path = tmp_path / "cache", str(tmp_path / "copy")
    first, _ = run(cache, PYTHONPATH=path)
    assert first["autograd_cache_miss"] == 1
    assert first["fxgraph_cache_miss"] == 1

    second, _ = run(cache, PYTHONPATH=path)
    assert second["autograd_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second

    other_option, _ = run(cache, "{'strict': True, 'tolerance': 0.0, 'min_context': 7}", PYTHONPATH=path)
    assert "autograd_cache_hit" not in other_option
    assert other_option["fxgraph_cache_miss"] == 1

    template = min((package / "lowering" / "templates").glob("*.jinja"))
    template.write_text(template.read_text() + "\n")
    edited, _ = run(cache, PYTHONPATH=path)
    assert "autograd_cache_hit" not in edited
    assert edited["fxgraph_cache_miss"] == 1


@pytest.mark.slow
def test_precompiled_graphs_of_an_earlier_process_do_not_pass_by_the_runtime(tmp_path: Path) -> None:
    """A rewritten graph called in place of the whole backend would lack its planes."""
    for _ in range(2):
        run(tmp_path / "cache", "{'tolerance': 0.0, 'share_layers': False}", TORCH_CACHING_PRECOMPILE="1")


def copy_of_the_package(folder: Path) -> Path:
    """The package's sources in one folder, which PYTHONPATH puts before the installed one."""
    package = folder / "alignedkv_compile"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(alignedkv_compile.__file__).parent, package, ignore=ignore)
    for part in (lowering, passes):
        source = Path(str(part.__file__)).parent
        shutil.copytree(source, package / source.name, ignore=ignore, dirs_exist_ok=True)
    return package


def test_torch_logs_shows_the_decisions(tmp_path: Path) -> None:
    # TORCH_LOGS imports the package while torch itself is being imported
    _, log = run(tmp_path / "cache", imported=True, TORCH_LOGS="+alignedkv_compile")
    assert "site 0: scaled_dot_product_attention" in log
    assert "rewritten graph" in log
    assert "torch.ops.alignedkv.aligned_read_attention" in log


def test_the_entry_point_names_the_backend() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="torch_dynamo_backends", name="alignedkv")
    assert entry.load() is alignedkv_compile.alignedkv


def test_importing_the_package_is_light() -> None:
    heavy = ("transformers", "rich", "torch._inductor.compile_fx")
    code = f"import sys, alignedkv_compile; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
