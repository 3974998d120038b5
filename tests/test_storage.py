"""Files built once, by one of the processes that ask for them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msif_core import storage
from msif_core.errors import InputError

BUILDER = """
import sys, time
from pathlib import Path
from msif_core import storage

path, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build(temporary):
    with open(log, "a") as lines:
        lines.write("built\\n")
    time.sleep(seconds)
    temporary.write_text("content")

storage.build_once(path, build)
"""


def start(path: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    root = str(Path(storage.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(path), str(log), str(seconds)], env={**os.environ, "PYTHONPATH": root}
    )


def wait_for_lines(log: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_ask_at_the_same_time_build_once(tmp_path: Path) -> None:
    path, log = tmp_path / "folder" / "file", tmp_path / "log"
    builders = [start(path, log, 0.5) for _ in range(3)]
    assert [builder.wait(60) for builder in builders] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["file", "file.sha256"]


def test_a_killed_builder_frees_what_it_held(tmp_path: Path) -> None:
    path, log = tmp_path / "file", tmp_path / "log"
    first = start(path, log, 600)
    wait_for_lines(log, 1)
    second = start(path, log, 0)
    time.sleep(0.3)
    assert log.read_text() == "built\n", "the second waits for the first"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(60) == 0
    assert log.read_text() == "built\nbuilt\n"
    assert storage.is_whole(path)


def test_a_file_where_a_folder_is_to_be_is_named(tmp_path: Path) -> None:
    file = tmp_path / "workspace"
    file.write_text("a file")
    mend = f"{file}: a file, where a folder is to be; move it away, or name another folder"
    for path in (file, file / "server"):
        with pytest.raises(InputError, match=re.escape(mend)):
            storage.make_folder(path)
    with pytest.raises(InputError, match=re.escape(mend)), storage.locked(file / "server" / "serve"):
        pass
    with pytest.raises(InputError, match=re.escape(mend)):
        storage.write_json(file / "pins" / "s.json", {})


def test_what_another_process_is_at_comes_last(tmp_path: Path) -> None:
    """The free parts are built while another process is at the first one, which is then waited for."""
    log, built = tmp_path / "log", []
    other = start(tmp_path / "0", log, 2.0)
    wait_for_lines(log, 1)

    def build(part: int) -> None:
        def write(temporary: Path) -> None:
            temporary.write_text(str(part))

        storage.build_once(tmp_path / str(part), write)
        built.append((part, other.poll() is None))

    storage.free_first(range(3), build)
    assert other.wait(60) == 0
    assert [part for part, _ in built] == [1, 2, 0]
    assert [working for _, working in built[:2]] == [True, True], "the other process was still at work"
    assert (tmp_path / "0").read_text() == "content", "as the other process made it"
