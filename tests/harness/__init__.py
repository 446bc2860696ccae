"""The harness: vLLM's real engine core and schedulers over workers that have no model.

`Engine` is vLLM's own `EngineCore` with an executor whose workers keep KV of known content. A connector is
given to it as a class, runs in both roles, and is judged by one question asked at every step: does each slot
that a request attends to hold exactly the bytes that this request's own prefix would have computed?
"""

import os

# The engine must neither reach for the network nor start processes, and its warnings about what a model would need
# hide the ones about the connector. Set before vLLM is first imported, since it reads some of them at import.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
}.items():
    os.environ.setdefault(_name, _value)
