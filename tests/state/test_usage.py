"""What stores say that their caches take in memory."""

from __future__ import annotations

import gc

import pytest
import torch

from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.metrics import names, read
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.state import usage
from alignedkv_compile.state.append_buffers import AppendBuffers
from alignedkv_compile.state.joined import JoinedKeys, LatentBuffers
from alignedkv_compile.state.sidecar import SidecarStore
from alignedkv_compile.state.stores import Stores
from alignedkv_compile.state.usage import CacheUsage
from alignedkv_compile.state.windows import Windows, window_capacity


class Builder:
    """Builds planes with the reference's write."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        planes.zero_()
        quantize_on_write.default(planes, key[:, :, :rows], value[:, :, :rows], torch.arange(rows), key.shape[2])
        planes[:8].view(torch.int64).fill_(1)


def cache(rows: int, live: int = 0) -> list[torch.Tensor]:
    """K ``[2, 3, rows, 16]`` and V ``[2, 3, rows, 32]``, the first ``live`` rows not zero."""
    pair = [torch.zeros(2, 3, rows, width) for width in (16, 32)]
    for one in pair:
        one[:, :, :live] = 1.0
    return pair


def size(*tensors: torch.Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def test_planes_beside_a_static_cache() -> None:
    store, (key, value) = SidecarStore(Builder()), cache(200, live=70)
    sidecar = store.before_call(key, value)
    (found,) = store.usage()
    assert found == CacheUsage("static", key.data_ptr(), size(key, value), ArenaLayout(6, 200, 16, 32).total, 0, 70, 200)
    sidecar.mark_stale()
    (found,) = store.usage()
    assert found.rows is None, "planes that are not kept up say nothing about the rows"
    del key
    gc.collect()
    assert not list(store.usage())


@pytest.mark.parametrize("store_class", [AppendBuffers, LatentBuffers])
def test_a_growing_buffer(store_class: type[AppendBuffers]) -> None:
    store, pair = store_class(Builder()), cache(200)
    if store_class is LatentBuffers:
        pair = [one[:, :1] for one in pair]
    held = store.before_call(*pair, 1, with_planes=True)
    (during,) = store.usage()
    views = store.after_call(held, 1)
    (after,) = store.usage()
    assert (during.rows, after.rows) == (200, 201)
    assert after.kind == store_class.kind
    assert after.capacity == held.capacity > 201
    assert after.cache_bytes == size(held.key, held.value)
    assert held.planes is not None
    assert after.plane_bytes == size(held.planes)
    del views, held
    gc.collect()
    assert not list(store.usage())


def test_a_window_counts_its_rows_and_the_copy() -> None:
    store, (key, value) = Windows(Builder()), cache(200)
    held = store.before_call(key, value, 1, with_planes=True, trust_unversioned=False)
    (during,) = store.usage()
    store.after_call(held, key, value, 1)
    (after,) = store.usage()
    assert during == after
    assert after.copy_bytes == size(held.key, held.value) == size(*cache(window_capacity(200)))
    assert (after.rows, after.capacity, after.cache_bytes) == (200, 200, size(key, value))
    assert after.address == key.data_ptr()
    del held, key
    gc.collect()
    assert not list(store.usage())


def test_joined_latents() -> None:
    store = JoinedKeys(Builder())
    latent, rope = torch.zeros(2, 1, 200, 32), torch.zeros(2, 1, 200, 16)
    held = store.before_call(latent, rope, with_planes=False, trust_unversioned=False)
    (found,) = store.usage()
    assert found == CacheUsage("latent", latent.data_ptr(), size(latent, rope), 0, size(held.rows), None, 200)


def test_a_cache_in_two_stores_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding layer is written as a static cache until it is full, and shifted from then on."""
    monkeypatch.setattr(usage, "_SOURCES", [])
    stores, (key, value) = Stores(Builder()), cache(200, live=70)
    usage.add_source(stores)
    stores.of(SidecarStore).before_call(key, value)
    stores.of(Windows).before_call(key, value, 1, with_planes=False, trust_unversioned=False)
    assert {one.kind for one in stores.usage()} == {"static"}, "nobody holds the window of a call that never ended"
    held = stores.of(Windows).before_call(key, value, 1, with_planes=False, trust_unversioned=False)
    found = {(one.metric, one.labels): one.value for one in read.read_samples()}
    assert held.address == key.data_ptr()
    assert found[names.CACHE_BYTES, ("static",)] == size(key, value)
    assert found[names.CACHE_BYTES, ("window",)] == 0
    assert found[names.COPY_BYTES, ("window",)] == size(held.key, held.value)
    assert found[names.CACHE_UTILISATION, ("static",)] == 70 / 200


def test_a_further_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        def usage(self) -> list[CacheUsage]:
            return [CacheUsage("planes", address, 0, 100, 0, rows, 10) for address, rows in ((1, 4), (2, None), (3, 8))]

    monkeypatch.setattr(usage, "_SOURCES", [])
    usage.add_source(Source())
    found = {one.metric: one.value for one in read.read_samples() if one.labels == ("planes",)}
    assert found == {
        names.CACHES: 3,
        names.CACHE_BYTES: 0,
        names.PLANE_BYTES: 300,
        names.COPY_BYTES: 0,
        names.CACHE_ROWS: 12,
        names.CACHE_CAPACITY: 20,
        names.CACHE_UTILISATION: 0.6,
    }
