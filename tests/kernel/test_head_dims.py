"""Head dimensions from 8 to 576, of K and V alike or not: planes, reference and generated C++."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    SUM_ERROR,
    Case,
    added_error_in_rho,
    agreement_budget,
    exact,
    make_case,
    relative_errors,
    run_certified_kernel,
    run_certified_reference,
    run_kernel,
    run_reference,
    run_scanned,
    run_write,
    write_planes,
)
from test_attention import check_counts
from test_certified import check_agreement, check_certificates

from alignedkv_compile import arena
from alignedkv_compile.layout import arena_layout

DIMS = [(8, 8), (21, 42), (42, 21), (80, 288), (288, 464), (464, 80), (512, 512), (576, 512)]
GENERATED = [(8, 8), *(pytest.param(*dims, marks=pytest.mark.slow) for dims in ((42, 21), (288, 464))), (576, 512)]


def case_of(key_dim: int, value_dim: int) -> Case:
    return make_case(group=4, rows=500, key_dim=key_dim, value_dim=value_dim, peak=4.0)


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
def test_references_keep_their_promises(key_dim: int, value_dim: int) -> None:
    case = case_of(key_dim, value_dim)
    planes = write_planes(case)
    for result in (run_reference(case, planes), run_scanned(case, planes)[0]):
        assert added_error_in_rho(case, result.output).max() > 0.01
        assert added_error_in_rho(case, result.output).square().mean().sqrt() <= case.tolerance
        if key_dim > 8:  # rows of 8 elements are padded to 16, and 8 of their 16 bytes are the first plane's
            assert result.counts["bytes_read"] < 0.95 * result.counts["bytes_full"]
    certified = replace(case, tolerance=32.0)
    check_certificates(certified, run_certified_reference(certified, planes))


@pytest.mark.parametrize(("key_dim", "value_dim"), GENERATED)
def test_kernels_agree_with_the_reference(key_dim: int, value_dim: int) -> None:
    case = case_of(key_dim, value_dim)
    rows = case.key.shape[2]
    expected, planes = write_planes(case), torch.zeros(arena_layout(case.key, case.value).total, dtype=torch.uint8)
    run_write(planes, case.key, case.value, torch.arange(rows), rows)
    arena.mark(planes, valid=True)
    layout = arena_layout(case.key, case.value)
    written, wanted = arena.arena_views(planes, layout), arena.arena_views(expected, layout)
    for name in ("key_hi", "key_mid", "value_hi", "value_mid"):
        assert torch.equal(getattr(written, name), getattr(wanted, name)), name
    kernel, reference = run_kernel(case, planes), run_reference(case, planes)
    assert relative_errors(kernel.output, reference.output.double()).max() <= agreement_budget(case)
    check_counts(kernel.counts, reference.counts)
    assert relative_errors(run_kernel(replace(case, tolerance=0.0), planes).output, exact(case)).max() <= 8 * SUM_ERROR
    certified = replace(case, tolerance=32.0)
    result = run_certified_kernel(certified, planes)
    check_certificates(certified, result)
    check_agreement(certified, result, run_certified_reference(certified, planes))


@pytest.mark.slow
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 8), (464, 80), (576, 512)])
def test_every_instruction_set(isa: str, key_dim: int, value_dim: int) -> None:
    test_kernels_agree_with_the_reference(key_dim, value_dim)


@pytest.mark.parametrize("softcap", [0.0, 8.0])
def test_one_latent_as_key_and_value(softcap: float) -> None:
    """Absorbed multi-latent attention: V is the first 512 columns of K, one KV head for all query heads."""
    case = make_case(heads=1, group=8, rows=300, key_dim=576, value_dim=512, softcap=softcap, scale=192**-0.5)
    case = replace(case, value=case.key[..., :512])
    planes = write_planes(case)
    kernel, reference = run_kernel(case, planes), run_reference(case, planes)
    assert relative_errors(kernel.output, reference.output.double()).max() <= agreement_budget(case)
    assert added_error_in_rho(case, kernel.output).square().mean().sqrt() <= case.tolerance
