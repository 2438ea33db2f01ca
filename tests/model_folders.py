"""Folders that look like models to whoever reads their small files only: no weight in them is real."""

import json
from collections.abc import Sequence
from pathlib import Path


def model_folder(
    path: Path,
    *,
    positions: int = 4096,
    vocabulary: int = 4,
    parameters: int = 1000,
    words: Sequence[str] = ("a", "b", "c"),
) -> Path:
    """Write config.json, tokenizer.json and the header of model.safetensors, whose data is a hole in the file."""
    path.mkdir(parents=True)
    config = {"model_type": "llama", "max_position_embeddings": positions, "vocab_size": vocabulary}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"model": {"vocab": {word: number for number, word in enumerate(words)}}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensor = {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * parameters)
    return path
