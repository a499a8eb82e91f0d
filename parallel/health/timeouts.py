"""How long ranks, and processes that start or watch them, wait for one another; and how often they look. In seconds."""

from dataclasses import dataclass

# Ranks, and whoever starts them
STORE_SECONDS = 20.0  # for a launcher's store to answer: it is there before its ranks are, or the launcher has gone
LAST_TRANSFERS_SECONDS = 10.0  # for what was sent last to leave, on each edge between two ranks
RANKS_END_SECONDS = 10.0  # for the ranks of a launcher to end by themselves before it ends them
CHECK_SECONDS = 0.25  # between two checks whether a rank has failed, while a message is waited for
POLL_SECONDS = 0.05  # between two looks at processes that end, and at files that are written

# The controller and its gangs
CONNECT_SECONDS = 30.0  # for a rank to reach the controller
AUTHENTICATE_SECONDS = 10.0  # for a caller to prove who it is
ACCEPT_AGAIN_SECONDS = 0.1  # after there were too many callers
LAST_MESSAGES_SECONDS = 5.0  # for what a rank sends last to leave
GANGS_END_SECONDS = 10.0  # for gangs to end by themselves before they are killed
RAY_ANSWER_SECONDS = 30.0  # for the result of a call that has ended
RAY_EXPLAINS_SECONDS = 10.0  # for Ray to say why a rank whose connection has ended is gone
RAY_DECIDES_SECONDS = 20.0  # for Ray to decide about a node that does not answer
READER_ENDS_SECONDS = 1.0  # for the thread that reads a dead gang's heartbeats
JOIN_SECONDS = 30.0  # for a cluster to be joined, once it takes connections
HEAD_SECONDS = 30.0  # for the head of a cluster to be started again; after 60 Ray ends the process
OWN_HEAD_SECONDS = 2.0  # the same of a cluster that ends with the command: nobody starts it again
HEAD_ANSWERS_SECONDS = 1.0  # for it to take a connection
RAY_ENDS_SECONDS = 1.0  # for processes of a cluster that has ended, before they are ended
RAY_FILES_SECONDS = 2.0  # for its last processes to end, so that its files can be removed
NEWS_SECONDS = 0.2  # between two looks at all gangs where no message comes
NODES_SECONDS = 1.0  # between two looks at the nodes of the cluster
NODE_WAIT_SECONDS = 300.0  # for nodes to come when no gang has room any more
PLACES_SECONDS = 0.2  # between two looks whether a gang's places are reserved
ENDS_SECONDS = 0.5  # between two looks whether Ray has lost a rank
WATCHED_SECONDS = 0.2  # between two messages that are sent for a viewer alone: every message has its cost
METRICS_SECONDS = 1.0  # between two exports of metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Limits in seconds that a caller may set."""

    silent: float = 20.0  # for a rank without a heartbeat, and for a store that does not answer
    first: float = 900.0  # for all ranks to join, for loading, and for a rank's first items, which may compile
    step: float = 180.0  # for one item after that, and for results on which no rank works
    grace: float = 3.0  # for a rank to unwind after a failure

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats of a rank."""
        return min(0.5, self.silent / 8)
