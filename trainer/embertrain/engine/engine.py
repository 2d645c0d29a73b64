"""The engine: requests that come and go, and one forward call a step for all that run.

A step is one token of every request that decodes, and then, as far as `step_tokens` allow, chunks of prompts, oldest
request first; all of it is one packed `Batch`. A request is let in when a sequence and the pages for all its tokens are
free. It takes pages as it grows; when there are none, the youngest that runs is pre-empted: its rows are exported, and
come back when there is room. The oldest one always goes on, since a request that could not run alone is refused.

Batch-invariant mode gives a request the same bits whatever else runs: prompts are cut at absolute multiples of 128
tokens, one block of each a step, and the model's products do not depend on what is beside a row
(`Model.batch_invariant`).

With `prefixes` a request begins behind the pages of its prompt that are on disk, and leaves its own there (`prefix`).

It knows no text, no clock and no thread: `step` is called by whoever owns the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..cache.cache import Cache
from ..cache.spec import PAGE_TOKENS, CacheSpec
from ..errors import ConfigError, ContextError, NotFinite, VocabularyError
from ..model.batch import Batch
from ..model.model import Model
from .request import Finish, Request, Token
from .sampling import Sampling, choose

if TYPE_CHECKING:
    from ..prefix import Prefixes, Reuse


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much runs at once."""

    sequences: int = 8
    """Requests that run at once."""
    pages: int = 64
    """Pages of the cache, of 128 tokens each, shared by all that run."""
    step_tokens: int = 512
    """Tokens of one forward call."""
    drafts: int = 0
    """Tokens that speculation may take back (`Cache.truncate`)."""
    batch_invariant: bool = False
    """Whether a request's bits may not depend on what else runs. Slower."""

    def __post_init__(self) -> None:
        if min(self.sequences, self.pages) < 1 or self.drafts < 0:
            raise ConfigError("engine: sequences and pages must be positive, drafts not negative")
        least = self.sequences + (PAGE_TOKENS if self.batch_invariant else 1)
        if self.step_tokens < least:
            raise ConfigError(f"engine: step_tokens is {self.step_tokens}, and must be {least} or more")


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens `request.length` to `end` of a request."""

    request: Request
    end: int


class Engine:
    """Generation by one model, in one cache."""

    def __init__(self, model: Model, *, config: EngineConfig | None = None, prefixes: Prefixes | None = None) -> None:
        """With `prefixes` it is to be closed. Raises ConfigError, and what `Prefixes.open` does."""
        self.model, self.config = model, config or EngineConfig()
        weight = model.embed.weight
        self.device = weight.device
        self.cache = Cache(
            CacheSpec.of(model.config, weight.dtype),
            sequences=self.config.sequences,
            pages=self.config.pages,
            drafts=self.config.drafts,
            device=self.device,
        )
        self.reuse: Reuse | None = None
        if prefixes is not None:
            self.reuse = prefixes.open(model, self.cache.spec, batch_invariant=self.config.batch_invariant)
            least = self.config.sequences + PAGE_TOKENS
            if self.reuse.replays and self.config.step_tokens < least:
                self.reuse.close()
                raise ConfigError(f"engine: zero windows replay whole pages: step_tokens must be {least} or more")
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._count = 0

    @property
    def tokens_max(self) -> int:
        """Tokens a request may have, prompt and answer."""
        return min(self.model.config.positions_max, self.config.pages * PAGE_TOKENS)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._running

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> Request:
        """A request that runs from the next step on. Raises ContextError, VocabularyError."""
        if not prompt_ids:
            raise ContextError("a prompt needs a token")
        if max_new_tokens < 1:
            raise ContextError(f"max_new_tokens is {max_new_tokens}, and must be 1 or more")
        wrong = next((n for n in prompt_ids if not 0 <= n < self.model.config.vocab_size), None)
        if wrong is not None:
            raise VocabularyError(f"token {wrong} is outside the model's vocabulary of {self.model.config.vocab_size}")
        if len(prompt_ids) + max_new_tokens > self.tokens_max:
            limit = "the model is made for"
            if self.tokens_max < self.model.config.positions_max:
                limit = "the engine's cache holds"
            raise ContextError(
                f"{len(prompt_ids)} tokens and {max_new_tokens} new ones are more than the {self.tokens_max} {limit}"
            )
        request = Request(self._count, tuple(prompt_ids), sampling or Sampling(), max_new_tokens, frozenset(stop_ids))
        self._count += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """It gets no more tokens, and its place is free."""
        if request.finish is None:
            self._end(request, "cancelled")

    def step(self) -> list[Token]:
        """One forward call; gives what is new. Without requests nothing happens.

        Raises NotFinite for a request whose logits are not: it has ended then, and what the step has given to others is
        theirs all the same (`Request.new_ids`). A step that something else has ended (Ctrl-C, no memory) has written
        a part of its rows: the engine is not to be used after it.
        """
        runs = self._plan()
        if not runs:
            assert self.idle
            return []
        ids = [token for run in runs for token in run.request.ids(run.request.length, run.end)]
        spans, ready, at = [], [], 0
        for run in runs:
            first, count = run.request.length, run.end - run.request.length
            assert run.request.sequence is not None
            spans.append((first, count, run.request.sequence))
            at += count
            if run.end == run.request.count:
                ready.append((at - 1, run.request))
        batch = Batch.of(spans, logits=[row for row, _ in ready], device=self.device)
        if self.model.apart != self.config.batch_invariant:  # It is new, or another engine's, too.
            self.model.batch_invariant(self.config.batch_invariant)
        with torch.no_grad():
            ids_T = torch.tensor(ids, device=self.device)
            logits = self.model(ids_T, batch, self.cache, checked=True).logits
            wanted = [(request.sampling, len(request.new_ids)) for _, request in ready]
            chosen = choose(logits, wanted) if ready else []
        for run in runs:
            run.request.length = run.end
            self._keep(run.request)
        return self._take([request for _, request in ready], chosen)

    def stream(self, request: Request) -> Iterator[int]:
        """The request's tokens as they come; steps are made, for all, while there is nothing new."""
        given = 0
        while given < len(request.new_ids) or request.finish is None:
            if given == len(request.new_ids):
                self.step()
            else:
                given += 1
                yield request.new_ids[given - 1]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> list[Request]:
        """The requests of all prompts, ended."""
        requests = [self.submit(p, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids) for p in prompts]
        while any(request.finish is None for request in requests):
            self.step()
        return requests

    def close(self) -> None:
        """What is to be kept of prefixes is kept when this returns. Closing twice is allowed."""
        if self.reuse is not None:
            self.reuse.close()

    # ---- what a step is made of

    def _plan(self) -> list[_Run]:
        for request in tuple(self._running):
            if request.sequence is not None and request.decodes:  # an older one may have taken its place meanwhile
                self._grow(request)
        self._admit()
        runs = [_Run(request, request.count) for request in self._running if request.decodes]
        left = self.config.step_tokens - len(runs)
        for request in self._running:
            if request.decodes:
                continue
            end = self._chunk_end(request, left)
            if end is None:
                break
            left -= end - request.length
            runs.append(_Run(request, end))
        return runs

    def _chunk_end(self, request: Request, left: int) -> int | None:
        """Where the next chunk of its prompt ends; None: there is no room in this step."""
        if self.config.batch_invariant:
            end = min(request.count, (request.length // PAGE_TOKENS + 1) * PAGE_TOKENS)
            return end if end - request.length <= left else None
        end = min(request.count, request.length + left)
        if request.trail is not None:
            end = request.trail.cut(request.length, end)
        return end if end > request.length else None

    def _grow(self, request: Request) -> None:
        """Room for one more token, or its own place is given away."""
        assert request.sequence is not None
        while self.cache.lacks(request.sequence, request.count) > self.cache.free_pages:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return
        self.cache.reserve(request.sequence, request.count)

    def _preempt(self, request: Request) -> None:
        assert request.sequence is not None
        if request.trail is not None and request.trail.replays(request.length):
            request.length, request.trail = 0, None  # Half of its windows are of no use.
        request.rows = self.cache.export(request.sequence, 0, request.length) if request.length else None
        request.preempted += 1
        self._leave(request)
        self._waiting.insert(0, request)  # whoever waits is younger still

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.config.sequences:
            request = self._waiting[0]
            if -(-request.count // PAGE_TOKENS) > self.cache.free_pages:
                return
            self._waiting.pop(0)
            request.sequence = self.cache.open()
            if request.rows is not None:
                self.cache.import_(request.sequence, 0, request.length, request.rows)
                request.rows = None
            elif self.reuse is not None:
                request.trail = self.reuse.restore(self.cache, request.sequence, request.prompt_ids)
                request.length = self.cache.length(request.sequence)
            self.cache.reserve(request.sequence, request.count)
            self._running.append(request)

    def _keep(self, request: Request) -> None:
        if self.reuse is not None and request.trail is not None and request.sequence is not None:
            self.reuse.reached(request.trail, self.cache, request.sequence, request.length, request.ids)

    def _take(self, requests: list[Request], chosen: list[int | None]) -> list[Token]:
        tokens: list[Token] = []
        broken: Request | None = None
        for request, token in zip(requests, chosen, strict=True):
            if token is None:
                broken = broken or request
                self._end(request, "not finite")
                continue
            request.new_ids.append(token)
            tokens.append(Token(request, token))
            if token in request.stop_ids:
                self._end(request, "stop")
            elif len(request.new_ids) == request.max_new_tokens:
                self._end(request, "length")
        if broken is not None:
            raise NotFinite(f"request {broken.number}: logits after {broken.length} tokens are not finite")
        return tokens

    def _end(self, request: Request, why: Finish) -> None:
        request.finish = why
        request.rows = None
        if request.sequence is None:
            self._waiting.remove(request)
        else:
            if self.reuse is not None and request.trail is not None:
                self.reuse.ended(request.trail)
            self._leave(request)

    def _leave(self, request: Request) -> None:
        assert request.sequence is not None
        self.cache.close(request.sequence)
        self._running.remove(request)
        request.sequence = None
