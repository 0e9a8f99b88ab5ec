"""Speaks the worker's protocol without the vendor's package; what it does stands in the file `behaviour` beside the
artifacts.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(sys.stdin.readline())
    folder = Path(job["artifacts"])
    behaviour = json.loads((folder.parent / "behaviour").read_text())
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as events:

        def send(**event: object) -> None:
            events.write(json.dumps(event) + "\n")

        print("the vendor's chatter")
        send(event="phase", name="building the model")
        kind = behaviour["kind"]
        if kind == "silent":
            time.sleep(60)
        if kind == "killed":
            os.kill(os.getpid(), 9)
        if kind == "code":
            print("the last words")
            sys.stdout.flush()
            os._exit(7)
        if kind == "garbage":
            events.write("no json\n")
        if kind == "half":
            events.write('{"event": "rea')
            return
        if kind == "failed":
            send(
                event="failed", kind=behaviour["name"], message=behaviour["message"], frames=behaviour.get("frames", [])
            )
            return
        send(event="ready", vendor="2.10.0", torch="2.4.0", parameters=behaviour["parameters"], padding="x" * 1_000_000)
        executor = folder / "executors" / "000001"
        executor.mkdir(parents=True)
        for name, text in behaviour["files"].items():
            (executor / name).write_text(text)
        send(event="lowered", seconds=1.5, peak_bytes=1000)


main()
