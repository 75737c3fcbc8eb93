"""`alignedkv eval-caches` on a tiny random Llama: kept prefills, continuations, held bytes, tasks, limits and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig

from alignedkv_compile import cli
from alignedkv_compile.demo.model import LoadedModel
from alignedkv_compile.evaluate.caches import run as evaluation
from alignedkv_compile.evaluate.caches.continuing import run_after, twin
from alignedkv_compile.evaluate.caches.held import held_bytes
from alignedkv_compile.evaluate.caches.kinds import KINDS, STOCK, CacheKind, choose
from alignedkv_compile.evaluate.caches.limits import Limit, exceeded
from alignedkv_compile.evaluate.caches.plot import draw_caches
from alignedkv_compile.evaluate.caches.prefilled import Continuation, Reader
from alignedkv_compile.evaluate.caches.render import cache_table
from alignedkv_compile.evaluate.caches.result import CacheResult, CacheSettings, divergence, retrieval_score
from alignedkv_compile.evaluate.caches.rope import stretch_factor, stretched
from alignedkv_compile.evaluate.caches.tasks import KEYS, MULTI_KEY, NEEDLE, haystacks
from alignedkv_compile.evaluate.errors import EvaluationError
from alignedkv_compile.evaluate.render import markdown

VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM, TRAINED = 256, 2, 2, 64, 512
BY_NAME = {kind.name: kind for kind in KINDS}


class WordTokenizer:
    """One id per word or line break, so that texts are short; an id stands for one word only as long as there are few."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [sum(map(ord, word)) % VOCABULARY for word in text.replace("\n", " \n ").split(" ") if word]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(torch.bfloat16)


@pytest.fixture(scope="module")
def loaded(llama: Any) -> LoadedModel:
    return LoadedModel("tiny", llama, WordTokenizer(), TRAINED)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, VOCABULARY, (600,), generator=torch.Generator().manual_seed(3)).tolist()


def continuation(ids: list[int], start: int, length: int) -> Continuation:
    return Continuation(tuple(ids[start : start + length]), tuple(ids[start + 1 : start + length + 1]))


def test_stock_after_a_prefill_is_the_models_own_decoding(llama: Any, ids: list[int]):
    """Two continuations from one filled cache, in chunks, against the model over the whole text in one pass; and the fp32
    reference against the fp32 model."""
    reader = Reader(llama)
    following = [continuation(ids, 300, 40), Continuation(tuple(ids[400:420]), tuple(ids[420:423]))]
    prefilled = reader.read(ids[:300], following)
    found = run_after(llama, BY_NAME[STOCK], prefilled, following)
    for given, exact, part in zip(found.log_probabilities, prefilled.references, following, strict=True):
        whole = torch.tensor([ids[:300] + list(part.tokens)])
        expected = reader.model(input_ids=whole).logits[0, -len(part.targets) :].log_softmax(-1)
        assert torch.allclose(exact, expected, atol=1e-4)
        assert given.shape == exact.shape
        assert 0 < float(divergence(exact, given).mean()) < 1e-3, "bfloat16 rounds, and not by much"
    assert found.rows == 320
    assert found.held == LAYERS * 320 * KV_HEADS * 2 * HEAD_DIM * 2


def test_kept_prefills_are_used_and_belong_to_one_model_text_and_rope(llama: Any, ids: list[int], tmp_path: Path):
    reader, following = Reader(llama, tmp_path), [continuation(ids, 50, 8)]
    first = reader.read(ids[:50], following)
    (file,) = tmp_path.iterdir()
    reader.model.forward = None  # what has been kept needs no model
    again = reader.read(ids[:50], following)
    assert torch.equal(first.references[0], again.references[0])
    assert all(torch.equal(a, b) for x, y in zip(first.layers, again.layers, strict=True) for a, b in zip(x, y, strict=True))
    del reader.model.forward
    reader.read(ids[1:51], following)
    with stretched(reader.model, 2.0):
        reader.read(ids[:50], following)
    assert len(list(tmp_path.iterdir())) == 3
    assert file.is_file()


