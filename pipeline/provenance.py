"""Result UIDs as a function of what a result is made of (dicom-output: "UIDs, idempotence, order").

The same CT, weights, software and output options give the same UIDs again, so that a job run twice, or a series
sent twice, is one series in the PACS; a change of any of them gives new UIDs, so that no UID ever names two
different images. The device, its fallbacks, the precision that "auto" finds and all times are left out on purpose:
a job that moves from the GPU to the CPU after a crash is still the same result. Its values then differ in the last
digits under the same UID, which is acceptable because what was stored once is sent again byte for byte and never
computed anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any
from uuid import UUID, uuid5

from pipeline.types import OutputOptions, Provenance, SourceSeries

# The name space of this product's UIDs. Never change it: every result already in a PACS would change its name.
UID_NAMESPACE = UUID("6f1d5a0e-2c7b-4f3e-9b52-8d0c64a1e7f3")

# Which encodings and which companions are written does not change what is in any one of them; the series numbers of
# the companions after the MIP are in their own UIDs.
NOT_IN_KEY = (
    *("encodings", "mip", "seg", "seg_series_number", "uncertainty", "uncertainty_series_number"),
    *("sr", "sr_series_number", "presentation_states", "gsps_series_number", "pcps_series_number"),
)


def software_version() -> str:
    """The installed version of the product, as it goes into SoftwareVersions (0018,1020)."""
    return version("dicom-node")


def _canonical(value: Any) -> bytes:
    """One byte string per value: keys sorted, no blanks, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


@dataclass(frozen=True, kw_only=True)
class ResultUids:
    """The UIDs of one result series in one encoding ("sc" or "pet")."""

    source: SourceSeries
    provenance: Provenance
    options: OutputOptions
    encoding: str

    @cached_property
    def key(self) -> str:
        """SHA-256, hexadecimal, of everything that decides the content."""
        made_by = self.provenance
        return hashlib.sha256(
            _canonical(
                {
                    "source_series": self.source.series_uid,
                    "source_instances": sorted({i.sop_instance_uid for i in self.source.instances}),
                    "bundle": made_by.bundle_sha256,
                    "models": sorted([m.district, m.weights_sha256] for m in made_by.models),
                    "networks": sorted(made_by.networks),
                    "software": made_by.software_version,
                    "segmenter": [made_by.segmenter, made_by.segmenter_version],
                    "settings": sorted(made_by.settings),
                    "output": self._output(),
                    "encoding": self.encoding,
                }
            )
        ).hexdigest()

    def _output(self) -> dict[str, Any]:
        """The options that decide the content; `test` only where it is set: results of before keep their UIDs."""
        options = {k: v for k, v in asdict(self.options).items() if k not in NOT_IN_KEY}
        return options if self.options.test else {k: v for k, v in options.items() if k != "test"}

    def uid(self, kind: str, index: int = 0) -> str:
        """The UID of one thing in the result: kind "series", "inst", "mip", ...; at most 44 characters.

        It is a UUID-derived UID, root 2.25 (PS3.5 annex B.2), that is the same on every machine.
        """
        return f"2.25.{uuid5(UID_NAMESPACE, f'{self.key}|{kind}|{index}').int}"
