"""The uncertainty map: the standard deviation of the synthesized SUV, plane by plane, on the PET's grid.

Never to be taken for uptake, so it is no PET: Secondary Capture with Modality OT and none of the SUV and PET
attributes (Units, SUVType, radiopharmaceutical) by which a viewer fuses a series, thresholds it or offers SUV
measurements. The rescale slope makes values read as the standard deviation in SUV (g/ml), and Series Description,
Image Type, Derivation Description, Image Comments and the real world values say what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.uid import SecondaryCaptureImageStorage

from pipeline.outputs.attributes import copy_position_reference, free_series_number, set_character_set
from pipeline.outputs.codes import SUV_BW_UNITS, code_item
from pipeline.outputs.explicit import EXPLICIT_VR_LITTLE_ENDIAN, SeriesTemplate
from pipeline.outputs.modules import Uids, described, result_dataset, secondary_capture
from pipeline.outputs.pet_series import (
    IMAGE_INDEX,
    VARYING,
    check_grid,
    plane_and_pixels,
    set_windows,
    varying_elements,
)
from pipeline.outputs.quantize import MAX_CODE, quantize
from pipeline.types import EncodedInstance, EncodedSeries, OutputOptions, Provenance, SourceSeries, SuvVolume

KIND, ENCODING = "uncertainty", "sc"  # a secondary capture whatever the PET series is
SERIES_DESCRIPTION = "SYNTHETIC PET UNCERTAINTY - STANDARD DEVIATION, NOT UPTAKE"
WHAT_IT_IS = "UNCERTAINTY: STANDARD DEVIATION OF A SYNTHETIC PET OVER FLIPS OF THE CT, NOT UPTAKE"
OWN_VARYING = tuple(tag for tag in VARYING if tag != IMAGE_INDEX)  # that one is of the PET Image module


@dataclass(frozen=True)
class _OwnUids:
    """The PET's instances and these have the same numbers: the kind and the series number tell them apart."""

    uids: Uids
    series_number: int

    def uid(self, kind: str, index: int = 0) -> str:
        return self.uids.uid(f"{KIND}_{self.series_number}_{kind}", index)


def encode_uncertainty_series(
    deviation: SuvVolume,
    *,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    uids: Uids,
    created: datetime,
) -> EncodedSeries:
    """One Secondary Capture instance per plane of `deviation`, foot to head, where the PET's instances lie.

    Args:
        deviation: `suv` is the standard deviation, [z, y, x], g/ml; `not_evaluated` as of the PET.
        source: the CT; its instances are referenced.
        provenance: who made the PET whose deviation this is.
        options: `uncertainty_series_number`, and what all results share.
        uids: of the encoding "sc".
        created: aware time, stored with the job.

    Raises:
        OutputError: as for the PET series.
    """
    check_grid(deviation.grid)
    own = _OwnUids(uids, options.uncertainty_series_number)
    codes, slope = quantize(deviation.suv)
    ds = result_dataset(
        source=source, provenance=provenance, options=options, created=created, not_evaluated=deviation.not_evaluated
    )
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.Modality = "OT"
    ds.SeriesInstanceUID = own.uid("series")
    ds.SeriesNumber = free_series_number(options.uncertainty_series_number, source)
    ds.SeriesDescription = described(SERIES_DESCRIPTION, options)
    ds.ImageType = ["DERIVED", "SECONDARY", "UNCERTAINTY"]
    ds.ImageComments = f"{WHAT_IT_IS}; {ds.ImageComments}"
    ds.DerivationDescription = f"{WHAT_IT_IS}; {ds.DerivationDescription}"
    ds.FrameOfReferenceUID = deviation.grid.frame_of_reference_uid
    ds.PatientOrientation = ["L", "P"]
    ds.BurnedInAnnotation = "NO"
    copy_position_reference(ds, source)
    secondary_capture(ds, provenance)
    plane_and_pixels(ds, deviation.grid)
    _value_mapping(ds, slope)
    set_character_set(ds, source)
    template = SeriesTemplate(ds, OWN_VARYING)
    instances = []
    for index, elements in enumerate(varying_elements(deviation.grid, codes, source, own)):
        sop_instance_uid = own.uid("inst", index)
        instances.append(
            EncodedInstance(
                sop_class_uid=str(SecondaryCaptureImageStorage),
                sop_instance_uid=sop_instance_uid,
                transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN,
                file_name=f"{index + 1:04d}.dcm",
                data=template.instance(sop_instance_uid, elements),
            )
        )
    return EncodedSeries(kind=KIND, encoding=ENCODING, series_uid=own.uid("series"), instances=tuple(instances))


def _value_mapping(ds: Dataset, slope: str) -> None:
    """Stored codes to the standard deviation in g/ml. No Quantity Definition: SUV is not what is measured here."""
    ds.RescaleIntercept = "0"
    ds.RescaleSlope = slope
    ds.RescaleType = "US"
    set_windows(ds, "SD", (1, 2))
    mapping = Dataset()
    mapping.LUTExplanation = "STANDARD DEVIATION OF SYNTHETIC SUVbw"
    mapping.LUTLabel = "SD OF SUVbw"
    mapping.add(DataElement("RealWorldValueFirstValueMapped", "US", 0))
    mapping.add(DataElement("RealWorldValueLastValueMapped", "US", MAX_CODE))
    mapping.RealWorldValueIntercept = 0.0
    mapping.RealWorldValueSlope = float(slope)
    mapping.MeasurementUnitsCodeSequence = [code_item(SUV_BW_UNITS)]
    ds.RealWorldValueMappingSequence = [mapping]
