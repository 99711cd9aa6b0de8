"""What a GPU costs an hour and a host's tokens a million, from a small file that people edit: `prices.yaml`, or one of their own."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.errors import DataError

SHIPPED = Path(__file__).with_name("prices.yaml")
_NO_NAME = re.compile(r"nvidia|geforce|tesla|[^a-z0-9.]")
Dollars = Annotated[float, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    names: list[str] = []
    """Other names."""
    source: str | None = None
    """Where the price can be read."""
    read: datetime.date | None = None
    """When it was."""
    by: str | None = None
    """Who read it, where the page itself could not be read."""

    @property
    def from_where(self) -> str:
        """Source and date, as far as they are told."""
        read = "" if self.read is None else f", read {self.read}"
        return f"{self.source or 'no source told'}{read}{'' if self.by is None else f' by {self.by}'}"


class GpuPrice(_Entry):
    """Rent of one GPU."""

    usd_per_hour: Dollars | None = None
    """Null: unknown."""


class ApiPrice(_Entry):
    """What a host asks for a million tokens, in US dollars."""

    input: Dollars
    """Read."""
    output: Dollars
    """Written, reasoning among them."""
    cached_input: Dollars | None = None
    """Read from the host's cache; null: as `input`."""

    def of(self, tokens_in: float | None, tokens_out: float) -> float:
        """Dollars of so many tokens, none of them cached; those read count as none where they are not known."""
        return ((tokens_in or 0.0) * self.input + tokens_out * self.output) / 1e6


class Prices(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: dict[str, GpuPrice] = {}
    api: dict[str, ApiPrice] = {}


class Hour(NamedTuple):
    """What an hour of a device costs, and who says so."""

    usd: float
    why: str


class Rates(NamedTuple):
    """What the seconds and tokens of a run are priced by."""

    prices: Prices
    gpu: str | None = None
    """Which GPU the run is taken to have used, where its manifests don't tell."""
    gpu_hour: float | None = None
    """US dollars for an hour of each GPU, whatever it is; null: as the prices say."""
    cpu_hour: float | None = None
    """The same of a machine whose CPU alone worked; null: unknown."""
    server_gpus: int | None = None
    """GPUs behind each server that the run's stages started; null: unknown."""

    def gpu_price(self, name: str | None) -> Hour | None:
        """What an hour of a GPU costs; null where it is not known.

        Args:
            name: As the GPU calls itself; null where a manifest does not tell.
        """
        if self.gpu_hour is not None:
            return Hour(self.gpu_hour, f"${self.gpu_hour:g} an hour of a GPU, as given")
        called = self.gpu or name
        found = None if called is None else _named(self.prices.gpus, called)
        if found is None or found[1].usd_per_hour is None:
            return None
        return Hour(found[1].usd_per_hour, f"${found[1].usd_per_hour:g} an hour of one {found[0]} ({found[1].from_where})")

    def api_price(self, name: str | None) -> tuple[str, ApiPrice] | None:
        """What a model's host asks, with its name in the prices; null where it is not known."""
        return None if name is None else _named(self.prices.api, name)


Priced = TypeVar("Priced", bound=_Entry)


def _named(entries: Mapping[str, Priced], name: str) -> tuple[str, Priced] | None:
    """The entry with this name, however it is spelled."""
    for key, entry in entries.items():
        if _plain(name) in map(_plain, (key, *entry.names)):
            return key, entry
    return None


def _plain(name: str) -> str:
    return _NO_NAME.sub("", name.casefold())


@lru_cache(maxsize=4)
def read_prices(file: Path = SHIPPED) -> Prices:
    """The prices in a file.

    Raises:
        DataError: it can't be read, or says what no price file says.
    """
    try:
        return Prices.model_validate(YAML(typ="safe").load(file.read_text(encoding="utf-8")) or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: {where}: {first['msg']}. {SHIPPED.name} of the kit shows the form.") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise DataError(f"{file}: can't be read as prices: {str(error).splitlines()[0]}. Give a YAML file like the kit's.") from None


def rates_of(
    file: Path | None = None,
    *,
    gpu: str | None = None,
    gpu_hour: float | None = None,
    cpu_hour: float | None = None,
    server_gpus: int | None = None,
) -> Rates:
    """Rates by a file, or by the kit's.

    Raises:
        DataError: the file can't be read, or has no such GPU.
    """
    rates = Rates(read_prices(file or SHIPPED), gpu, gpu_hour, cpu_hour, server_gpus)
    if gpu is not None and rates.gpu_price(None) is None:
        known = ", ".join(rates.prices.gpus) or "none"
        raise DataError(f"--gpu: no price is known for {gpu!r}; known are {known}. Add it by --prices FILE, or say --gpu-hour USD.")
    return rates
