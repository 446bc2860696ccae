"""The connector and the middleware for stock vLLM.

Importing this imports neither vLLM nor torch: vLLM does it in every process.
"""

from typing import Any


def register() -> None:
    """Tell vLLM the connector's name, so that `kv_connector` alone finds it; vLLM calls this as a plugin.

    It does so wherever Saltern is installed, also for engines that don't use it and in versions that are not
    supported: those are refused when they ask for the connector, not here.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except ImportError:
        return

    if "SalternConnector" not in KVConnectorFactory._registry:  # plugins may be loaded more than once
        KVConnectorFactory.register_connector("SalternConnector", __name__, "SalternConnector")


def __getattr__(name: str) -> Any:
    """Return the middleware, or the connector after a look at vLLM's version: what it imports isn't in others."""
    if name == "TenantMiddleware":
        from saltern.vllm.middleware import TenantMiddleware

        return TenantMiddleware
    if name == "SalternConnector":
        import vllm

        from saltern.vllm.versions import check_version

        check_version(vllm.__version__)
        from saltern.vllm.connector import SalternConnector

        return SalternConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
