"""Everything that one job writes: the PET series, then the companions that are asked for.

The PET series must be written, or the job fails. A companion must never cost it: one that cannot be written is left
out, and a note of the job says which and why.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.outputs.district_seg import encode_district_seg
from pipeline.outputs.measurement_report import encode_measurement_report
from pipeline.outputs.pet_series import encode_pet_series
from pipeline.outputs.picture import encode_mip
from pipeline.outputs.presentation import encode_grayscale_state, encode_pseudo_color_state
from pipeline.outputs.quantize import slope_of
from pipeline.outputs.uncertainty_series import ENCODING as UNCERTAINTY_ENCODING
from pipeline.outputs.uncertainty_series import encode_uncertainty_series
from pipeline.provenance import ResultUids
from pipeline.types import (
    DistrictMap,
    DistrictStats,
    EncodedSeries,
    OnProgress,
    OutputOptions,
    Provenance,
    SourceSeries,
    SuvVolume,
    ignore_progress,
)

MIP_ENCODING = "sc"  # the picture is a secondary capture whatever the PET series is

log = logging.getLogger(__name__)


def encode_result(
    suv: SuvVolume,
    districts: DistrictMap,
    stats: Sequence[DistrictStats],
    deviation: SuvVolume | None,
    *,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    created: datetime,
    on_progress: OnProgress = ignore_progress,
) -> tuple[tuple[EncodedSeries, ...], tuple[str, ...]]:
    """The PET series in every encoding that is asked for and their companions, and a note for each one left out.

    Args:
        suv: g/ml, [z, y, x].
        districts: on the grid of `suv`.
        stats: of the districts that are present, for the measurement report.
        deviation: the uncertainty map on the grid of `suv`, or None where there is none to write.
        source: the CT.
        provenance: who made the result.
        options: what is written, and how.
        created: aware time of the job.
        on_progress: told of the instances of the PET series.

    Raises:
        OutputError: the PET series cannot be written.
    """
    common: dict[str, Any] = {
        "source": source,
        "provenance": provenance,
        "options": options,
        # DICOM dates and times are local where no offset is given (PS3.3 C.12.1.1)
        "created": created.astimezone(),
    }

    def uids(encoding: str) -> ResultUids:
        return ResultUids(source=source, provenance=provenance, options=options, encoding=encoding)

    pets = [
        encode_pet_series(suv, **common, encoding=encoding, uids=uids(encoding), on_progress=on_progress)
        for encoding in options.encodings
    ]
    companions = _Companions()  # SEG, report and presentation states refer to one PET series: there is one for each
    if options.mip:
        companions.add(
            "the MIP picture", partial(encode_mip, suv, **common, encoding=MIP_ENCODING, uids=uids(MIP_ENCODING))
        )
    segs: dict[str, EncodedSeries | None] = {}
    if options.seg:
        for pet in pets:
            shown = {**common, "uids": uids(pet.encoding), "not_evaluated": suv.not_evaluated}
            seg = partial(encode_district_seg, districts, pet=pet, **shown)
            segs[pet.encoding] = companions.add(f"the districts' SEG ({pet.encoding})", seg)
    if deviation is not None:
        companions.add(
            "the uncertainty map",
            partial(encode_uncertainty_series, deviation, **common, uids=uids(UNCERTAINTY_ENCODING)),
        )
    slope = slope_of(suv.suv) if options.presentation_states else ""
    for pet in pets:
        own = {**common, "grid": suv.grid, "uids": uids(pet.encoding)}
        if options.sr:
            report = partial(encode_measurement_report, stats, pet=pet, seg=segs.get(pet.encoding), **own)
            companions.add(f"the measurement report ({pet.encoding})", report)
        if options.presentation_states:
            gray = partial(encode_grayscale_state, pet, slope=slope, **own)
            color = partial(encode_pseudo_color_state, pet, slope=slope, **own)
            companions.add(f"the grayscale presentation state ({pet.encoding})", gray)
            companions.add(f"the pseudo-color presentation state ({pet.encoding})", color)
    return (*pets, *companions.series), tuple(companions.notes)


class _Companions:
    """The companions that could be written, and a note for each that could not."""

    def __init__(self) -> None:
        self.series: list[EncodedSeries] = []
        self.notes: list[str] = []

    def add(self, name: str, encode: Callable[[], EncodedSeries]) -> EncodedSeries | None:
        """What `encode` gives; None, and a note, if it fails for whatever reason."""
        try:
            made = encode()
        except Exception as error:
            # Only words of ours are told: a library's error may quote the header, and with it the patient
            reason = error.text if isinstance(error, PipelineError) else type(error).__name__
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.warning(
                "outputs.companion_left_out error=%s place=%s:%s",
                type(error).__name__,
                Path(place.filename).name,
                place.lineno,
            )
            self.notes.append(f"{name} cannot be written and is left out: {reason}")
            return None
        self.series.append(made)
        return made
