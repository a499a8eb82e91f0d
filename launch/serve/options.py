"""The options of `flowcache serve` beside those of the model and of gangs. Nothing heavy is imported here."""

import ipaddress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from launch.option_fields import check_bounds, option
from launch.options import GangOptions, Options
from models.errors import InputError

_service, _limits = partial(option, "The service"), partial(option, "Limits")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions(GangOptions):
    """What was given to `flowcache serve` beside the options that `Options` has for it too; errors as there."""

    out: Path = option(None, "Folder of the queue and the videos; made if missing.", default=Path("served"))
    base: Options = field(default_factory=Options)  # holds where a request says nothing
    host: str = _service("Address to listen at. One that others reach needs an --api-key.", default="127.0.0.1")
    port: int = _service("Port to listen at; 0 takes one that is free.", default=8000, within=(0, 65_535))
    api_key: str | None = _service(
        "What requests have to carry: Authorization: Bearer KEY. Better in the environment, where other users of the "
        "machine do not see it.",
        metavar="KEY",
        variable="FLOWCACHE_API_KEY",
    )
    max_queue: int = _limits(
        "Videos that are not made yet; more requests are refused with 429.", default=256, within=(1, 1_000_000)
    )
    max_seconds: float = _limits("Length of a video, and of a clip to start from.", default=60.0, within=(1, 1e6))
    max_pixels: int | None = _limits(
        "Pixels of a frame of a video.", within=(256, 2**28), shown="those of the model's own size"
    )
    max_upload: str = _limits("Size of the body of a request.", default="64MB", metavar="SIZE")
    max_disk: str | None = _limits(
        "Room that all videos may take together; once it is full, requests are refused with 429.",
        metavar="SIZE",
        shown="the disk",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("--api-key is empty: give a text that nobody guesses, or leave it out")
        if self.api_key is None and not self.local:
            raise InputError(
                f"--host {self.host} can be reached by others: give an --api-key (or FLOWCACHE_API_KEY), or 127.0.0.1"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
