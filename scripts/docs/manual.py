"""Writes the tables of README.md and docs/, checks their links, and runs their commands.

`make docs` writes the tables. `make docs-check` compares them with what they are made from, and runs the commands in a
fresh clone; with --quick without those that take minutes or are stages of .ci/run.

The pages are README.md and those that docs/index.md links to, in its order. A table is between `<!-- table: NAME -->`
and `<!-- end -->`. The commands are the lines of the blocks fenced as `sh`. They run page by page, in one clone in a
temporary folder, where `my_images/` has a few hundred digits. A server (`make ui`) must respond within five minutes,
and the first run must reach the accuracy that the README shows, but for what differs between seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tables import TABLES

from train.runtime import setup

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
INDEX = ROOT / "docs/index.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LONG = (
    "make claims QUICK=1",
    "make lint",
    "make test",
)
SERVERS = {"make ui": "http://127.0.0.1:5000/"}
SERVER_SECONDS = 300
# The lowest test accuracy of runs/latest after the command: 1.5 points below the mean of three seeds.
ACCURACY = {"make train model=vgg16_inception": 0.975}


# ----------------------------------------------------------------------------------------------------------- pages


def pages() -> list[Path]:
    """Returns README.md, the index and the pages that it links to, in its order."""
    linked = [INDEX.parent / target for target in LINK.findall(INDEX.read_text()) if target.endswith(".md")]
    return list(dict.fromkeys([README, INDEX, *(page.resolve() for page in linked)]))


def unlisted_pages() -> list[Path]:
    """Returns the pages under docs/ that the index does not link to."""
    return sorted(set(INDEX.parent.glob("*.md")) - set(pages()))


def updated(page: Path) -> str:
    """Returns the page with its tables written anew."""
    with setup.redirect_fds(Path(os.devnull), 2):  # TensorFlow's libraries log while they are loaded
        return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page.read_text())


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page to a file or heading that does not exist; links to other sites are not followed."""
    targets = [target for target in LINK.findall(CODE.sub("", page.read_text())) if "://" not in target]
    return [target for target in targets if not _exists(page, *target.partition("#")[::2])]


def _exists(page: Path, name: str, anchor: str) -> bool:
    path = (page.parent / name).resolve() if name else page
    return path.exists() and (not anchor or anchor in anchors(path))


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = HEADING.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -------------------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> list[str]:
    """Returns the lines of the `sh` blocks, without comments."""
    lines = [line for block in COMMANDS.findall(page.read_text()) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def run_commands(lines: list[str]) -> int:
    """Runs the commands in a fresh clone with an almost empty environment. Returns the number that failed."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="manual-") as root:
        clone = Path(root) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        write_images(clone / "my_images")
        for line in lines:
            start = time.perf_counter()
            code = serve(line, clone) if line in SERVERS else shell(line, clone)
            code = code or missed_accuracy(line, clone)
            print(f"{'ok    ' if code == 0 else 'FAILED'} {time.perf_counter() - start:6.1f} s  {line}", flush=True)
            failed += code != 0
    return failed


def shell(line: str, folder: Path) -> int:
    with (folder.parent / "log").open("w+") as log:
        code = subprocess.run(["bash", "-c", line], cwd=folder, env=environment(), stdout=log, stderr=log).returncode
        if code:
            log.seek(0)
            print(log.read())
    return code


def serve(line: str, folder: Path) -> int:
    """Starts a server. Returns 0 if it responds in time, else 1."""
    server = subprocess.Popen(
        ["bash", "-c", line], cwd=folder, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                return 0 if urllib.request.urlopen(SERVERS[line], timeout=5).status == 200 else 1
            except OSError:
                continue
        return 1
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def missed_accuracy(line: str, clone: Path) -> int:
    """Returns 1 if the run of this command has a lower test accuracy than it must reach, else 0."""
    if line not in ACCURACY:
        return 0
    accuracy = json.loads((clone / "runs/latest/summary.json").read_text())["test"]["accuracy"]
    print(f"       test accuracy {accuracy:.4f}, must be at least {ACCURACY[line]}")
    return int(accuracy < ACCURACY[line])


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("HOME", "PATH")}


def write_images(root: Path) -> None:
    """Writes 400 of scikit-learn's digits as PNG files in class folders, and a CSV table of them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:400], digits.target[:400], strict=True)):
        folder = root / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((64, 64)).save(folder / f"{number}.png")
    lines = [f"{path.relative_to(root.parent)},{path.parent.name}" for path in sorted(root.glob("*/*.png"))]
    root.with_suffix(".csv").write_text("\n".join(["path,label", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the tables, check the links, run the commands")
    parser.add_argument("--quick", action="store_true", help="skip the commands that take minutes")
    arguments = parser.parse_args()
    if not arguments.check:
        for page in pages():
            page.write_text(updated(page))
        return
    faults = [f"{page.name} is not in docs/index.md; add a link" for page in unlisted_pages()]
    faults += [f"{page.name} links to {link}, which does not exist" for page in pages() for link in broken_links(page)]
    faults += [
        f"the tables in {page.name} are out of date; run make docs"
        for page in pages()
        if updated(page) != page.read_text()
    ]
    lines = [line for page in pages() for line in commands(page)]
    faults += [
        f"LONG in scripts/docs/manual.py has a command that no page has: {line}" for line in set(LONG) - set(lines)
    ]
    if faults:
        sys.exit("\n".join(faults))
    failed = run_commands([line for line in lines if not (arguments.quick and line in LONG)])
    sys.exit(f"{failed} commands of the manual failed" if failed else None)


if __name__ == "__main__":
    main()
