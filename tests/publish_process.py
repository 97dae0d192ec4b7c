"""Publish in a process of its own: `publish_process.py CASES`.

CASES is JSON, [[name, folder, repository, token, settings], ...]. For each case the process tells
the Hub which one begins, and prints the outcome as a line of JSON.
"""

import json
import sys
import time
import urllib.request

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))

from huggingface_hub import constants  # noqa: E402

from ofb_hf import publish  # noqa: E402
from ofb_hf.release.hub import PublishError  # noqa: E402
from ofb_hf.release.leaks import LeakError  # noqa: E402

if __name__ == "__main__":
    for name, folder, repository, token, settings in json.loads(sys.argv[1]):
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/case/{name}", timeout=10):
            pass
        try:
            commit = publish(folder, repository, token=token, **settings)
            print(json.dumps({"name": name, "oid": commit.oid, "pr": commit.pr_url}), flush=True)
        except (PublishError, LeakError) as error:
            print(
                json.dumps({"name": name, "error": type(error).__name__, "message": str(error)}),
                flush=True,
            )
