# SPDX-License-Identifier: Apache-2.0
"""Pages and their owners against a small model; copies on write; compaction; keys of images."""

import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import mmkernels
from mmkernels.cache import OutOfPages, PagedKVCache, PagePool, prefix_key

LAYERS, HEADS, WIDTH = 2, 1, 2


def pool_of(pages: int, size: int = 4) -> PagePool:
    return PagePool(pages, size, LAYERS, HEADS, WIDTH, torch.float32)


def state(pool: PagePool) -> tuple[object, ...]:
    counts = [pool.refcount(p) for p in range(pool.num_pages)]
    return pool.num_free, counts, pool.key_cache.clone(), pool.value_cache.clone()


def same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return a[:2] == b[:2] and all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a[2:], b[2:], strict=True)
    )


def test_pages_are_taken_shared_and_given_back() -> None:
    pool = pool_of(4)
    a, b = pool.alloc(2)
    assert a != b and pool.num_free == 2 and pool.refcount(a) == 1
    pool.share([a])
    pool.free([a, b])
    assert pool.refcount(a) == 1 and pool.refcount(b) == 0 and pool.num_free == 3
    pool.free([a])
    assert pool.num_free == 4 and sorted(pool.alloc(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda pool, used, free: pool.free([used, used]),
        lambda pool, used, free: pool.free([used, free]),
        lambda pool, used, free: pool.share([used, free]),
        lambda pool, used, free: pool.writable(free),
        lambda pool, used, free: pool.free([used, 99]),
        lambda pool, used, free: pool.refcount(-1),
        lambda pool, used, free: pool.alloc(-1),
    ],
)
def test_what_nobody_owns_cannot_be_freed_shared_or_written(call: object) -> None:
    pool = pool_of(3)
    (used,) = pool.alloc(1)
    before = state(pool)
    with pytest.raises(ValueError, match="PagePool"):
        call(pool, used, (used + 1) % 3)  # type: ignore[operator]
    assert same(before, state(pool))


def test_exhaustion_changes_nothing() -> None:
    pool = pool_of(4)
    (page, *_) = pool.alloc(3)
    pool.share([page])
    before = state(pool)
    with pytest.raises(OutOfPages, match="2 pages requested, 1 are free") as raised:
        pool.alloc(2)
    assert (raised.value.requested, raised.value.free) == (2, 1) and same(before, state(pool))
    pool.alloc(1)
    before = state(pool)
    with pytest.raises(OutOfPages):
        pool.writable(page)
    assert same(before, state(pool))


def test_copy_on_write_copies_every_layer() -> None:
    pool = pool_of(3)
    (page,) = pool.alloc(1)
    assert pool.writable(page) == page
    pool.key_cache[:, page], pool.value_cache[:, page] = 1.5, 2.5
    pool.share([page])
    copy = pool.writable(page)
    assert copy != page and pool.refcount(page) == pool.refcount(copy) == 1
    pool.key_cache[:, copy] = 9
    assert (pool.key_cache[:, page] == 1.5).all() and (pool.value_cache[:, copy] == 2.5).all()


def test_threads_never_get_the_same_page() -> None:
    pool = pool_of(64)
    failed = []

    def work(seed: int) -> None:
        r = random.Random(seed)
        for _ in range(300):
            try:
                pages = pool.alloc(r.randint(1, 8))
            except OutOfPages:
                continue
            pool.share(pages)
            if any(pool.refcount(p) != 2 for p in pages):
                failed.append(pages)
            pool.free(pages)
            pool.free(pages)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and pool.num_free == 64


