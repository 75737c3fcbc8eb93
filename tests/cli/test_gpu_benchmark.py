"""The GPU benchmark without a GPU: it runs from a bare checkout, and what it computes from times is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For ``python -S``: every installed package but this one, and nothing that an editable install left."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith(("alignedkv", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def bare_python(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_source_tree_makes_a_checkout_importable(bare_environment: dict[str, str], tmp_path: Path):
    hidden = bare_python(bare_environment, tmp_path, "-c", "import torch, alignedkv_compile")
    assert "No module named 'alignedkv_compile'" in hidden.stderr
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import source_tree, torch\n"
        "source_tree.register_backend(); source_tree.register_backend()\n"
        "from alignedkv_compile import lowering, passes\n"
        "print('alignedkv' in torch.compiler.list_backends())\n"
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] in ('passes', 'lowering')))\n"
        "print(lowering.__file__, passes.__file__)"
    )
    found = bare_python(bare_environment, tmp_path, "-c", program)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["True", str(ROOT / "lowering/__init__.py"), str(ROOT / "passes/__init__.py")]


def not_run(entry: dict[str, Any]) -> dict[str, str]:
    return {name: found["not_run"] for name, found in entry["variants"].items() if "not_run" in found}


CUDA_ONLY = dict.fromkeys(("sdpa cudnn", "sdpa flash", "sdpa cudnn packed", "sdpa flash packed", "read only"), "no CUDA")


def check_results(data: dict[str, Any]) -> None:
    """Every section of a run on a CPU is there and right."""
    assert len(data["operator"]) == 2
    for entry in data["operator"]:
        assert not_run(entry) == CUDA_ONLY
        assert 0.2 < entry["bytes_share"] < 1.0  # the aligned path ran
        for name in ("aligned", "stream", "sdpa", "flex_attention"):
            found = entry["variants"][name]
            assert 0 < found["min_us"] <= found["median_us"] <= found["max_us"]
            assert 0 < found["mean_error"] <= found["error"] < 4
            assert not found["wrong"]
        assert entry["variants"]["aligned"]["kernels"]
    assert [entry["batch"] for entry in data["model"]] == [1, 8]
    for entry in data["model"]:
        assert not_run(entry) == {"torch.compile, SDPA enable_gqa": "no CUDA"}
        assert entry["effective_keys"]["mean"] == pytest.approx(32, rel=0.6)
        assert entry["variants"]["alignedkv"]["median_ms"] > 0
        assert not any(found["wrong"] for found in entry["variants"].values())


@pytest.mark.slow
def test_dry_run_walks_every_section_of_a_bare_checkout(bare_environment: dict[str, str], tmp_path: Path):
    arguments = (str(BENCHMARKS / "gpu.py"), "--dry-run", "--repeats", "2", "--tokens", "2", "--json", "gpu.json")
    result = bare_python(bare_environment, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    check_results(json.loads((tmp_path / "gpu.json").read_text()))
    assert "not run: sdpa cudnn: no CUDA" in result.stdout


@pytest.mark.slow
def test_run_on_a_cpu_compiles_and_rewrites(bare_environment: dict[str, str], tmp_path: Path):
    arguments = (str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--repeats", "2", "--tokens", "2", "--json", "gpu.json")
    result = bare_python(bare_environment, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "gpu.json").read_text())
    check_results(data)
    for entry in data["model"]:
        assert "2 rewritten" in entry["variants"]["alignedkv"]["report"]
        assert entry["variants"]["alignedkv"]["difference"] > 0


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", str(tmp_path / "gpu.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "needs a CUDA or ROCm GPU" in result.stderr


def test_what_no_time_is_left_for_is_not_run(tmp_path: Path):
    import gpu

    gpu.main(dry_run=True, seconds=0.0, json_path=tmp_path / "gpu.json")
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert [entry["not_run"] for entry in data["operator"]] == ["no time left"] * 2
    assert data["model_not_run"] == "no time left"


def test_sweep_walks_its_cells(tmp_path: Path):
    import gpu_sweep

    gpu_sweep.main(pairs="8", contexts="128,192", repeats=1, dry_run=True, json_path=tmp_path / "sweep.json")
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["context"] for entry in data["sweep"]] == [128, 192]
    assert set(data["break_even"]) == {"stream", "sdpa"}
    assert data["break_even"]["sdpa"] == {"8": None}  # nothing to compare with on a CPU


def test_break_even_is_the_start_of_an_unbroken_run():
    from gpu_sweep import break_even

    def cell(pairs: int, context: int, aligned: float, stream: float, wrong: bool = False) -> dict[str, Any]:
        times = {"aligned": {"median_us": aligned, "wrong": wrong}, "stream": {"median_us": stream, "wrong": False}}
        return {"pairs": pairs, "context": context, "variants": times}

    cells = [
        *(cell(8, context, 10.0, stream) for context, stream in ((1, 11.0), (2, 9.0), (4, 12.0), (8, 20.0))),
        *(cell(32, context, 10.0, stream) for context, stream in ((1, 11.0), (2, 9.0))),
        cell(64, 1, 1.0, 2.0),
        cell(64, 2, 1.0, 2.0, wrong=True),
        {"pairs": 256, "context": 1, "variants": {}, "not_run": "no time left"},
    ]
    assert break_even(cells, "stream") == {"8": 4, "32": None, "64": None, "256": None}


class FakeCuda:
    """Records what the timing code asks of ``torch.cuda``, in order; replays take 3 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.capturing = False
        for name, value in {
            "Stream": lambda: "side",
            "current_stream": lambda: "current",
            "set_stream": lambda stream: self.log.append(f"set {stream}"),
            "synchronize": lambda *_: self.log.append("synchronize"),
            "stream": lambda stream: self.within("stream"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": lambda graph, stream, capture_error_mode: self.within("graph"),
            "Event": self.event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.capturing = name == "graph"
        self.log.append(f"enter {name}")
        yield
        self.log.append(f"leave {name}")

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.log.append("record"),
            synchronize=lambda: self.log.append("wait for event"),
            elapsed_time=lambda other: 3.0,
        )


def test_calls_run_outside_the_graph_before_it_is_captured(monkeypatch: pytest.MonkeyPatch):
    from gpu_timing import FEWEST_CALLS, Captured

    cuda = FakeCuda(monkeypatch)
    calls: list[tuple[bool, float]] = []

    def call(number: torch.Tensor) -> torch.Tensor:
        calls.append((cuda.capturing, float(number)))
        return number + 1

    captured = Captured(call, [(torch.tensor(float(index)),) for index in range(6)])
    assert calls[:3] == [(False, 0.0), (False, 1.0), (False, 0.0)]
    inside = calls[3:]
    assert len(inside) == 18 >= FEWEST_CALLS  # whole rounds only
    assert inside == [(True, float(index)) for _ in range(3) for index in range(6)]
    assert float(captured.output) == 6.0
    before = ["synchronize", "enter stream", "leave stream", "synchronize"]
    assert cuda.log == [*before, "enter graph", "leave graph", "set current", "replay", "synchronize"]
    cuda.log.clear()
    assert captured.sample() == pytest.approx(3000 / 18)
    assert cuda.log == ["replay", "record", "replay", "record", "wait for event"]


def test_a_failed_capture_leaves_no_stream_in_force(monkeypatch: pytest.MonkeyPatch):
    from gpu_timing import Captured

    cuda = FakeCuda(monkeypatch)

    def call(number: torch.Tensor) -> torch.Tensor:
        if cuda.capturing:
            raise RuntimeError("not in a capture")
        return number

    with pytest.raises(RuntimeError, match="not in a capture"):
        Captured(call, [(torch.zeros(1),)])
    assert cuda.log[-1] == "set current"


@pytest.mark.parametrize(
    ("cache_bytes", "free_gib", "wanted"),
    [(16 << 20, 70, 84), (1 << 30, 70, 2), (32 << 30, 70, 1), (16 << 20, 1, 12)],
)
def test_copies_exceed_the_cache_and_fit_the_memory(
    cache_bytes: int, free_gib: int, wanted: int, monkeypatch: pytest.MonkeyPatch
):
    from gpu_timing import copies_needed

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_gib << 30, 80 << 30))
    copies = copies_needed(cache_bytes, cache_bytes * 3 // 2, torch.device("cuda", 0))
    assert copies == wanted
    assert copies_needed(cache_bytes, cache_bytes, torch.device("cpu")) == 2


def test_template_names_are_read_from_inductors_source():
    from gpu_timing import template_names

    source = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
def triton_poi_fused_add_0(): pass
''', device_str='cuda')
triton_tem_fused_read_1 = async_compile.triton('triton_tem_fused_read_1', '''
def triton_tem_fused_read_1():
    KERNEL_NAME : tl.constexpr = 'scan'
''', device_str='cuda')
"""
    assert template_names(source) == {"triton_tem_fused_read_1": "scan"}


def test_floor_kernel_reads_every_word():
    """In Triton's interpreter: a length that no block divides."""
    from gpu_bandwidth import BLOCK, read

    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 3, 2 * BLOCK // 32 + 5, 64, generator=generator).bfloat16() for _ in range(2))
    sums = read(key, value)
    words = [tensor.view(-1).view(torch.int32).long() for tensor in (key, value)]
    wanted = (sum(words)).sum() % 2**32
    assert sums.shape == (-(-words[0].numel() // BLOCK),)
    assert int(sums.long().sum() % 2**32) == int(wanted)


def outcome(**medians: float) -> Any:
    from gpu_operator import Case, Measured, Outcome
    from gpu_timing import Times

    names = {"cudnn": "sdpa cudnn", "packed": "sdpa cudnn packed", "floor": "read only"}
    variants = {
        names.get(name, name): Measured(Times((median - 1, median, median + 2)), 0.5, 0.4, wrong=median < 5)
        for name, median in medians.items()
    }
    return Outcome(Case(8, 32768), 2, 1_000_000, 0.25, "", {**variants, "sdpa flash": Measured(not_run="no kernel")})


def test_ratios_and_targets():
    from gpu_report import operator_entry

    entry = operator_entry(outcome(aligned=100.0, stream=220.0, cudnn=250.0, packed=200.0, floor=80.0))
    aligned = entry["variants"]["aligned"]
    assert (aligned["min_us"], aligned["median_us"], aligned["max_us"]) == (99.0, 100.0, 102.0)
    assert aligned["over_cudnn"] == pytest.approx(0.4)
    assert aligned["over_fastest_sdpa"] == pytest.approx(0.5)
    assert aligned["over_floor"] == pytest.approx(1.25)
    assert aligned["gb_per_s"] == pytest.approx(0.25 * 10)
    assert (aligned["target_over_cudnn"], aligned["met"]) == (0.5, True)
    assert entry["variants"]["stream"]["met"]
    assert entry["variants"]["sdpa flash"]["not_run"] == "no kernel"


def test_wrong_outputs_have_no_good_times():
    from gpu_report import operator_entry, wrong_results

    entry = operator_entry(outcome(aligned=2.0, cudnn=250.0))
    aligned = entry["variants"]["aligned"]
    assert (aligned["wrong"], aligned["met"], aligned["over_cudnn"]) == (True, False, None)
    assert wrong_results({"operator": [entry]}) == ["b8 x 32k: aligned"]


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.1, True), (float("nan"), True)])
def test_errors_beyond_the_allowance_are_wrong(factor: float, wrong: bool):
    from gpu_operator import _judged
    from gpu_timing import Times

    exact = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    assert _judged("aligned", Times((1.0,)), (exact * factor).bfloat16(), exact, 2.0).wrong == wrong


def test_jobs_run_side_by_side_and_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import gpu_warm

    program = tmp_path / "job.py"
    program.write_text("import sys, time\nif sys.argv[1] == 'bad': sys.exit('it broke')\ntime.sleep(float(sys.argv[1]))")
    monkeypatch.setattr(gpu_warm, "__file__", str(program))
    jobs = [
        gpu_warm.Job(name, gib, work) for name, gib, work in (("a", 9, "0"), ("b", 1, "bad"), ("c", 1, "600"), ("d", 9, "0"))
    ]
    done = {entry["job"]: entry for entry in gpu_warm.warm(jobs, seconds=4.0, workers=2, free_gib=2.0)}
    assert "failure" not in done["a"]
    assert done["b"]["failure"] == "failed: it broke"
    assert done["c"]["failure"] == "ended: no time left"
    assert done["d"]["failure"] == "not started: no time left"  # needs more memory than is free while c runs


def test_every_step_leaves_a_whole_file(tmp_path: Path):
    from gpu_report import Results

    results = Results(tmp_path / "deep" / "gpu.json", {"device": "none"})
    for number in range(2):
        results.add("operator", number)
        assert json.loads(results.path.read_text()) == {"device": "none", "operator": list(range(number + 1))}
    assert [path.name for path in results.path.parent.iterdir()] == ["gpu.json"]
