"""The public data sets: pinned addresses, checked by sha256, kept in data/cache/.

    python -m data.download                        # all of them (8.9 MB)
    python -m data.download aime gsm8k             # some
    python -m data.download --mirror FOLDER        # from a folder or another base address: OWNER/REPO/COMMIT/PATH

`data.load` fetches what it needs by itself. A file is written only when it is whole and its checksum is right, so after
an interruption the same command fetches what is missing. Only the standard library and tqdm are used.
"""

import argparse
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import UserError

BASE = "https://raw.githubusercontent.com/"
CACHE = Path(__file__).parent / "cache"
TIMEOUT = 30  # seconds without a byte, after which an address counts as failed


@dataclass(frozen=True)
class PinnedFile:
    paths: tuple[
        str, ...
    ]  # OWNER/REPO/COMMIT/PATH below the base address; the next one is tried when one fails
    sha256: str
    size: int  # bytes
    rows: int


def _rllm(file: str, sha256: str, size: int, rows: int) -> PinnedFile:
    """A benchmark of DeepScaleR's test sets; the repository was renamed, and both owners serve it."""
    commit = f"95ef74ffee001cce89463f2d61dfdce1d03576c1/deepscaler/data/test/{file}"
    return PinnedFile(
        (f"rllm-org/rllm/{commit}", f"agentica-project/deepscaler/{commit}"), sha256, size, rows
    )


def _gsm8k(split: str, sha256: str, size: int, rows: int) -> PinnedFile:
    commit = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    return PinnedFile((f"{commit}/grade_school_math/data/{split}.jsonl",), sha256, size, rows)


FILES = {
    "deepscaler-hard-1k": PinnedFile(
        (
            "ZhangXJ199/EDGE-GRPO/cbe13ca8e21af39f7b4c791bc6226348267dbfb2/train_data/deepscaler_hard-1k.json",
        ),
        "623f45f2ae16ac60ffd5282406fb785c6d4e4c9844aa059c47e142fa5368aa48",
        1869016,
        1000,
    ),
    "aime": _rllm(
        "aime.json", "03fd341fee10fb71cf906be4eb3042081f314c4d16077489e41f9375085d20d2", 38011, 30
    ),
    "amc": _rllm(
        "amc.json", "2666a217cb566efb77ebfce61841d5d8855d4b4be89633b29df3a43dcfd942dd", 38170, 83
    ),
    "math": _rllm(
        "math.json", "02e232722dd1f9ab307124bfff40621d32193632b6b84aa9a246e701f0478141", 172073, 500
    ),
    "minerva": _rllm(
        "minerva.json",
        "ba6147602d8b2f9071ecf578e29aa1100c634bdfa982d4c6745c2bd3077554ba",
        269352,
        272,
    ),
    "olympiad_bench": _rllm(
        "olympiad_bench.json",
        "c1e099f7b5830fb843fa52d48d0af8a296a94745cb5981b4ce539dd18af6f8ee",
        1582347,
        675,
    ),
    "gsm8k": _gsm8k(
        "test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749738, 1319
    ),
    "gsm8k-train": _gsm8k(
        "train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4166206, 7473
    ),
}


def fetch(name: str, mirror: str | None = None) -> Path:
    """The cached file of a set, downloaded first if it is absent or damaged. Raises UserError if no address has it."""
    file = FILES[name]
    target = CACHE / f"{name}{Path(file.paths[0]).suffix}"
    try:
        if hashlib.sha256(target.read_bytes()).hexdigest() == file.sha256:
            return target
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(
            f"the cached {target} cannot be read: {error.strerror}; remove it and run again"
        ) from None
    failures = []
    for path in file.paths:
        address = (
            str(Path(mirror).expanduser() / path)
            if mirror and "://" not in mirror
            else f"{(mirror or BASE).rstrip('/')}/{urllib.parse.quote(path)}"
        )
        try:
            content = _read(address, file)
        except urllib.error.HTTPError as error:
            failures.append(f"{address}: the server answered {error.code} {error.reason}")
        except urllib.error.URLError as error:
            failures.append(f"{address}: no connection ({error.reason})")
        except FileNotFoundError:
            failures.append(f"{address}: there is no such file")
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(
                f"{address}: {getattr(error, 'strerror', None) or error or type(error).__name__}"
            )
        else:
            _write(target, content)
            return target
    raise UserError(
        f"could not get {name}: {'; '.join(failures)}. Check the network and run again (finished files are "
        "kept), or name a folder or address that holds the files with --mirror"
    )


def _read(address: str, file: PinnedFile) -> bytes:
    """The whole file, checked. Raises OSError, HTTPException or ValueError: what went wrong with this address."""
    stream = (
        urllib.request.urlopen(address, timeout=TIMEOUT)
        if "://" in address
        else open(address, "rb")
    )
    name, on_terminal, content = Path(address).name, sys.stderr.isatty(), bytearray()
    with (
        stream,
        tqdm(total=file.size, desc=name, unit="B", unit_scale=True, disable=not on_terminal) as bar,
    ):
        while len(content) <= file.size and (
            chunk := stream.read(1 << 16)
        ):  # an endless body is cut off
            content += chunk
            bar.update(len(chunk))
    if len(content) < file.size:
        raise ValueError(f"cut off after {len(content)} of {file.size} bytes")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"the checksum does not match (sha256 {digest[:9]}, not {file.sha256[:9]}), so the file "
            "there has changed"
        )
    if not on_terminal:
        print(f"fetched {name} ({file.size / 1e3:,.0f} kB) from {address}", file=sys.stderr)
    return bytes(content)


def _write(target: Path, content: bytes) -> None:
    """Write under a name of this process, then rename: the target is never half a file, whoever else writes it."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}; free space or make the folder writable"
        ) from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.download", description="Fetch data sets into data/cache/."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(FILES)} (default: all)"
    )
    parser.add_argument(
        "--mirror", help="a folder or base address that holds the files as OWNER/REPO/COMMIT/PATH"
    )
    flags = parser.parse_args(arguments)
    unknown = [name for name in flags.names if name not in FILES]
    if unknown:
        parser.error(f"unknown set {unknown[0]!r}; the sets are {', '.join(FILES)}")
    try:
        for name in flags.names or FILES:
            print(f"{name}: {FILES[name].rows} rows in {fetch(name, flags.mirror)}")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
