"""`penstock serve`: a cluster on this machine behind the OpenAI API.

The order is chosen for a short start: the port is taken, the host process begins to load, and only
then the front imports its own parts. It listens, and answers 503, while the model loads.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

from penstock.cli.cluster import cluster_settings
from penstock.cli.listener import Listener
from penstock.core.errors import StartupFailed
from penstock.runtime.folder import RunFolder
from penstock.runtime.process import HostProcess


def serve(options: Namespace) -> int:
    """Serve until a signal or a failure; return the exit code.

    Raises: `StartupFailed` when the server cannot come up.
    """
    try:
        settings = cluster_settings(options)
    except StartupFailed as error:
        print(f"penstock serve: error: {error}", file=sys.stderr)
        return 2
    started_s = time.monotonic()
    if options.uds:
        listener = Listener.unix(Path(options.uds))
    else:
        listener = Listener.tcp(options.host, options.port)
    folder = RunFolder.create()
    host = HostProcess.spawn(folder.path)

    import uvloop

    from penstock.cli.front import Front
    from penstock.runtime.local import LocalCluster

    front = Front(LocalCluster(settings, folder, host), listener, options, started_s)
    return uvloop.run(front.run())
