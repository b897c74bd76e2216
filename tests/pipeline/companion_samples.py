"""The report and the presentation states of the sample PET, for the tests of the companions."""

from __future__ import annotations

from dataclasses import replace

from outputs_samples import Sample
from test_output_seg import district_map

from pipeline.outputs.district_seg import encode_district_seg
from pipeline.outputs.measurement_report import encode_measurement_report
from pipeline.outputs.presentation import encode_grayscale_state, encode_pseudo_color_state
from pipeline.outputs.quantize import slope_of
from pipeline.outputs.statistics import district_stats
from pipeline.provenance import ResultUids
from pipeline.types import District, EncodedSeries


def uids(sample: Sample, encoding: str) -> ResultUids:
    return ResultUids(source=sample.source, provenance=sample.provenance, options=sample.options, encoding=encoding)


def seg_of(sample: Sample, *present: District, encoding: str = "sc") -> EncodedSeries:
    return encode_district_seg(
        district_map(*present),
        pet=sample.pet(encoding),
        source=sample.source,
        provenance=sample.provenance,
        options=sample.options,
        uids=uids(sample, encoding),
        created=sample.created,
    )


def report_of(
    sample: Sample,
    *present: District,
    encoding: str = "sc",
    seg: EncodedSeries | None = None,
    not_evaluated: tuple[District, ...] = (),
) -> EncodedSeries:
    """Of the districts of `test_output_seg.district_map` on the sample's grid."""
    suv = replace(sample.suv, not_evaluated=not_evaluated)
    return encode_measurement_report(
        district_stats(suv, district_map(*present)),
        pet=sample.pet(encoding),
        seg=seg,
        grid=suv.grid,
        source=sample.source,
        provenance=sample.provenance,
        options=sample.options,
        uids=uids(sample, encoding),
        created=sample.created,
    )


def states_of(sample: Sample, encoding: str = "sc") -> dict[str, EncodedSeries]:
    """The presentation states of the sample's PET, by kind."""
    given = {
        "slope": slope_of(sample.suv.suv),
        "grid": sample.suv.grid,
        "source": sample.source,
        "provenance": sample.provenance,
        "options": sample.options,
        "uids": uids(sample, encoding),
        "created": sample.created,
    }
    pet = sample.pet(encoding)
    return {one.kind: one for one in (encode_grayscale_state(pet, **given), encode_pseudo_color_state(pet, **given))}
