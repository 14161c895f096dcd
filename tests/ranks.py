"""Processes like torchrun's, forked from one that has imported torch: to import it takes longer
than most of them need for their work.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "toy", "torch._dynamo"])


def run_script(command, printed, environment):
    """What `python *command` does; what it prints is appended to a file."""
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)  # torchrun's processes have one
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Ranks:
    """`count` processes of a script. Its methods are subprocess.Popen's."""

    def __init__(self, *command, count):
        self.printed = tempfile.NamedTemporaryFile("r", encoding="utf-8")
        self.processes = []
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_WORLD_SIZE": 1}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 20000 + os.getpid() % 20000}
        for rank in range(count):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            environment = {name: str(value) for name, value in own.items()}
            arguments = [str(part) for part in command], self.printed.name, environment
            process = SERVER.Process(target=run_script, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def returncode(self):
        return max(abs(process.exitcode) for process in self.processes)

    def poll(self):
        return None if any(process.is_alive() for process in self.processes) else self.returncode

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def communicate(self, timeout=60):
        """Waits for each at most so many seconds; gives what they printed, and nothing."""
        for process in self.processes:
            process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"not ended after {timeout} s: {self.printed.read()[-3000:]}")
        return self.printed.read(), None
