"""The modules that all result objects share: what they are, who made them, whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from pydicom import Dataset

from pipeline.outputs.attributes import (
    body_part_examined,
    copy_lossy_history,
    copy_patient_and_study,
    institution_name,
    local_moment,
    series_moment,
)
from pipeline.outputs.codes import PROCESSING_EQUIPMENT, SYNTHESIZING_EQUIPMENT, code_item
from pipeline.outputs.header import clean
from pipeline.types import District, OutputOptions, Provenance, SourceSeries

# Never the scanner's: viewers key vendor-specific reading on the manufacturer.
MANUFACTURER = "dicom-node project"
MODEL_NAME = "dicom-node synthetic PET"

HASH_SHOWN = 12  # hexadecimal digits of a SHA-256 that people can still compare by eye

IMAGE_COMMENTS = "SYNTHETIC PET PREDICTED FROM CT BY AI - NOT ACQUIRED - NOT FOR DIAGNOSIS"
TEST_COMMENTS = "TEST OF THE NODE ON A GENERATED PHANTOM - NO PATIENT"
LONG_STRING = 64  # characters of VR LO (PS3.5 table 6.2-1)


class Uids(Protocol):
    """Where the result's UIDs come from; `pipeline.provenance.ResultUids` is one."""

    def uid(self, kind: str, index: int = 0) -> str:
        """The same UID for the same result, kind and index."""


def result_dataset(
    *,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    created: datetime,
    not_evaluated: Sequence[District],
) -> Dataset:
    """Patient, study, equipment and provenance: all that a PET slice and a MIP picture have in common.

    SOP Common (PS3.3 C.12.1), Patient, General Study, Patient Study, General Series in part (C.7.3.1), General
    Equipment (C.7.5.1), General Image in part (C.7.6.1). `created` is aware and stored with the job.
    `not_evaluated` are the districts whose zeros say nothing: the text elements that a viewer shows name them.
    """
    ds = Dataset()
    now = local_moment(source, created)
    ds.SyntheticData = "YES"
    ds.InstanceCreationDate, ds.InstanceCreationTime = now.date, now.time
    ds.ContributingEquipmentSequence = contributing_equipment(provenance, now.date_time)

    copy_patient_and_study(ds, source, options)

    begun = series_moment(source, created)
    ds.SeriesDate, ds.SeriesTime = begun.date, begun.time
    ds.BodyPartExamined = body_part_examined(source)

    ds.Manufacturer = MANUFACTURER
    ds.ManufacturerModelName = MODEL_NAME
    ds.SoftwareVersions = clean("LO", provenance.software_version)
    ds.DeviceSerialNumber = provenance.bundle_sha256[:HASH_SHOWN]
    if institution := institution_name(source, options):
        ds.InstitutionName = institution

    ds.ContentDate, ds.ContentTime = now.date, now.time
    ds.AcquisitionNumber = 1
    silent = _not_evaluated(not_evaluated)
    ds.ImageComments = f"{image_comments(options)}{silent}"
    ds.DerivationDescription = f"{derivation_description(provenance)}{silent}"
    copy_lossy_history(ds, source)
    return ds


def image_comments(options: OutputOptions) -> str:
    """ImageComments (0020,4000): what the image is, and before it that it is a test."""
    return f"{TEST_COMMENTS}; {IMAGE_COMMENTS}" if options.test else IMAGE_COMMENTS


def described(description: str, options: OutputOptions) -> str:
    """A SeriesDescription (0008,103E) with TEST as its second word in a test study: viewers cut the end off."""
    if not options.test:
        return description
    first, _, rest = description.partition(" ")
    return f"{first} TEST {rest}"[:LONG_STRING].rstrip()


def secondary_capture(ds: Dataset, provenance: Provenance) -> None:
    """The SC Equipment module (PS3.3 C.8.6.1): a synthetic image, captured by this software."""
    ds.ConversionType = "SYN"
    ds.SecondaryCaptureDeviceManufacturer = MANUFACTURER
    ds.SecondaryCaptureDeviceManufacturerModelName = MODEL_NAME
    ds.SecondaryCaptureDeviceSoftwareVersions = clean("LO", provenance.software_version)


def derivation_description(provenance: Provenance) -> str:
    """What the pixels are, for DerivationDescription (0008,2111)."""
    model = clean("LO", f"{provenance.bundle_name} {provenance.bundle_version}")
    return (
        f"FDG-PET SUVbw predicted from CT by {model}; no radiotracer was administered; "
        "corrections are those of the training target"
    )


def _not_evaluated(districts: Sequence[District]) -> str:
    """What a text about the pixels ends with: far shorter than LT and ST allow."""
    if not districts:
        return ""
    return f"; NOT EVALUATED (zero is no statement): {', '.join(district.key for district in districts)}"


def contributing_equipment(provenance: Provenance, date_time: str) -> list[Dataset]:
    """One item per network that took part and one for the segmenter (PS3.3 C.12.1, ContributingEquipmentSequence)."""
    software = clean("LO", provenance.software_version)
    items = []
    for model in provenance.models:
        item = _equipment(f"{provenance.bundle_name} {model.district}", provenance.bundle_version, date_time)
        item.PurposeOfReferenceCodeSequence = [code_item(SYNTHESIZING_EQUIPMENT)]
        item.DeviceSerialNumber = model.weights_sha256[:HASH_SHOWN]
        item.ContributionDescription = clean(
            "ST",
            f"{provenance.bundle_name} {provenance.bundle_version} {model.district}, "
            f"weights {model.weights_sha256[:HASH_SHOWN]}, {_lineage(provenance)}software {software}",
        )
        items.append(item)
    segmenter = _equipment(provenance.segmenter, provenance.segmenter_version, date_time)
    segmenter.PurposeOfReferenceCodeSequence = [code_item(PROCESSING_EQUIPMENT)]
    segmenter.ContributionDescription = clean(
        "ST", f"body districts by {provenance.segmenter} {provenance.segmenter_version}, software {software}"
    )
    return [*items, segmenter]


def _lineage(provenance: Provenance) -> str:
    """The digests that the manifest ties to the weights; what an older bundle does not say is left out."""
    parts = (
        ("manifest", provenance.bundle_sha256),
        ("recipe", provenance.recipe_sha256),
        ("data", provenance.data_sha256),
    )
    return "".join(f"{name} {digest[:HASH_SHOWN]}, " for name, digest in parts if digest)


def _equipment(model: str, version: str, date_time: str) -> Dataset:
    item = Dataset()
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = clean("LO", model)
    item.SoftwareVersions = clean("LO", version)
    item.ContributionDateTime = date_time
    return item
