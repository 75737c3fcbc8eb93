"""`alignedkv eval` on a tiny random Llama: the same computation as decoding, honest refusals, gates and files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from alignedkv_compile import cli
from alignedkv_compile.demo.model import LoadedModel
from alignedkv_compile.evaluate import run as evaluation
from alignedkv_compile.evaluate.equal_bytes import at_equal_bytes
from alignedkv_compile.evaluate.errors import EvaluationError
from alignedkv_compile.evaluate.gates import Gate, parse_gate, violations
from alignedkv_compile.evaluate.loading import load_model
from alignedkv_compile.evaluate.methods import Aligned, Stock, load_methods
from alignedkv_compile.evaluate.page import write_page
from alignedkv_compile.evaluate.reference_pass import compute_reference
from alignedkv_compile.evaluate.render import print_result
from alignedkv_compile.evaluate.result import Result, Settings
from alignedkv_compile.evaluate.scores import Score
from alignedkv_compile.evaluate.teacher_forcing import run as run_pass
from alignedkv_compile.evaluate.texts import BUILTIN, read_text

VOCABULARY, LAYERS, CONTEXT, POSITIONS = 64, 2, 600, 5
METHODS_FILE = Path(__file__).parents[2] / "benchmarks" / "kv_cache_methods.py"


class CharacterTokenizer:
    """One id per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(64 + token % 26) for token in token_ids)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()


@pytest.fixture
def loaded(llama: Any) -> LoadedModel:
    return LoadedModel("tiny", llama, CharacterTokenizer(), 1024)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return read_text("code", CharacterTokenizer(), CONTEXT + POSITIONS + 1).tokens


def test_builtin_texts_are_long_different_and_repeatable():
    texts = {name: read_text(name, CharacterTokenizer(), 30_000) for name in BUILTIN}
    assert len({text.sha256 for text in texts.values()}) == len(BUILTIN) == 3
    for name, text in texts.items():
        assert text.tokens.shape == (1, 30_000)
        assert read_text(name, CharacterTokenizer(), 30_000).sha256 == text.sha256


def test_texts_that_cannot_be_read_say_why(tmp_path: Path):
    with pytest.raises(EvaluationError, match="one of code, prose, table"):
        read_text(str(tmp_path / "missing.txt"), CharacterTokenizer(), 1)
    short = tmp_path / "short.txt"
    short.write_text("hello")
    with pytest.raises(EvaluationError, match="has 5 tokens, not 6"):
        read_text(str(short), CharacterTokenizer(), 6)
    short.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_text(str(short), CharacterTokenizer(), 1)


