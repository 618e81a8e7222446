"""Public data sets (8.9 MB in all), downloaded once from pinned addresses into data/cache/.

`data.load` downloads what it needs by itself; each file is checked by its sha256. A mirror is a
folder or another base address, which holds the files as OWNER/REPO/COMMIT/PATH.
"""

import hashlib
import http.client
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

BASE = "https://raw.githubusercontent.com/"
CACHE = Path(__file__).parent / "cache"
TIMEOUT = 30  # seconds without an answer from the server


@dataclass(frozen=True)
class PinnedFile:
    sha256: str
    paths: tuple[str, ...]  # OWNER/REPO/COMMIT/PATH, below the base address; tried in this order


def _benchmark(file: str, sha256: str) -> PinnedFile:
    """A test set of DeepScaleR. The repository was renamed, so the file has two addresses."""
    path = f"95ef74ffee001cce89463f2d61dfdce1d03576c1/deepscaler/data/test/{file}"
    return PinnedFile(sha256, (f"rllm-org/rllm/{path}", f"agentica-project/deepscaler/{path}"))


GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
FILES = {
    "deepscaler-hard-1k": PinnedFile(
        "623f45f2ae16ac60ffd5282406fb785c6d4e4c9844aa059c47e142fa5368aa48",
        (
            "ZhangXJ199/EDGE-GRPO/cbe13ca8e21af39f7b4c791bc6226348267dbfb2/"
            "train_data/deepscaler_hard-1k.json",
        ),
    ),
    "aime": _benchmark(
        "aime.json", "03fd341fee10fb71cf906be4eb3042081f314c4d16077489e41f9375085d20d2"
    ),
    "amc": _benchmark(
        "amc.json", "2666a217cb566efb77ebfce61841d5d8855d4b4be89633b29df3a43dcfd942dd"
    ),
    "math": _benchmark(
        "math.json", "02e232722dd1f9ab307124bfff40621d32193632b6b84aa9a246e701f0478141"
    ),
    "minerva": _benchmark(
        "minerva.json", "ba6147602d8b2f9071ecf578e29aa1100c634bdfa982d4c6745c2bd3077554ba"
    ),
    "olympiad_bench": _benchmark(
        "olympiad_bench.json", "c1e099f7b5830fb843fa52d48d0af8a296a94745cb5981b4ce539dd18af6f8ee"
    ),
    "gsm8k": PinnedFile(
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        (f"{GSM8K}/test.jsonl",),
    ),
    "gsm8k-train": PinnedFile(
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        (f"{GSM8K}/train.jsonl",),
    ),
}


def fetch(name: str, mirror: str | None = None) -> Path:
    """Return the cached file of a set, after downloading it if it is absent or damaged.

    `mirror` is a folder or base address to use in place of BASE. Raises UserError if no address
    has the file, and OSError if the cache cannot be written.
    """
    file = FILES[name]
    target = CACHE / f"{name}{Path(file.paths[0]).suffix}"
    if target.is_file() and _sha256(target.read_bytes()) == file.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        unfinished.write_bytes(_download(name, mirror or BASE))
        unfinished.replace(target)  # so `target` is never half a file, whoever else writes it
    return target


def _download(name: str, base: str) -> bytes:
    """Return the checked content from the first address that has it, or raise UserError."""
    if "://" not in base:
        base = Path(base).expanduser().resolve().as_uri()
    failures = []
    for path in FILES[name].paths:
        address = f"{base.rstrip('/')}/{path}"
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as stream:
                content = stream.read()
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{address}: {getattr(error, 'reason', None) or error}")
            continue
        if _sha256(content) == FILES[name].sha256:
            print(f"downloaded {name} from {address}", file=sys.stderr)
            return content
        failures.append(f"{address}: the checksum does not match, so the file there has changed")
    raise UserError(
        f"could not download {name} ({'; '.join(failures)}); check the network and run again, "
        "or name a folder or base address that holds the files with --mirror"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
