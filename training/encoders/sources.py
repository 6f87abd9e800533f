"""Where an encoder comes from: a stage directory, or a folder or hub id of a pretrained model.

Pretrained files are fetched by the hub's own client, safetensors, JSON and vocabularies only:
nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline import storage

from ..results import CONFIG, JOB, WEIGHTS, committed

FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.txt.gz")
"""What a pretrained model may consist of."""


@dataclass(frozen=True)
class Source:
    """`where` is a directory of ours (stage) or what a user wrote (pretrained)."""

    family: str
    where: str
    pretrained: bool
    planned: Any = None
    """A stage that is written nowhere, in whose place it stands."""

    @classmethod
    def of(cls, options: Mapping[str, Any], name: str) -> Source:
        """The source that an EncoderSpec's options name."""
        if "stage" in options:
            return open_source(options["stage"], name)
        return cls(options.get("family", _family(name)), options["pretrained"], True)

    def options(self) -> dict[str, Any]:
        """What `of` reads."""
        if self.pretrained:
            return {"pretrained": self.where, "family": self.family}
        return {"stage": self.where}

    def directory(self) -> Path:
        """The local folder with the files; fetched when it is a hub id."""
        return fetch(self.where) if self.pretrained else Path(storage.local_path(self.where))

    def weights_sha256(self) -> str:
        """One hash for all weights."""
        if not self.pretrained:
            done = committed(self.directory())
            return done["weights_sha256"] if done else _sha256(self.directory() / WEIGHTS)
        return hashlib.sha256(
            "".join(
                _sha256(file) for file in files(self.directory()) if file.suffix == ".safetensors"
            ).encode()
        ).hexdigest()

    def config(self) -> Any:
        """What else decides the numbers: a stage's config, a pretrained model's other files.

        Options of a config that are not set are left out: a new one changes no fingerprint.
        """
        directory = self.directory()
        if not self.pretrained:
            return _set(storage.read_json(str(directory / CONFIG))["config"])
        small = (file for file in files(directory) if file.suffix != ".safetensors")
        return {file.relative_to(directory).as_posix(): _sha256(file) for file in small}


def open_source(source: str | Path | Source, name: str) -> Source:
    """The source that a user names: a folder that our stages wrote, else a pretrained model."""
    if isinstance(source, Source):
        return source
    if "://" not in str(source) or storage.is_local(str(source)):
        directory = Path(storage.local_path(str(source)))
        described = _described(directory)
        if described and described["kind"] == "pretrained":  # in a generator's folder
            return Source(described["config"]["family"], str(directory / "model"), True)
        if described and (directory / WEIGHTS).is_file():
            return Source(described["kind"], storage.absolute(str(directory)), False)
        if described or (directory / JOB).exists():
            raise ValueError(f"{name}: stage {source} is not trained yet; train it first")
    return Source(_family(name), str(source), True)


def _set(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _set(value) for key, value in config.items() if value is not None}


def _described(directory: Path) -> dict[str, Any] | None:
    """Our config.json; other libraries' has other keys."""
    try:
        content = json.loads((directory / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content if isinstance(content, dict) and content.keys() == {"kind", "config"} else None


def _family(name: str) -> str:
    return name.partition("_")[0]


def fetch(where: str) -> Path:
    """The folder of a pretrained model: a local one or a hub id's snapshot, "#sub" inside it."""
    where, _, inside = where.partition("#")
    root = Path(where)
    if not root.is_dir():
        if where.startswith((".", "/", "~")) or where.count("/") > 1:
            raise ValueError(
                f"{where}: no such folder, and not a hub id (organisation/name) either"
            )
        from huggingface_hub import snapshot_download

        patterns = [f"{inside}/{p}" if inside else p for p in FILES]
        try:
            root = Path(snapshot_download(where, allow_patterns=patterns))
        except OSError as error:  # the hub's own errors too
            raise ValueError(
                f"{where}: no such folder, and not fetched from the hub "
                f"({str(error).partition(chr(10))[0]}); give a folder that holds the model, "
                "or a hub id that can be reached or is in the hub's cache here"
            ) from None
    directory = root / inside
    if not any(file.suffix == ".safetensors" for file in files(directory)):
        raise ValueError(
            f"{directory}: no safetensors file; convert the weights, pickled ones are not read"
        )
    return directory


def here(where: str) -> Path | None:
    """The same folder where it can be had without the network; None where it cannot."""
    where, _, inside = where.partition("#")
    if Path(where).is_dir():
        return Path(where) / inside
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(where, local_files_only=True)) / inside
    except (OSError, ValueError):
        return None
    return directory if any(file.suffix == ".safetensors" for file in files(directory)) else None


def read_vision(auto: Any, directory: str, refused: str) -> tuple[Any, Any, list[str]]:
    """(the model that an Auto class of transformers makes of a folder, its pictures' preparation,
    weights that the folder lacks: they are random numbers). ValueError: `refused`, and why."""
    from transformers import AutoImageProcessor

    try:
        # The preparation in PIL gives the same numbers with and without torchvision.
        processor: Any = AutoImageProcessor.from_pretrained(
            directory, trust_remote_code=False, backend="pil"
        )
        loaded: Any = auto.from_pretrained(
            directory,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{refused} ({reason})") from None
    model, info = loaded
    return model, processor, sorted(info["missing_keys"])


def files(directory: Path) -> list[Path]:
    """The model's files, sorted; folders inside are other models'."""
    return sorted({file for pattern in FILES for file in directory.glob(pattern)})


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hashed(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(256)
def _hashed(path: str, size: int, changed: int) -> str:
    return storage.sha256(path)