def test_held_bytes_counts_shared_spare_and_nested_tensors_once():
    base = torch.zeros(100, dtype=torch.uint8)

    class Layer:
        def __init__(self) -> None:
            self.view = base[10:20]
            self.parts = [base[:5], {"scale": torch.zeros(3)}]
            self.me = self

    assert held_bytes(Layer()) == 100 + 12


def rows_of(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randn(1, KV_HEADS, count, HEAD_DIM, generator=generator).bfloat16()


@pytest.mark.parametrize(("name", "bits", "error"), [
    ("HF hqq 8-bit", 8.5, 0.02), ("HF hqq 4-bit", 4.5, 0.15),
    pytest.param("HF quanto 4-bit", 4.5, 0.15, marks=pytest.mark.slow),  # compiles C++ of its own
    ("HF fp8", 8, 0.05), ("fp8 e4m3 cast", 8, 0.05), ("fp8 e5m2 cast", 8, 0.1),
])  # fmt: skip
def test_other_caches_store_what_their_name_says(llama: Any, name: str, bits: float, error: float):
    kind = BY_NAME[name]
    if kind.missing:
        pytest.skip(kind.missing)
    generator = torch.Generator().manual_seed(5)
    cache, first = kind.make(llama.config), [rows_of(generator, 256) for _ in range(2)]
    for layer in range(LAYERS):
        cache.update(*first, layer)
    held = held_bytes(cache) * 8 / (LAYERS * 2 * 256 * KV_HEADS * HEAD_DIM)
    assert held == pytest.approx(bits, rel=0.01), "bits per number: codes, and where groups have them 16-bit scales and zeros"
    other, new = twin(cache), [rows_of(generator, 3) for _ in range(2)]
    for given, old, added in zip(cache.update(*new, 0), first, new, strict=True):
        assert given.shape[2] == 259
        wrong = float((given[:, :, :256].float() - old.float()).norm() / old.float().norm())
        assert 1e-3 < wrong < error
        assert float((given[:, :, 256:].float() - added.float()).abs().max()) <= 0.25
    assert cache.get_seq_length() == 259
    other.update(*(tensor[:, :, :1] for tensor in new), 0)
    assert other.get_seq_length() == 257, "twins go on each for itself"


def test_fp8_casts_saturate(llama: Any):
    cache = BY_NAME["fp8 e4m3 cast"].make(llama.config)
    large = torch.full((1, KV_HEADS, 2, HEAD_DIM), 1e4).bfloat16()
    cache.update(large, large, 0)
    key, _ = cache.update(large, large, 0)
    assert float(key.max()) == torch.finfo(torch.float8_e4m3fn).max == float(key.min())


def test_haystacks_hold_their_facts_and_fit(loaded: LoadedModel):
    context, tokenizer = 700, loaded.tokenizer
    made = haystacks(tokenizer, context, (0.1, 0.9))
    assert made == haystacks(tokenizer, context, (0.1, 0.9)), "deterministic"
    assert [haystack.task for haystack in made] == [NEEDLE, NEEDLE, MULTI_KEY]
    assert [len(haystack.questions) for haystack in made] == [1, 1, KEYS]
    first_places = []
    for haystack in made:
        room = context - len(haystack.tokens)
        for question in haystack.questions:
            assert 0 <= room - len(question.prompt) - len(question.answer) < 10
            fact = (*question.prompt[-6:], question.answer[0])  # "code of the red fox is", and the number with its full stop
            text = haystack.tokens
            places = [i for i in range(len(text)) if text[i : i + 6] == fact[:6]]
            assert len(places) == 1, "every fact once"
            first_places.append(places[0])
    assert first_places[0] < 0.2 * context < 0.8 * context < first_places[1]
    assert first_places[2:] == sorted(first_places[2:])
    with pytest.raises(EvaluationError, match="100 tokens are too few for 12 facts"):
        haystacks(tokenizer, 100, ())


def test_an_answer_counts_when_every_token_is_the_most_likely():
    def certain(*tokens: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(tokens), 5).float().mul(10).log_softmax(-1)

    answers = [(1, 2), (3, 4)]
    stock, found = [certain(1, 2), certain(3, 4)], [certain(1, 2), certain(3, 0)]
    score = retrieval_score("x", NEEDLE, 8, 0.5, found, stock, stock, answers)
    assert (score.right, score.right_fp32, score.lost, score.questions) == (1, 2, 1, 2)
    assert score.nll == pytest.approx(10 / 4, abs=0.01)


def test_yarn_stretches_only_while_inside(llama: Any, ids: list[int]):
    tokens = torch.tensor([ids[:64]])
    before = llama(input_ids=tokens).logits
    with stretched(llama, 1.0):
        assert torch.equal(llama(input_ids=tokens).logits, before)
    with stretched(llama, 4.0):
        assert llama.config.rope_parameters["rope_type"] == "yarn"
        assert llama.config.max_position_embeddings == 4 * TRAINED
        inside = llama(input_ids=tokens).logits
        with pytest.raises(EvaluationError, match="no plain rotary embedding"), stretched(llama, 2.0):
            pass
    assert not torch.equal(inside, before)
    assert torch.equal(llama(input_ids=tokens).logits, before)
    assert [stretch_factor(rows, 8192) for rows in (2048, 8192, 8193, 32768)] == [1, 1, 2, 4]


@pytest.fixture(scope="module")
def result(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> CacheResult:
    """A text within the trained length, retrieval beyond it."""
    document = tmp_path_factory.mktemp("text") / "text.txt"
    document.write_text(" ".join(f"word{i * i % 97}" for i in range(400)))
    threads = torch.get_num_threads()
    settings = CacheSettings(
        threads=1,
        text=str(document),
        contexts=(300,),
        positions=20,
        retrieval_contexts=(TRAINED + 100,),
        kinds=("lossless", "HF fp8", "fp8 e5m2 cast"),
    )
    found = evaluation.evaluate_caches(settings, Console(quiet=True), lambda name, dtype: loaded)
    torch.set_num_threads(threads)
    return found


def test_an_evaluation_from_end_to_end(result: CacheResult, tmp_path: Path):
    assert result.kinds() == (STOCK, "lossless", "HF fp8", "fp8 e5m2 cast")
    stock, lossless, scaled, cast = result.language
    assert (lossless.kl_stock, lossless.perplexity, lossless.kl_fp32) == (0.0, stock.perplexity, stock.kl_fp32), "bit for bit"
    assert stock.kl_stock == 0.0
    assert stock.bytes == 1.0
    assert cast.bytes == 0.5
    assert 0.5 <= scaled.bytes < 0.501
    assert 0 < scaled.kl_stock < cast.kl_stock, "three bits of mantissa and two"
    assert stock.kl_fp32 < cast.kl_fp32
    assert result.factors == {300: 1.0, TRAINED + 100: 2.0}
    assert [(score.task, score.questions) for score in result.retrieval] == [(NEEDLE, 1)] * 4 + [(MULTI_KEY, KEYS)] * 4
    assert all(score.context == TRAINED + 100 for score in result.retrieval)

    result.write(tmp_path / "deep" / "caches.json")
    assert json.loads((tmp_path / "deep" / "caches.json").read_text())["language"][3]["bytes"] == 0.5
    draw_caches(result, tmp_path / "caches.png")
    assert (tmp_path / "caches.png").read_bytes().startswith(b"\x89PNG")

    table = cache_table(result)
    assert [row[:3] for row in (table.rows[0], *table.rows[2:4])] == [
        (STOCK, "300", "100.0%"),
        ("HF fp8", "300", "50.0%"),
        (cast.kind, "300", "50.0%"),
    ]
    assert all(len(row) == len(table.heads) for row in table.rows)
    assert f"YaRN, without training on top ({TRAINED + 100} rows by 2)" in table.note
    assert "Stock 16 bits does not solve" in table.note, "a random model finds no needle"
    text = markdown(table)
    assert text.count("\n| ") == 1 + len(table.rows)


def test_limits_fail_above_and_not_at_the_limit(result: CacheResult):
    scaled, cast = result.language[2:]
    assert not exceeded(result, [Limit(cast.kind, "bytes", cast.bytes)])
    assert not exceeded(result, [Limit("not run", "bytes", 0.0)])
    (line,) = exceeded(result, [Limit(cast.kind, "bytes", 0.4)])
    assert line == "fp8 e5m2 cast at 300 rows: bytes is 0.5, above 0.4"
    factor = cast.kl_fp32 / scaled.kl_fp32
    assert not exceeded(result, [Limit(cast.kind, "kl_fp32", 1.001 * factor, "HF fp8")])
    (line,) = exceeded(result, [Limit(cast.kind, "kl_fp32", 0.999 * factor, "HF fp8")])
    assert "times HF fp8's" in line
    broken = replace(result, language=(replace(cast, bytes=float("nan")),))
    assert exceeded(broken, [Limit(cast.kind, "bytes", 1.0)])
    assert exceeded(replace(result, retrieval=(replace(result.retrieval[0], lost=1),)), [Limit(STOCK, "lost", 0)])


def test_what_cannot_be_evaluated_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EvaluationError, match="no kind of cache 'x'; there are stock"):
        choose(["x"])
    absent = CacheKind("absent", lambda config: DynamicCache(), ("no_such_module",), "pip install it")
    monkeypatch.setattr("alignedkv_compile.evaluate.caches.kinds.KINDS", (BY_NAME[STOCK], absent))
    with pytest.raises(EvaluationError, match="absent: no_such_module is not installed: pip install it"):
        choose(["absent"])
    assert choose(None) == (BY_NAME[STOCK],)
    with pytest.raises(EvaluationError, match="100 rows has no room for 128 positions"):
        evaluation.evaluate_caches(CacheSettings(contexts=(100,)), Console(quiet=True), lambda name, dtype: loaded)
    windows = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1))
    windows.config = MistralConfig(sliding_window=32)
    with pytest.raises(EvaluationError, match="only caches of layers that attend to the whole past"):
        evaluation.evaluate_caches(
            CacheSettings(), Console(quiet=True), lambda name, dtype: LoadedModel("windowed", windows, WordTokenizer(), 64)
        )