def test_one_pass_equals_decoding_token_by_token(llama: Any, tokens: torch.Tensor):
    """Stock attention plugged in for all positions at once, against the model's own decode loop."""
    reference = compute_reference(llama, tokens, [CONTEXT], POSITIONS)
    following = tokens[:, CONTEXT : CONTEXT + POSITIONS]
    found, reading = run_pass(llama, Stock(), reference.past, CONTEXT, following, 2, lambda _: None)
    cache = reference.past.dynamic_cache(CONTEXT)
    steps = [llama(input_ids=following[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(POSITIONS)]
    expected = torch.stack(steps).float().log_softmax(-1)
    # The linear layers sum 5 rows and 1 row in different orders, so that bfloat16 roundings differ; two of them per number.
    assert float((found - expected).abs().max()) < 2 * 2**-8 * float(expected.abs().max())
    assert reading.bytes_read == reading.bytes_full
    rows = sum(CONTEXT + i + 1 for i in range(POSITIONS))
    assert reading.bytes_full == LAYERS * rows * 2 * (64 + 64) * 2
    assert reading.errors.shape == (LAYERS, 2, 4)
    assert 0 < float(reading.errors.max()) < 2**-6
    assert reading.added is None
    assert llama.config._attn_implementation == "sdpa"


def test_aligned_read_skips_bits_within_its_tolerance(llama: Any, tokens: torch.Tensor):
    reference = compute_reference(llama, tokens, [CONTEXT], POSITIONS)
    following = tokens[:, CONTEXT : CONTEXT + POSITIONS]
    found, reading = run_pass(llama, Aligned(2.0), reference.past, CONTEXT, following, POSITIONS, lambda _: None)
    assert reading.bytes_read < 0.9 * reading.bytes_full
    assert reading.added is not None
    assert reading.added.shape == (LAYERS, POSITIONS, 4)
    assert float(reading.added.min()) > 0.01, "bits were skipped, so no output is exact"
    exact = reference.log_probabilities[CONTEXT]
    divergence = (exact.exp() * (exact - found)).sum(-1)
    assert float(divergence.mean()) < 1e-3


def test_compared_methods_read_what_they_claim_and_never_look_ahead():
    shares = {"fp8": (0.5, 0.5), "int8": (0.515, 0.517), "KIVI": (0.25, 0.75), "AlignedKV": (0.5, 1.0)}
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(1, 2, 400, 64, generator=generator).half() for _ in range(2))
    query = torch.randn(1, 4, 1, 64, generator=generator).half()
    methods = {method.name: method for method in load_methods(METHODS_FILE)}
    later = [tensor.clone() for tensor in (key, value)]
    for tensor in later:
        tensor[:, :, 300:] = 1000.0
    for name, method in methods.items():
        step = method.prepare(key, value).attend(query, 300, 0.125)
        changed = method.prepare(*later).attend(query, 300, 0.125)
        assert torch.equal(step.output, changed.output), name
        rows = 300 * 2 * 2 * 64
        share = step.bytes_read / (2 * rows)
        low, high = shares[name.split()[0]]
        assert low <= share <= high, (name, share)
        exact = Stock().prepare(key.double(), value.double()).attend(query.double(), 300, 0.125).output
        error = float((step.output - exact).norm() / exact.norm())
        assert 1e-5 < error < 0.25, (name, error)


def test_paper_rule_reads_the_token_that_is_the_sum_at_all_bits():
    """One token has all the weight: its V is read whole, and channels of equal exponent are, too."""
    key = torch.zeros(1, 1, 512, 16).half()
    key[:, :, 5] = 4.0
    value = torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(2)).half()
    value[:, :, 5] = 1.625  # the rule looks at the channel whose output is smallest
    query = torch.full((1, 1, 1, 16), 4.0).half()
    for method in load_methods(METHODS_FILE):
        step = method.prepare(key, value).attend(query, 512, 0.25)
        exact = torch.equal(step.output[0, 0, 0], value[0, 0, 5].float())
        assert exact or not method.name.startswith("AlignedKV"), method.name
        if method.name.startswith("AlignedKV"):
            sizes = 512 * 16 * 2 + 16 * 2 + 511 * 16 * 1  # K whole, one V row whole, the other rows' first 8 bits
            assert step.bytes_read == sizes


def settings() -> Settings:
    return Settings(contexts=(CONTEXT,), positions=POSITIONS, tolerances=(1.0, 4.0), probes=2, compare=METHODS_FILE)


def test_an_evaluation_from_end_to_end(loaded: LoadedModel, tmp_path: Path):
    limit = Gate("kl_mean", 0.0)
    result = evaluation.evaluate(settings(), [limit], Console(quiet=True), lambda name, dtype: loaded)
    names = [score.method for score in result.scores]
    assert names[:3] == ["stock", "alignedkv 1", "alignedkv 4"]
    assert len(names) == 3 + 6
    stock, fine, coarse = result.scores[:3]
    assert stock.delta_stock == 0.0
    assert coarse.bytes < fine.bytes < stock.bytes == 1.0
    assert coarse.added_rms is not None
    assert fine.added_rms is not None
    assert fine.added_rms < coarse.added_rms
    assert len(result.violations) == 2
    assert "alignedkv 1 at 600 tokens: kl_mean" in result.violations[0]
    assert [entry.method for entry in result.equal_bytes] == names[3:]

    result.write(tmp_path / "deep" / "eval.json")
    saved = json.loads((tmp_path / "deep" / "eval.json").read_text())
    assert saved["scores"][1]["bytes"] == fine.bytes
    assert saved["text_sha256"] == result.text_sha256

    write_page(result, tmp_path / "eval.html")
    page = (tmp_path / "eval.html").read_text()
    assert 'src="data:image/png;base64,iVBOR' in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//|/)""", page), "the page must need no other file"
    assert "alignedkv 4" in page
    assert "Above the limit" in page

    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    print_result(result, console)
    assert "at equal bytes" in console.export_text()


def make_score(**fields: Any) -> Score:
    numbers = dict.fromkeys(Score.__dataclass_fields__, 0.0)
    return Score(**{**numbers, "method": "x", "context": 8, "positions": 4, "tolerance": 1.0, "layer_errors": (0.0,), **fields})


