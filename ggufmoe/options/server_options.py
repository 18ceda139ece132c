"""Options of the HTTP server: where it listens, who may use it, and how much it takes on."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_INT32, MAX_PORT


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, who may use it, and how much it takes on; shared flags are those of llama.cpp's server.

    Raises OptionError for values out of range.
    """

    host: str = option(
        "127.0.0.1",
        "--host",
        help="Address to listen at; the default one cannot be reached from other machines. Another one needs "
        "--api-key, --api-key-file or --no-api-key.",
        metavar="HOST",
    )
    port: int = option(
        8080, "--port", help="Port to listen at; 0: any free one.", metavar="PORT", between=(0, MAX_PORT)
    )
    alias: str | None = option(
        None, "-a", "--alias", help="Name of the model for clients. [default: the file's name]", metavar="NAME"
    )
    api_key: str | None = option(
        None,
        "--api-key",
        help="Key that clients must send. Other users of this machine can read it in the list of processes: "
        "--api-key-file hides it.",
        metavar="KEY",
    )
    api_key_file: Path | None = option(
        None, "--api-key-file", help="Read the keys from a file, one a line.", metavar="FILE"
    )
    no_api_key: bool = option(
        False, "--no-api-key", help="Let everyone use the model who can reach an address other than this machine's own."
    )
    cors_origin: tuple[str, ...] = option(
        (),
        "--cors-origin",
        help="Let web pages of this origin use the server, for example https://chat.example.org; may be repeated.",
        metavar="ORIGIN",
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "--allowed-host",
        help="Accept requests that name this host, for example behind a proxy; may be repeated.",
        metavar="NAME",
    )
    timeout: int = option(
        3600,
        "--timeout",
        help="Most seconds that a request may take, its waiting included.",
        metavar="S",
        between=(1, MAX_INT32),
    )
    queue: int = option(
        64,
        "--queue",
        help="Most answers that may be waiting or under way; more requests are refused with status 429.",
        metavar="N",
        between=(1, 10_000),
    )

    def __post_init__(self) -> None:
        check_values(self)
        check(bool(self.host), "--host: the address to listen at is empty")
        check(self.api_key is None or self.api_key_file is None, "give --api-key or --api-key-file, not both")
        has_key = self.api_key is not None or self.api_key_file is not None
        check(not (has_key and self.no_api_key), "--no-api-key contradicts --api-key and --api-key-file")
        check(self.api_key is None or bool(self.api_key.strip()), "--api-key: the key is empty")
        check("*" not in self.cors_origin, "--cors-origin: name each origin; * would let every web page in")
