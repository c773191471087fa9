"""A slot process that needs no model: it commits empty files, and misbehaves as its first argument says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tasks.table import Shard, Table

behaviour, scratch = sys.argv[1], Path(sys.argv[2])


def send(event: str, **fields) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def first_time(what: str) -> bool:
    """Whether this is asked for the first time, by any process of the test."""
    try:
        (scratch / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


config = json.loads(sys.stdin.readline())
first_time(f"started-{time.monotonic_ns()}-{'isolated' if config['isolated'] else 'plain'}")
if behaviour == "dies at start":
    die()
if behaviour == "cannot load":
    send("fatal", reason="model.onnx is damaged")
    sys.exit(1)
send("ready", engine="fake")
table = Table(config["store"], config["table"])
done = 0
for line in sys.stdin:
    command = json.loads(line)
    if command.get("stop"):
        break
    key = command["shard"]
    shard = Shard(*key)
    if config["isolated"]:
        for index in range(shard.images):
            if str(index) not in command["poison"]:
                send("predicting", shard=key, index=index)
                if behaviour == "image 2 of shard 1 kills" and (shard.index, index) == (1, 2):
                    die()
    else:
        if behaviour in ("shard 1 kills", "image 2 of shard 1 kills") and shard.index == 1:
            die()
        if behaviour == "falls silent once" and first_time("silence"):
            time.sleep(3600)
        if behaviour == "sleeps":
            time.sleep(3600)
        if behaviour == "fails once" and first_time(f"failed-{shard}"):
            send("failed", shard=key, reason="disk full")
            continue
        if behaviour == "shard 0 fails" and shard.index == 0:
            send("failed", shard=key, reason="disk full")
            continue
        if behaviour == "all fail":
            send("failed", shard=key, reason="connection refused")
            continue
    poisoned = len(command["poison"])
    by_status = {"ok": shard.images - poisoned} | ({"failed": poisoned} if poisoned else {})
    table.storage.put_if_absent(table.part_uri(config["model"], shard), json.dumps(command["poison"]).encode())
    send("committed", shard=key, statistics={"by_status": by_status})
    done += shard.images
    send("progress", images=done, by_status={"ok": done}, stages={"infer": 0.5})
