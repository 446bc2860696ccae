"""An engine of the torture: a process of its own that stores and loads blocks as vLLM's does, and checks each byte.

Most requests are those of chance users. Some come too late: they began before their user was erased, or name an
identity that a user had before, and must find nothing and store nothing.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from faults.torture.client import Client, NoAnswerError, Prompt, ServerLostError
from faults.torture.ledger import FINDINGS_MAX, Begun, Count, Finding, Ledger
from faults.torture.population import PROMPTS, STEADY_TENANT, USERS, User, block_bytes, generation_of, prompt_keys
from saltern.core.keys import Key
from saltern.core.messages import Refusal
from saltern.epochs import read_epochs

IDLE_SECONDS = 0.005
LATE_MAX = 16
"""Requests that wait to come late."""

LATE_SHARE, FORMER_SHARE, ABORT_SHARE, DISCARD_SHARE = 0.12, 0.08, 0.04, 0.004


class Asked(NamedTuple):
    """A request: whose prompt, and when it began."""

    user: User
    number: int
    begun: Begun


class Engine:
    """One engine, of `ranks` workers."""

    def __init__(self, socket: str, epochs_path: Path, number: int, ranks: int, ledger: Ledger, seed: int) -> None:
        self._client = Client(socket, engine=f"torture-{number}", ranks=ranks)
        self._number, self._ledger, self._epochs_path = number, ledger, epochs_path
        self._chance = random.Random(seed)
        self._late: deque[Asked] = deque()
        self._findings = 0

    def run(self) -> None:
        """Work until the torture is over."""
        while not self._ledger.is_over:
            is_open = self._client.keep_up(IDLE_SECONDS)
            if self._ledger.is_paused:
                self._ledger.note_idle(self._number)
                time.sleep(IDLE_SECONDS)
            elif is_open:
                self._request()
        self._client.close()

    def _request(self) -> None:
        """Do one request, to its end or until the server is lost."""
        try:
            with self._client.request():
                self._count(Count.REQUESTS)
                asked = self._choose()
                if asked is not None:
                    identity = asked.user.identity(self._client.naming_secret, asked.begun.generation)
                    prompt = Prompt(asked.user.tenant, identity.id, prompt_keys(identity, asked.number))
                    self._load(asked, prompt)
                    self._store(asked, prompt)
        except ServerLostError:
            self._count(Count.CUT_SHORT)
        except NoAnswerError as error:
            self._find(Count.OTHER_FAILURES, str(error))

    def _choose(self) -> Asked | None:
        """Return what to ask for, or None where a request was put off: by then its user may have been erased."""
        chance = self._chance
        if self._late and (len(self._late) == LATE_MAX or chance.random() < LATE_SHARE):
            return self._late.popleft()
        user = chance.choice(USERS)
        begun = self._ledger.begin(user)
        if user.is_signed:
            generation = read_epochs(self._epochs_path).of(user.tenant, user.tag)
            if generation and chance.random() < FORMER_SHARE:
                generation = chance.randrange(generation)
            begun = Begun(generation, begun.at)
        asked = Asked(user, chance.randrange(PROMPTS), begun)
        if chance.random() < LATE_SHARE:
            self._late.append(asked)
            return None
        return asked

    def _load(self, asked: Asked, prompt: Prompt) -> None:
        """Look for a prompt, and check all that is found of it."""
        dead_below = self._ledger.dead_below(asked.user)  # before anything is asked
        waits = self._client.waits_for_disk
        blocks = self._client.load(prompt)
        self._count(Count.WAITS_FOR_DISK, self._client.waits_for_disk - waits)
        for key, block in zip(prompt.keys, blocks, strict=False):
            self._check(asked, prompt, key, block, dead_below)
        if blocks and asked.user.tenant != STEADY_TENANT and self._chance.random() < DISCARD_SHARE:
            self._client.discard(prompt, self._chance.randrange(len(prompt.keys)))

    def _check(self, asked: Asked, prompt: Prompt, key: Key, block: bytes, dead_below: int) -> None:
        self._count(Count.CHECKED_BLOCKS)
        generation = asked.begun.generation if asked.user.is_signed else generation_of(block)
        if block != block_bytes(prompt.user, key, generation):
            self._find(Count.WRONG_BYTES, f"wrong bytes for {asked}, {key.hex()}: {block[:64].hex()} …")
        elif generation < dead_below:
            found = f"generation {generation} after {dead_below} had begun"
            self._find(Count.RESURRECTED, f"{asked} found {found}, {key.hex()}")

    def _store(self, asked: Asked, prompt: Prompt) -> None:
        """Store what is missing of a prompt, or begin to."""
        generation, dead_below = asked.begun.generation, self._ledger.dead_below(asked.user)  # before anything is asked
        reserved = self._client.reserve(prompt, asked.begun.at)
        if reserved.refusal is Refusal.ERASED:
            self._count(Count.LATE_REFUSED)
        if reserved.upto and generation < dead_below:
            self._find(Count.RESURRECTED, f"{asked} may store {reserved.upto} blocks after {dead_below} had begun")

        def block_of(index: int) -> bytes:
            return block_bytes(prompt.user, prompt.keys[index], generation)

        if reserved.lease and self._chance.random() < ABORT_SHARE:
            for grant in reserved.grants[::2]:
                self._client.write(reserved, grant.index, block_of(grant.index))
            self._client.abort(reserved)
        else:
            self._client.store(reserved, block_of)
            self._count(Count.STORED_BLOCKS, len(reserved.grants))

    def _count(self, what: Count, by: int = 1) -> None:
        self._ledger.count(self._number, what, by)

    def _find(self, what: Count, text: str) -> None:
        self._count(what)
        if self._findings < FINDINGS_MAX:
            self._findings += 1
            self._ledger.findings.put(Finding(self._number, text))


def work(socket: str, epochs_path: Path, number: int, ranks: int, ledger: Ledger, seed: int) -> None:
    """Be an engine; the target of its process."""
    logging.disable()  # that its server is lost is what this is about
    os.nice(5)  # the server comes first, on a machine with few cores
    with suppress(KeyboardInterrupt):  # of whoever sits at the terminal; the torture's own process ends us
        Engine(socket, epochs_path, number, ranks, ledger, seed).run()
