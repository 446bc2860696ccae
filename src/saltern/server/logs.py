"""The log: one line for each decision of the core, plain for people or JSON for machines."""

import json
import logging
import sys
import time

from saltern.core.effects import Logged
from saltern.server.config import LogSettings

log = logging.getLogger("saltern")

_INFO_EVENTS = frozenset({"session-opened", "session-ended", "erased", "lost"})
"""What happens once a session, or hardly ever; everything else happens once a request, and is for debugging."""


def start_logging(settings: LogSettings) -> None:
    """Send the log to stderr as `settings` say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if settings.format == "json" else _Plain())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(settings.level.upper())


def log_decision(decision: Logged) -> None:
    """Log one decision with its engine, tenant and number of blocks."""
    level = logging.INFO if decision.event in _INFO_EVENTS else logging.DEBUG
    if log.isEnabledFor(level):
        log.log(level, "%s", decision.event, extra={"decision": decision})


def _fields(record: logging.LogRecord) -> dict[str, object]:
    decision: Logged | None = getattr(record, "decision", None)
    if decision is None:
        return {}
    return {
        "tenant": decision.tenant,
        "engine": decision.engine,
        "blocks": decision.blocks,
        "detail": decision.detail,
    }


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items() if value != "")
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{moment} {record.levelname.lower()}: {record.getMessage()}{fields}{trace}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"time": record.created, "level": record.levelname.lower()}
        line["event"] = record.getMessage()
        line |= _fields(record)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _quoted(value: object) -> str:
    """Write a value so that a peer's choice of engine id can't look like another field or line."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' ="') else json.dumps(text)