def test_gates_fail_above_and_not_at_the_limit():
    gates = [parse_gate("kl_mean=0.5")]
    assert not violations(gates, [make_score(kl_mean=0.5)])
    assert violations(gates, [make_score(kl_mean=0.51)])
    assert violations(gates, [make_score(kl_mean=float("nan"))])
    assert not violations(gates, [make_score(kl_mean=0.51, tolerance=None)]), "other methods are not gated"


@pytest.mark.parametrize("text", ["kl_mean", "kl_mean=", "kl_mean=nan", "speed=1", "=1"])
def test_bad_gates_are_refused(text: str):
    with pytest.raises(EvaluationError, match="--fail-above"):
        parse_gate(text)


def test_equal_bytes_interpolates_the_sweep():
    sweep = [make_score(method=f"alignedkv {b}", bytes=b, kl_mean=10.0**-k, tolerance=1.0) for b, k in ((0.2, 2), (0.4, 4))]
    others = [make_score(method=name, bytes=b, tolerance=None) for name, b in (("inside", 0.3), ("outside", 0.9))]
    inside, outside = at_equal_bytes([*sweep, *others], ["inside", "outside"])
    assert inside.interpolated
    assert inside.aligned["kl_mean"] == pytest.approx(1e-3)
    assert not outside.interpolated
    assert outside.aligned_bytes == 0.4
    assert outside.aligned["kl_mean"] == pytest.approx(1e-4)


def test_attention_that_is_not_plain_is_refused(llama: Any, tokens: torch.Tensor):
    reference = compute_reference(llama, tokens[:, :40], [30], 4)
    attention = llama.model.layers[0].self_attn
    for option, value, message in (("softcap", 30.0, "softcap"), ("sliding_window", 8, "sliding window of 8 rows")):
        forward = type(attention).forward

        def patched(self: Any, *args: Any, _forward: Any = forward, _extra: Any = {option: value}, **kwargs: Any) -> Any:  # noqa: B006
            return _forward(self, *args, **kwargs, **_extra)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(attention), "forward", patched)
            with pytest.raises(EvaluationError, match=message):
                run_pass(llama, Stock(), reference.past, 30, tokens[:, 30:34], 1, lambda _: None)
    assert llama.config._attn_implementation == "sdpa"


def test_bad_models_methods_and_lengths_are_refused(loaded: LoadedModel, tmp_path: Path):
    with pytest.raises(EvaluationError, match="no GGUF file"):
        load_model("missing.gguf", torch.bfloat16)
    with pytest.raises(EvaluationError, match="transformers cannot load"):
        load_model(str(tmp_path), torch.bfloat16)
    empty = tmp_path / "empty.py"
    empty.write_text("METHODS = ()")
    with pytest.raises(EvaluationError, match="defines no METHODS"):
        load_methods(empty)
    empty.write_text("1 / 0")
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        load_methods(empty)
    with pytest.raises(EvaluationError, match="needs a Python file"):
        load_methods(tmp_path / "none.py")
    too_long = replace(settings(), contexts=(4096,), compare=None)
    with pytest.raises(EvaluationError, match="was made for 1024 tokens"):
        evaluation.evaluate(too_long, [], Console(quiet=True), lambda name, dtype: loaded)


def test_command_line_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    runner = CliRunner()
    help_text = runner.invoke(cli.app, ["eval", "--help"])
    assert help_text.exit_code == 0
    assert runner.invoke(cli.app, ["eval", "--tolerances", "0,1"]).exit_code == 2
    assert runner.invoke(cli.app, ["eval", "--dtype", "int3"]).exit_code == 2
    refused = runner.invoke(cli.app, ["eval", "--fail-above", "speed=1"])
    assert refused.exit_code == 1
    assert "knows no metric 'speed'" in " ".join(refused.output.split())

    from alignedkv_compile.demo.environment import describe

    score = make_score(kl_mean=1.0, attention_error=0.1, perplexity=2.0, layer_errors=(0.1,))
    found = Result(Settings(contexts=(8,)), "m", "0" * 64, describe(), {8: 1.0}, (score,), (), ("x: kl_mean",))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: found)
    failed = runner.invoke(cli.app, ["eval", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    assert failed.exit_code == cli.GATE_FAILED
    assert (tmp_path / "a.json").is_file()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
