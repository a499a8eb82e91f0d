"""A rank: joins the gang and runs one scenario."""

import json
import sys
import time
from pathlib import Path

import torch

from models.errors import InputError
from parallel.health.failure import GangError
from parallel.health.monitor import leave
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from tests.parallel.scenarios import channels, checkpoints, loading, trouble, videos
from tests.parallel.small import one_thread

SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        videos.videos,
        videos.slow,
        videos.goldens,
        videos.abandoned,
        loading.loaded,
        loading.load_only,
        trouble.trouble,
        channels.flood,
        channels.lost_key,
        checkpoints.kept,
        checkpoints.cancelled,
        checkpoints.gated,
    )
}


def main():
    name, out, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    one_thread()
    env = RankEnv.from_environment()
    layout = Layout(**values["layout"])
    timeouts = Timeouts(**values.get("timeouts", {}))
    try:
        device = None if values.get("device") == "cuda" else torch.device("cpu")
        with open_gang(env, layout, timeouts=timeouts, device=device) as gang:
            if values.get("inline") is False:
                channels.separate_payloads(gang)
            SCENARIOS[name](gang, values, out)
    except InputError:
        leave(2)
    except GangError as error:
        if not env.launcher_speaks and error.failure.reporter == env.rank:
            sys.stderr.write(f"error: {error}\n")
        if "survives" in values:
            time.sleep(values["survives"])
            Path(out).write_text(str(error))
        leave(error.failure.status)
    except KeyboardInterrupt:
        leave(130)


if __name__ == "__main__":
    main()
