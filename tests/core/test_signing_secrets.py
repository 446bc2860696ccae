"""The cache hands signing secrets on, to schedulers and to nobody else."""

from saltern.core.cache import Cache
from saltern.core.effects import Disconnected, Effect, Received, SecretsRotated, Send
from saltern.core.messages import SchedulerHello, SigningSecrets, Welcome, WorkerHello

NAME = bytes(16)
FIRST, SECOND = b"1" * 32, b"2" * 32


def test_a_scheduler_gets_the_secrets_and_every_change_of_them() -> None:
    cache = Cache(pages=8, page_bytes=10, signing_secrets=(FIRST,))
    said = cache.handle(Received(1, SchedulerHello("a", b"a" * 16, (NAME,), 10)), 1.0)
    assert [welcome.signing_secrets for welcome in welcomes(said)] == [(FIRST,)]
    assert cache.handle(SecretsRotated((SECOND, FIRST)), 2.0) == [Send(1, SigningSecrets((SECOND, FIRST)))]
    said = cache.handle(Received(2, SchedulerHello("b", b"b" * 16, (b"x" * 16,), 10)), 3.0)
    assert [welcome.signing_secrets for welcome in welcomes(said)] == [(SECOND, FIRST)]
    cache.handle(Disconnected(1), 4.0)
    assert cache.handle(SecretsRotated((SECOND,)), 5.0) == [Send(2, SigningSecrets((SECOND,)))]


def test_a_worker_gets_none() -> None:
    cache = Cache(pages=8, page_bytes=10, naming_secret=FIRST, signing_secrets=(FIRST,))
    said = cache.handle(Received(1, WorkerHello("a", NAME, 0, 1, outlives_socket=False)), 1.0)
    assert [(welcome.naming_secret, welcome.signing_secrets) for welcome in welcomes(said)] == [(b"", ())]
    assert cache.handle(SecretsRotated((SECOND,)), 2.0) == []


def welcomes(effects: list[Effect]) -> list[Welcome]:
    """Return what was sent to whoever said hello."""
    messages = [effect.message for effect in effects if isinstance(effect, Send)]
    return [message for message in messages if isinstance(message, Welcome)]
