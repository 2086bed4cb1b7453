# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: a step computes a token of each running answer and, of all new prompts together, a chunk of
rows, packed.

A request waits until its pages, at worst, are there: exhaustion queues, it never fails a running request. Requests that
begin with the same media share the pages of that prefix, and ``paged_attention`` reads them once for all.
Source: Orca (Yu et al. 2022); chunked prefill: Sarathi (Agrawal et al. 2023); prefix sharing: vLLM, SGLang.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mmkernels.cache import PagedKVCache
from mmkernels.models import MMLLM
from mmkernels.models.attention import Paged
from mmkernels.models.generate import PAGE_SIZE, new_pool
from mmkernels.serve.prefixes import Prefixes
from mmkernels.serve.request import (
    Medium,
    Request,
    RequestError,
    checked,
    key_of,
    one_line,
    text_behind,
)
from mmkernels.serve.rows import encode, go_on_from, next_rows, rows_of


@dataclass
class Counters:
    """Since the engine was made; ``pages_peak`` is the most in use at once."""

    steps: int = 0
    prompt_rows: int = 0
    rows_shared: int = 0
    new_tokens: int = 0
    prefix_hits: int = 0
    prefixes_evicted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    pages_peak: int = 0


_SPARE = 2  # pages: a copy of a shared last page for the request, and one for the prefix it leaves


