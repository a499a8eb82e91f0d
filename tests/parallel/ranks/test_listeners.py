"""Whom the ranks of one machine listen to: nobody from another address."""

import os
import sys
from pathlib import Path

import pytest

from parallel.mesh import Layout
from parallel.ranks.spawn import run_ranks

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
GANG = """
import sys
from pathlib import Path
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from parallel.mesh import Layout
from tests.parallel.ranks.test_listeners import listening
with open_gang(RankEnv.from_environment(), Layout(pp=2, cp=1)) as gang:
    Path(sys.argv[1], f"{gang.mesh.rank}").write_text(" ".join(listening()))
"""


def listening():
    """Addresses that this process listens at, as the kernel writes them (IPv4 in reverse order)."""
    own = set()
    for handle in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{handle}").removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue  # closed meanwhile
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                found.add(fields[1].partition(":")[0])
    return sorted(found)


@linux
@pytest.mark.slow
def test_ranks_of_one_machine_listen_at_the_loopback_address_alone(tmp_path):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{GANG}", str(tmp_path)]
    run_ranks(command, Layout(pp=2, cp=1), threads=1)
    for rank in range(2):
        found = (tmp_path / f"{rank}").read_text().split()
        assert found == ["0100007F"], found