def test_command_line(monkeypatch: pytest.MonkeyPatch, result: CacheResult, tmp_path: Path):
    runner = CliRunner()
    assert runner.invoke(cli.app, ["eval-caches", "--dtype", "float32"]).exit_code == 2
    refused = runner.invoke(cli.app, ["eval-caches", "--kind", "x"])
    assert refused.exit_code == 1
    assert "no kind of cache 'x'" in " ".join(refused.output.split())
    asked = list[CacheSettings]()
    monkeypatch.setattr(evaluation, "evaluate_caches", lambda settings, console: asked.append(settings) or result)
    paths = {option: tmp_path / f"a.{end}" for option, end in (("--json", "json"), ("--plot", "png"), ("--markdown", "md"))}
    arguments = [str(part) for option, path in paths.items() for part in (option, path)]
    assert runner.invoke(cli.app, ["eval-caches", "--full", "--retrieval", "none", *arguments]).exit_code == 0
    assert asked[0].contexts == (2048, 8192, 32768)
    assert asked[0].retrieval_contexts == ()
    assert asked[0].slow_kinds
    assert all(path.is_file() for path in paths.values())
    monkeypatch.setattr("alignedkv_compile.evaluate.caches.limits.exceeded", lambda found: ("x: too much",))
    failed = runner.invoke(cli.app, ["eval-caches", "--check"])
    assert failed.exit_code == cli.GATE_FAILED
    assert "too much" in failed.output
