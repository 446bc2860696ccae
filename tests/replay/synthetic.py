"""A trace made by a seed: conversations that grow, are left and taken up again, under one system prompt."""

import json
from itertools import count
from pathlib import Path
from random import Random


def write_trace(path: Path, *, seed: int, requests: int, conversations: int = 40, prompt_blocks: int = 2) -> Path:
    """Write requests of `conversations` people, the first of whom ask most, each turn a few blocks longer.

    All begin with the same `prompt_blocks` blocks. A conversation that has grown to thirty blocks begins anew.
    """
    chance = Random(seed)
    numbers = count(prompt_blocks)
    prompt = list(range(prompt_blocks))
    said: dict[int, list[int]] = {}
    milliseconds = 0
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(requests):
            person = min(int(chance.expovariate(4 / conversations)), conversations - 1)
            blocks = said.setdefault(person, [])
            if len(blocks) > 30:
                blocks.clear()
            blocks += [next(numbers) for _ in range(chance.randrange(1, 6))]
            milliseconds += chance.randrange(3) * 500
            row = {
                "timestamp": milliseconds,
                "input_length": 512 * (prompt_blocks + len(blocks)) - chance.randrange(512),
                "output_length": chance.randrange(1, 500),
                "hash_ids": prompt + blocks,
                "person": f"person {person}",
            }
            lines.write(json.dumps(row) + "\n")
    return path
