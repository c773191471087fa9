"""One process for each of several devices; this process is the first of them."""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

import torch
from torch import distributed

from models.errors import PixelmillError
from models.learning.loading import Part

_Result = TypeVar("_Result")
_Value = TypeVar("_Value")
_PATIENCE = timedelta(hours=2)  # others wait while the first validates
_GRACE_S = 30.0
_READY = "ready"


def together(devices: Sequence[str], work: Callable[..., _Result], shared: tuple, own: tuple) -> _Result:
    """`work(device, part, *shared, *own)` here, and `work(device, part, *shared)` in a process for each further device.

    `shared` travels there as a copy, so that no two processes learn in the same memory. Raises what `work` raises here,
    or PixelmillError with what it raised in another process.
    """
    if len(devices) == 1:
        return work(torch.device(devices[0]), Part(), *shared, *own)
    context = multiprocessing.get_context("spawn")
    pickled = pickle.dumps((work, shared))
    others: list[tuple[SpawnProcess, Connection]] = []
    grace_s = 0.0
    with tempfile.TemporaryDirectory(prefix="pixelmill-") as folder:
        meeting = f"file://{folder}/meeting"
        try:
            for rank, device in enumerate(devices[1:], 1):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (pickled, device, Part(rank, len(devices)), meeting, sender)
                process = context.Process(target=_other, args=arguments, daemon=True)
                process.start()
                sender.close()
                others.append((process, receiver))
            for process, receiver in others:
                # One that dies before they meet would be waited for until the end of all patience.
                wait([receiver, process.sentinel])
                if (message := _message(receiver)) != _READY:
                    raise PixelmillError(message or f"a process for {devices[1:]} ended with code {process.exitcode}")
            result = _met(torch.device(devices[0]), Part(0, len(devices)), meeting, work, (*shared, *own))
            grace_s = _GRACE_S
            return result
        except PixelmillError:
            raise
        except Exception as error:
            # Where another process failed, this one only sees that it is gone.
            for process, receiver in others:
                process.join(_GRACE_S)
                if message := _message(receiver):
                    raise PixelmillError(message) from error
            raise
        finally:
            for process, _ in others:
                process.join(grace_s)
                if process.is_alive():
                    process.terminate()
                    process.join()


def _other(pickled: bytes, device: str, part: Part, meeting: str, sender: Connection) -> None:
    """What a further process does."""
    try:
        work, shared = pickle.loads(pickled)
        sender.send(_READY)
        _met(torch.device(device), part, meeting, work, shared)
    except Exception as error:
        sender.send(str(error) if isinstance(error, PixelmillError) else f"{device}: {type(error).__name__}: {error}")


def _met(device: torch.device, part: Part, meeting: str, work: Callable[..., _Result], arguments: tuple) -> _Result:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting,
        rank=part.rank,
        world_size=part.ranks,
        timeout=_PATIENCE,
    )
    try:
        return work(device, part, *arguments)
    finally:
        distributed.destroy_process_group()


def _message(receiver: Connection) -> str | None:
    try:
        return receiver.recv() if receiver.poll() else None
    except EOFError:  # it died without a word
        return None


def from_first(value: _Value, part: Part) -> _Value:
    """What the first process holds, in all of them: numbers and texts."""
    if part.ranks == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