class Model:
    """The cache beside plain lists of the tokens each sequence should hold."""

    def __init__(self, seed: int, pages: int = 24, size: int = 4) -> None:
        self.r = random.Random(seed)
        self.pool = pool_of(pages, size)
        self.cache = PagedKVCache(self.pool)
        self.tokens: dict[int, list[int]] = {}
        self.positions: dict[int, int] = {}
        self.count = self.refused = self.copied = self.dropped = 0

    def step(self) -> None:
        kinds = "add append append append append fork fork free compact truncate".split()
        before = self.summary()
        try:
            getattr(self, self.r.choice(kinds))()
        except OutOfPages as error:
            self.refused += 1
            assert error.requested > error.free == self.pool.num_free
            assert before == self.summary()
        self.check_owners()

    def summary(self) -> object:
        pages = {s: (self.cache.pages(s), self.cache.length(s)) for s in self.tokens}
        return self.pool.num_free, pages, {s: self.cache.next_position(s) for s in self.tokens}

    def some(self, most: int) -> list[int]:
        live = list(self.tokens)
        return self.r.sample(live, min(len(live), self.r.randint(1, most)))

    def add(self) -> None:
        if len(self.tokens) < 12:
            s = self.cache.add()
            self.tokens[s], self.positions[s] = [], 0

    def append(self) -> None:
        sequences = self.some(3)
        counts = [self.r.randint(0, 6) for _ in sequences]
        tails = {s: self.cache.pages(s)[-1:] for s in sequences}
        slots, positions = self.cache.append(sequences, counts)
        new = list(range(self.count, self.count + sum(counts)))
        self.count += len(new)
        assert len(set(slots.tolist())) == len(new)
        for caches, sign in ((self.pool.key_cache, 1), (self.pool.value_cache, -1)):
            rows = sign * torch.tensor(new, dtype=torch.float32).view(-1, 1, 1)
            for layer in range(LAYERS):
                caches[layer].flatten(0, 1)[slots] = rows + layer / 4
        assert positions.tolist() == [
            p for s, n in zip(sequences, counts, strict=True)
            for p in range(self.positions[s], self.positions[s] + n)
        ]  # fmt: skip
        for s, n in zip(sequences, counts, strict=True):
            self.tokens[s] += new[:n]
            self.positions[s] += n
            del new[:n]
            self.copied += bool(tails[s]) and tails[s][0] not in self.cache.pages(s)
            self.check(s)

    def fork(self) -> None:
        for s in self.some(1) if len(self.tokens) < 12 else []:
            child = self.cache.fork(s)
            self.tokens[child], self.positions[child] = list(self.tokens[s]), self.positions[s]

    def free(self) -> None:
        for s in self.some(1):
            self.cache.free(s)
            del self.tokens[s], self.positions[s]

    def truncate(self) -> None:
        for s in self.some(1):
            dropped = self.r.randint(0, min(6, len(self.tokens[s])))
            length = len(self.tokens[s]) - dropped
            self.cache.truncate(s, length)
            del self.tokens[s][length:]
            self.positions[s] -= dropped
            self.check(s)

    def compact(self) -> None:
        sequences = self.some(3)
        share = self.r.choice((0.0, 0.5, 0.8, 0.95, 1.0))
        keep = [[self.r.random() < share for _ in self.tokens[s]] for s in sequences]
        self.cache.compact(sequences, [torch.tensor(k, dtype=torch.bool) for k in keep])
        for s, k in zip(sequences, keep, strict=True):
            self.dropped += len(k) - sum(k)
            self.tokens[s] = [t for t, kept in zip(self.tokens[s], k, strict=True) if kept]
            self.check(s)

    def check(self, s: int) -> None:
        """Every layer holds the tokens, in order."""
        assert self.cache.length(s) == len(self.tokens[s])
        assert self.cache.next_position(s) == self.positions[s]
        table, lens, _ = self.cache.tables([s])
        n, size = int(lens[0]), self.pool.page_size
        at = torch.arange(n)
        slots = table[0, at // size] * size + at % size
        for caches, sign in ((self.pool.key_cache, 1), (self.pool.value_cache, -1)):
            found = caches.flatten(1, 2)[:, slots, 0, 0]
            expected = sign * torch.tensor(self.tokens[s], dtype=torch.float32)
            assert all(torch.equal(found[i], expected + i / 4) for i in range(LAYERS)), s

    def check_owners(self) -> None:
        used = Counter(p for s in self.tokens for p in self.cache.pages(s))
        for page in range(self.pool.num_pages):
            assert self.pool.refcount(page) == used[page]
        assert self.pool.num_free == self.pool.num_pages - len(used)
        for s, tokens in self.tokens.items():
            assert len(self.cache.pages(s)) == -(-len(tokens) // self.pool.page_size)

    def run(self, steps: int) -> None:
        for step in range(steps):
            self.step()
            if step % 100 == 0:
                for s in self.tokens:
                    self.check(s)
        for s in list(self.tokens):
            self.check(s)
            self.cache.free(s)
        assert self.pool.num_free == self.pool.num_pages


@pytest.mark.parametrize(("size", "pages"), [(1, 40), (4, 24), (16, 9)])
def test_random_operations(size: int, pages: int) -> None:
    model = Model(size, pages, size)
    model.run(1500)
    assert model.refused > 20 and model.dropped > 100
    assert model.copied > 20 or size == 1  # pages of one slot are never half full


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_many_random_operations(seed: int) -> None:
    Model(100 + seed, *((40, 1), (24, 3), (20, 4), (9, 16))[seed]).run(100_000)


def filled(cache: PagedKVCache, sequence: int, count: int, seed: int = 0) -> None:
    slots, _ = cache.append([sequence], [count])
    g = torch.Generator().manual_seed(seed)
    for caches in (cache.pool.key_cache, cache.pool.value_cache):
        shape = (LAYERS, count, *caches.shape[3:])
        caches.view(LAYERS, -1, *caches.shape[3:])[:, slots] = torch.randn(shape, generator=g)


def test_compaction_with_sharers_and_no_spare_page_changes_nothing() -> None:
    cache = PagedKVCache(pool_of(4))
    a = cache.add()
    filled(cache, a, 15)
    b = cache.fork(a)
    before, pages = state(cache.pool), cache.pages(b)
    keep = torch.ones(15, dtype=torch.bool)
    keep[5] = False
    with pytest.raises(OutOfPages, match="3 pages requested, 0 are free"):
        cache.compact([a], [keep])
    assert same(before, state(cache.pool)) and cache.pages(a) == cache.pages(b) == pages
    cache.free(b)
    cache.compact([a], [keep])
    assert cache.length(a) == 14 and cache.next_position(a) == 15


def test_a_failed_compaction_gives_its_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedKVCache(pool_of(9))
    a = cache.add()
    filled(cache, a, 15)
    b, keep = cache.fork(a), torch.ones(15, dtype=torch.bool)
    keep[5] = False
    free, pages = cache.pool.num_free, cache.pages(a)

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("mmkernels.cache.sequences.compact_kv", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        cache.compact([a], [keep])
    assert cache.pool.num_free == free and cache.pages(a) == cache.pages(b) == pages


def test_compaction_leaves_the_pages_before_the_first_dropped_token_shared() -> None:
    cache = PagedKVCache(pool_of(9))
    a = cache.add()
    filled(cache, a, 15)
    b = cache.fork(a)
    keep = torch.ones(15, dtype=torch.bool)
    keep[9] = False
    theirs = cache.pool.key_cache[:, cache.pages(b)].clone()
    cache.compact([a], [keep])
    assert cache.pages(a)[:2] == cache.pages(b)[:2] and not set(cache.pages(a)[2:]) & set(
        cache.pages(b)
    )
    assert torch.equal(cache.pool.key_cache[:, cache.pages(b)].nan_to_num(), theirs.nan_to_num())


def test_compact_kv_takes_lists_of_layers_and_keeps_counting_positions() -> None:
    layers = [torch.randn(5, 4, 1, 2) for _ in range(3)]
    values = [t + 1 for t in layers]
    table, keep = torch.tensor([[3, 1]]), torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]]).bool()
    expected = [t[[3, 1]].flatten(0, 1)[keep[0]] for t in layers]
    found = mmkernels.compact_kv(layers, values, table, torch.tensor([8]), keep)
    assert found.seq_lens.tolist() == [5] and found.next_positions.tolist() == [8]
    assert found.block_table.tolist() == [[3, 1]]
    for t, v, e in zip(layers, values, expected, strict=True):
        assert torch.equal(t[[3, 1]].flatten(0, 1)[:5], e)
        assert torch.equal(v[[3, 1]].flatten(0, 1)[:5], e + 1)
    again = mmkernels.compact_kv(
        layers, values, table, found.seq_lens, torch.tensor([[0, 1, 0, 0, 0]]).bool(),
        next_positions=found.next_positions,
    )  # fmt: skip
    assert again.seq_lens.tolist() == [1] and again.next_positions.tolist() == [8]
    assert again.block_table.tolist() == [[3, -1]]


