"""The connector for stock vLLM. Importing this imports neither vLLM nor torch: vLLM does it in every process."""

from typing import Any


def register() -> None:
    """Tell vLLM the connector's name, so that `kv_connector` alone finds it; vLLM calls this as a plugin."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "SalternConnector" not in KVConnectorFactory._registry:  # plugins may be loaded more than once
        KVConnectorFactory.register_connector("SalternConnector", "saltern.vllm.connector", "SalternConnector")


def __getattr__(name: str) -> Any:
    if name == "SalternConnector":
        from saltern.vllm.connector import SalternConnector

        return SalternConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