class Engine:
    """Answers requests; one thread calls it.

    Args:
        model: Its features lie in the text (no gated layers).
        num_pages, page_size: Of the pool.
        max_running: Requests computed together.
        chunk: Prompt rows a step, all requests together; no request is encoded while so many wait already.
        share: Whether prefixes are kept for others.

    Raises:
        ValueError: A number below 1, or a model with gated layers.
    """

    def __init__(
        self,
        model: MMLLM,
        num_pages: int = 1024,
        page_size: int = PAGE_SIZE,
        max_running: int = 64,
        chunk: int = 256,
        share: bool = True,
    ) -> None:
        if model.config.decoder.gated_layers:
            raise ValueError("Engine: a model with gated layers reads media beside its pages")
        _check_sizes(num_pages=num_pages, page_size=page_size, max_running=max_running, chunk=chunk)
        self.model, self.max_running, self.chunk, self.share = model, max_running, chunk, share
        self.cache = PagedKVCache(new_pool(model, num_pages, page_size))
        self.counters = Counters()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._prefixes = Prefixes(self.cache)

    # What callers do

    def submit(
        self, prompt: str, media: Sequence[Medium] = (), max_new_tokens: int = 48
    ) -> Request:
        """Queues a request; ``media`` in the order of the prompt's placeholders.

        Raises:
            RequestError: Names the field; nothing is queued.
        """
        request = checked(self.model.tokenizer, prompt, media, max_new_tokens)
        request.key = key_of(request) if self.share else None
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends it now, wherever it is; its pages are free."""
        if request.finished is None:
            self._end(request, "cancelled")

    def step(self) -> list[Request]:
        """One pass of the decoder; returns the requests that have got a token or ended.

        If it raises (an interrupt, memory), no request has changed: the next call goes on to the same answers.
        """
        changed = self._admit()
        batch = self._batch()
        if batch:
            changed += self._compute(batch)
        return list(dict.fromkeys(changed))

    def run(self) -> None:
        """Steps until nothing is left."""
        while self._waiting or self._running:
            self.step()

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of its text as they come; other requests go on meanwhile."""
        sent = 0
        while True:
            if len(request.text) > sent:
                yield request.text[sent:]
                sent = len(request.text)
            if request.finished is not None:
                return
            self.step()

    def drop_prefixes(self) -> None:
        """Lets go of every kept prefix."""
        while self._evict():
            pass

    @property
    def pages_in_use(self) -> int:
        return self.cache.pool.num_pages - self.cache.pool.num_free

    # Admission

    def _admit(self) -> list[Request]:
        """In the order they came; one whose prefix is being computed waits for it, then finds it."""
        ended = []
        for request in list(self._waiting):
            # rows behind a full chunk would not be computed now: their media need not hold the others up
            if len(self._running) >= self.max_running or self._backlog() >= self.chunk:
                break
            if request.key and request.key in self._computing():
                continue
            try:
                self._prepare(request)
            except Exception as error:  # whatever an encoder raises is of this request alone
                request.error = one_line(error)
                self._end(request, "error")
                ended.append(request)
                continue
            if not self._make_room(request):
                break
            self._waiting.remove(request)
            self._running.append(request)
            self._start(request)
        return ended

    def _computing(self) -> set[str]:
        """Keys of prefixes that are on their way."""
        return {r.key for r in self._running if r.key and not r.prefix_rows and r.done < rows_of(r)}

    def _backlog(self) -> int:
        """Prompt rows of running requests that are still to be computed."""
        return sum(rows_of(r) - r.done for r in self._running)

    @torch.no_grad()
    def _prepare(self, request: Request) -> None:
        """Rows and positions of its prompt, but for what a kept prefix has."""
        kept = self._prefixes.get(request.key)
        if kept is not None:
            go_on_from(self.model, request, kept)
        elif request.embeds is None or request.prefix_rows:  # that prefix has gone since
            encode(self.model, request)
        self._check_size(request)

    def _check_size(self, request: Request) -> None:
        most = self.model.config.decoder.max_position_embeddings
        need, pages = self._length(request), self.cache.pool.num_pages
        least = self._pages(need) + _SPARE + 1  # a kept prefix may end within a page
        if need > most:
            raise RequestError(
                f"max_new_tokens: prompt and answer need {need} positions, the model has {most}"
            )
        if least > pages:
            raise RequestError(f"prompt: needs {least} pages, the pool has {pages}")

    def _make_room(self, request: Request) -> bool:
        """Whether the pages it needs at worst are there beside what running requests may still take; prefixes that
        nobody has used lately give way."""
        promised = sum(self._worst(r) for r in self._running)
        while promised + self._worst(request) > self.cache.pool.num_free:
            if not self._evict(spare=request.key):
                return False
        return True

    def _worst(self, request: Request) -> int:
        """Pages it may still take: copies of shared last pages are in ``_SPARE``."""
        total = self._pages(self._length(request)) + _SPARE
        if request.sequence < 0:
            return total - request.prefix_rows // self.cache.pool.page_size
        return total - len(self.cache.pages(request.sequence))

    def _length(self, request: Request) -> int:
        """Rows of prompt and answer."""
        assert request.embeds is not None
        return request.prefix_rows + len(request.embeds) + request.max_new_tokens

    def _pages(self, rows: int) -> int:
        return -(-rows // self.cache.pool.page_size)

    def _start(self, request: Request) -> None:
        kept = self._prefixes.get(request.key)
        if kept is None or request.key is None:
            request.sequence = self.cache.add()
            return
        request.sequence = self._prefixes.fork(request.key)
        self.counters.prefix_hits += 1
        self.counters.rows_shared += kept.rows

    # A step

    def _batch(self) -> list[tuple[Request, int]]:
        """Who computes how many rows: a token each, and prompts in the order they came, up to a chunk."""
        batch, left = [], self.chunk
        for request in self._running:
            assert request.embeds is not None
            todo = len(request.embeds) - request.done
            count = min(todo, left) if todo else 1
            left -= count if todo else 0
            if count:
                batch.append((request, count))
        return batch

    def _compute(self, batch: list[tuple[Request, int]]) -> list[Request]:
        """A pass, or none: pages are taken before the decoder runs, and given back if it does not end."""
        before = [self._state(request) for request, _ in batch]
        try:
            return self._pass(batch)
        except BaseException:
            for (request, _), state in zip(batch, before, strict=True):
                if request.finished is None:
                    self._set_back(request, *state)
            raise

    def _state(self, request: Request) -> tuple[int, int, int, int]:
        """What a pass changes: rows in the cache, the position after them, rows of the prompt, tokens."""
        held, following = (
            self.cache.length(request.sequence), self.cache.next_position(request.sequence),
        )  # fmt: skip
        return held, following, request.done, len(request.tokens)

    def _set_back(self, request: Request, held: int, following: int, done: int, said: int) -> None:
        self.cache.truncate(request.sequence, held)
        self.cache.set_next_position(request.sequence, following)
        request.done = done
        del request.tokens[said:]

    @torch.no_grad()
    def _pass(self, batch: list[tuple[Request, int]]) -> list[Request]:
        counts = [n for _, n in batch]
        attend = Paged(self.cache, [r.sequence for r, _ in batch], counts)
        next_positions = attend.position_ids.split(counts)
        rows = [
            next_rows(self.model, r, n, p) for (r, n), p in zip(batch, next_positions, strict=True)
        ]
        embeds, positions = torch.cat([e for e, _ in rows]), torch.cat([p for _, p in rows], -1)
        hidden_states = self.model.language_model(embeds, positions, attend)
        ends = torch.tensor(counts).cumsum(0) - 1
        speaks = [i for i, (r, n) in enumerate(batch) if r.done + n >= rows_of(r)]
        tokens = self.model.logits(hidden_states[ends[speaks]]).argmax(-1).tolist()
        for request, count in batch:
            self._advance(request, count)
        self.counters.steps += 1
        self.counters.pages_peak = max(self.counters.pages_peak, self.pages_in_use)
        for i, token in zip(speaks, tokens, strict=True):
            self._say(batch[i][0], token)
        return [batch[i][0] for i in speaks]

    def _advance(self, request: Request, count: int) -> None:
        """Counts rows of a prompt; keeps its prefix when it is computed to the end."""
        rows = rows_of(request)
        if request.done >= rows:
            return
        request.done += count
        self.counters.prompt_rows += count
        assert request.position_ids is not None
        if request.done == rows:
            following = int(request.position_ids.max()) + 1
            self.cache.set_next_position(request.sequence, following)
            if request.key and not request.prefix_rows and not self._prefixes.get(request.key):
                self._keep(request, request.key)

    def _keep(self, request: Request, key: str) -> None:
        """The prompt without the text behind its last medium."""
        assert request.position_ids is not None
        rows = rows_of(request) - len(text_behind(request))
        following = int(request.position_ids[..., :rows].max()) + 1
        self._prefixes.keep(key, request.sequence, rows, following)

    def _say(self, request: Request, token: int) -> None:
        if token == self.model.tokenizer.eos:
            self._end(request, "end")
            return
        request.push(token)
        self.counters.new_tokens += 1
        if len(request.tokens) == request.max_new_tokens:
            self._end(request, "length")

    def _end(self, request: Request, why: str) -> None:
        request.finished = why
        request.text = self.model.tokenizer.decode(request.tokens)
        request.embeds = request.position_ids = None
        if request in self._running:
            self._running.remove(request)
        if request in self._waiting:
            self._waiting.remove(request)
        if request.sequence >= 0:
            self.cache.free(request.sequence)
            request.sequence = -1
        name = {"cancelled": "cancelled", "error": "failed"}.get(why, "finished")
        setattr(self.counters, name, getattr(self.counters, name) + 1)

    def _evict(self, spare: str | None = None) -> bool:
        gone = self._prefixes.evict(spare)
        self.counters.prefixes_evicted += gone
        return gone


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"Engine: {name} must be at least 1, got {value!r}")