def test_attention_after_compaction_is_attention_to_the_kept_keys() -> None:
    cache = PagedKVCache(PagePool(40, 4, 2, 2, 32, torch.float32))
    a = cache.add()
    g = torch.Generator().manual_seed(0)
    slots, _ = cache.append([a], [30])
    key, value = torch.randn(2, 2, 30, 2, 32, generator=g)
    for caches, rows in ((cache.pool.key_cache, key), (cache.pool.value_cache, value)):
        for layer in range(2):
            caches[layer].flatten(0, 1)[slots] = rows[layer]
    keep = torch.rand(30, generator=g) < 0.4
    cache.compact([a], [keep])
    query = torch.randn(1, 4, 32, generator=g)
    table, lens, _ = cache.tables([a])
    for layer in range(2):
        out = mmkernels.paged_attention(
            query, cache.pool.key_cache[layer], cache.pool.value_cache[layer], table, lens
        )
        k, v = (t[layer][keep].transpose(0, 1)[None] for t in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None].transpose(1, 2).reshape(1, 4, 1, 32), k, v, enable_gqa=True
        )
        torch.testing.assert_close(out[0], expected[0, :, 0])


def test_sequences_with_one_front_share_it_in_attention() -> None:
    pool = PagePool(200, 16, 1, 2, 32, torch.float32)
    cache = PagedKVCache(pool)
    first = cache.add()
    g = torch.Generator().manual_seed(0)

    def write(sequences: list[int], counts: list[int]) -> None:
        slots, _ = cache.append(sequences, counts)
        for caches in (pool.key_cache, pool.value_cache):
            caches[0].flatten(0, 1)[slots] = torch.randn(len(slots), 2, 32, generator=g)

    write([first], [301])
    sequences = [first, *(cache.fork(first) for _ in range(3)), cache.add()]
    write(sequences, [5, 1, 20, 7, 9])
    query = torch.randn(5, 4, 32, generator=g)
    tables = cache.tables(sequences)
    assert tables.shared_prefix is not None
    groups, pages, lens = tables.shared_prefix
    assert groups.tolist() == [0, 0, 0, 0, -1] and lens.tolist() == [288]
    caches = pool.key_cache[0], pool.value_cache[0]
    together = mmkernels.paged_attention(query, *caches, *tables[:2], shared_prefix=tables[2])
    apart = [cache.tables([s]) for s in sequences]
    assert all(t.shared_prefix is None for t in apart)
    expected = [
        mmkernels.paged_attention(query[i : i + 1], *caches, *t[:2]) for i, t in enumerate(apart)
    ]
    torch.testing.assert_close(together, torch.cat(expected))


