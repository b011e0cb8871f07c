"""The values of a log.txt in TensorBoard, wandb or trackio. A separate process reads the log, so a tracker that
fails, hangs or is slow cannot harm the run. If the run is killed, that process still sends the rest of the log.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from neogpt import config, files

LINGER = 30  # seconds that the process has to send the rest of the log after the end of the run
VALUE = re.compile(rb"^(\d+) (\S+) (-?(?:\d[\d.e+-]*|inf|nan))$", re.M)  # step, name, value
HEADER = re.compile(rb"^# code=", re.M)  # the run starts or is resumed


def start(kind: str, folder: Path, step: int, constants: dict[str, Any]) -> subprocess.Popen | None:
    """Start the process that sends what is appended to folder/log.txt, from `step` on. None for kind ""."""
    if not kind:
        return None
    args = kind, str(folder.resolve()), step, (folder / "log.txt").stat().st_size, constants
    command = [sys.executable, "-m", "neogpt.track", json.dumps(args)]
    return subprocess.Popen(command, cwd=config.ROOT, stdin=subprocess.PIPE, start_new_session=True)


def stop(process: subprocess.Popen | None) -> None:
    """Wait until the rest of the log is sent, at most about LINGER seconds."""
    with suppress(subprocess.TimeoutExpired):
        if process:
            process.communicate(timeout=LINGER + 5)  # closes standard input


def connect(kind: str, folder: Path, step: int, name: str, constants: dict[str, Any]) -> tuple[Callable, Callable]:
    """Functions send(step, values by name) and close(). wandb and trackio continue a run of this name."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=step, flush_secs=5)  # without older values from `step` on
        return lambda step, values: [writer.add_scalar(*item, step) for item in values.items()], writer.close
    extra: dict[str, Any] = dict(id=name, dir=str(folder), settings=dict(console="off")) if kind == "wandb" else {}
    project = os.environ.get("WANDB_PROJECT", "neogpt")
    run = importlib.import_module(kind).init(project=project, name=name, resume="allow", config=constants, **extra)
    return lambda step, values: run.log(values, step=step), run.finish


def follow(kind: str, folder: Path, step: int, position: int, constants: dict[str, Any], end: threading.Event) -> None:
    """Send the values in folder/log.txt from byte `position` on, until the run has ended or is started again."""
    with open(folder / "log.txt", "rb") as log, open(folder / "track_name", "a+", buffering=1) as file:
        files.lock(file, wait=True)  # the processes of a run that was killed and resumed work one after another
        file.seek(0)
        name, old = file.read().strip(), log.read(position)
        # values cannot be dropped in wandb and trackio, so each is sent once: a resumed run repeats it bit for bit
        sent = {match[:2] for match in VALUE.findall(old)} if name and kind != "tensorboard" else set()
        if not name:
            name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
            file.write(name + "\n")
        send, close = connect(kind, folder, step, name, constants)
        done, later, text = False, [], b""
        while not (done or later):
            done = end.wait(1.0)  # before reading, so that the last values are read
            complete, _, text = (text + log.read()).rpartition(b"\n")
            complete, *later = HEADER.split(complete, 1)
            for number, key, value in VALUE.findall(complete):
                if (number, key) not in sent:
                    send(int(number), {key.decode(): float(value)})
        close()


def main(kind: str, folder: str, *rest: Any) -> None:
    """The process of `start`: `follow` until the run ends, which closes standard input."""
    for signum in [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]:
        signal.signal(signum, signal.SIG_IGN)  # the run saves before it ends
    end = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        end.set()
        time.sleep(LINGER)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    try:
        follow(kind, Path(folder), *rest, end)
    except BaseException as error:  # trackers raise many kinds, also SystemExit
        sys.exit(f"--track={kind} has stopped, the run goes on: {files.one_line(error)} (pip install {kind}?)")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
