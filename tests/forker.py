"""Builds that are killed, and queries beside them: a process that imports everything once and forks for each job.

As a script it reads a job a line from its standard input and answers with the child's wait status once that has ended.
`Forker` is its other end. The script starts no thread before it forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Forker:
    """A context manager: the script as a child process, and its jobs one at a time."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            cwd=Path(__file__).parents[1], start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its child too
        self.process.wait()

    def build(self, config: Path, at: str = "", count: int = 0, seconds: float | None = None) -> bool:
        """Build; killed before or after the `count`-th rename, or after `seconds`. Whether it came to its end."""
        self._start(config=str(config), at=at, count=count, seconds=seconds)
        return self.wait()

    def start_asking(self, config: Path, queries: Path, stop: Path) -> None:
        """Answer `queries` again and again until the file `stop` is there."""
        self._start(config=str(config), queries=str(queries), stop=str(stop))

    def _start(self, **job: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")

    def wait(self) -> bool:
        """Whether the job came to its end, and was not killed; an error in it is an error here."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the forking process has ended"
        status = int(line)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert status == 0, "the build failed, see its traceback"
        return True


def kill_at(root: Path, at: str, count: int) -> None:
    """Have this process killed before or after its `count`-th rename below `root`."""
    done = 0

    def counted(move: Any) -> Any:
        def moved(source: Any, target: Any, **options: Any) -> None:
            nonlocal done
            inside = str(target).startswith(str(root))
            done += inside
            if inside and done == count and at == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target, **options)
            if inside and done == count and at == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        return moved

    os.replace, os.rename = counted(os.replace), counted(os.rename)


def main() -> None:
    import sympy  # noqa: F401  (what a model's loading imports late is imported before the forks)
    import tokenizers  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM  # noqa: F401

    from msif_core.pipeline import Pipeline

    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            try:
                pipeline = Pipeline.from_config(job["config"])
                if stop := job.get("stop"):
                    while not os.path.exists(stop):
                        pipeline.attribute(Path(job["queries"]))
                else:
                    if job["at"]:
                        kill_at(pipeline.workspace.root, job["at"], job["count"])
                    pipeline.run()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if job.get("seconds") is not None:
            time.sleep(job["seconds"])
            os.kill(child, signal.SIGKILL)  # where it has ended by itself, it is still to be waited for
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