def test_new_tokens_are_never_part_of_a_shared_front() -> None:
    cache = PagedKVCache(PagePool(64, 16, 1, 1, 2, torch.float32))
    a = cache.add()
    filled_slots, _ = cache.append([a], [320])
    b = cache.fork(a)
    assert len(filled_slots) == 320
    tables = cache.tables([a, b])
    assert tables.shared_prefix is not None and tables.shared_prefix[2].tolist() == [304]
    assert cache.tables([a, b], [320, 320]).shared_prefix is None


@pytest.mark.parametrize(
    "call",
    [
        lambda c, s: c.free(s + 1),
        lambda c, s: c.append([s, s], [1, 1]),
        lambda c, s: c.append([s], [-1]),
        lambda c, s: c.append([s], [1, 2]),
        lambda c, s: c.truncate(s, 6),
        lambda c, s: c.truncate(s, -1),
        lambda c, s: c.compact([s], [torch.ones(4).bool()]),
        lambda c, s: c.compact([s], [torch.ones(5)]),
    ],
)
def test_wrong_calls_change_nothing(call: object) -> None:
    cache = PagedKVCache(pool_of(4))
    s = cache.add()
    filled(cache, s, 5)
    before = state(cache.pool)
    with pytest.raises(ValueError, match="PagedKVCache"):
        call(cache, s)  # type: ignore[operator]
    assert same(before, state(cache.pool)) and cache.length(s) == 5


def images() -> dict[str, object]:
    """Images whose bytes are the same, and that are not the same image."""
    data = bytes(range(256)) * 18  # 4608 = 64 · 72
    wide, high = Image.frombytes("L", (64, 72), data), Image.frombytes("L", (72, 64), data)
    palettes = []
    for shift in (0, 1):
        p = Image.frombytes("P", (64, 72), data)
        p.putpalette([(i + shift) % 256 for i in range(768)])
        palettes.append(p)
    see_through = palettes[0].copy()
    see_through.info["transparency"] = 3
    flat = np.frombuffer(data, np.uint8)
    array = flat.reshape(64, 72)
    return {
        "wide": wide, "high": high, "rgb": Image.frombytes("RGB", (32, 48), data), "palette": palettes[0],
        "palette_2": palettes[1], "see_through": see_through, "array": array, "array_t": array.reshape(72, 64),
        "int8": array.view(np.int8), "uint16": array.view(np.uint16), "tensor": torch.from_numpy(array.copy()),
        "tensor_int8": torch.from_numpy(array.view(np.int8).copy()), "bf16": torch.zeros(8, dtype=torch.bfloat16),
        "fp16": torch.zeros(8, dtype=torch.float16), "empty": torch.zeros(0, 3), "empty_t": torch.zeros(3, 0),
    }  # fmt: skip


def test_no_two_images_have_one_key() -> None:
    steps: list[object] = [
        None, {}, {"size": 224}, {"size": 224.0}, {"size": "224"}, {"size": [224]}, {"a": 1, "b": 2}, {"a": 2, "b": 1},
        {"1": 2}, {1: 2}, True, 1, [[1], 2], [1, [2]], {"mean": torch.ones(3)}, {"mean": torch.ones(3).double()},
    ]  # fmt: skip
    keys = [prefix_key(image, step) for image in images().values() for step in steps]
    assert len(set(keys)) == len(keys)


def test_one_image_has_one_key() -> None:
    found = images()
    array = found["array"]
    assert isinstance(array, np.ndarray)
    step = {"a": 1, "b": [1.5, None], "mean": torch.ones(3)}
    again = {"mean": torch.ones(3), "b": [1.5, None], "a": 1}
    for image in found.values():
        assert prefix_key(image, step) == prefix_key(image, again)
    assert prefix_key(np.asfortranarray(array)) == prefix_key(array)
    tensor = torch.from_numpy(array.copy())
    assert prefix_key(tensor.t().contiguous().t()) == prefix_key(tensor)
    assert prefix_key(found["wide"]) == prefix_key(found["wide"].copy())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("image", "step"), [(object(), None), ("a.png", None), (np.zeros(3), object()), (np.zeros(3), {1: {2}})]
)  # fmt: skip
def test_what_has_no_content_has_no_key(image: object, step: object) -> None:
    with pytest.raises(TypeError, match="prefix_key"):
        prefix_key(image, step)
