"""The pipeline's errors.

PipelineError                 code, text; `permanent` tells the worker whether a retry can help
├── UnsupportedSeries         the CT series itself cannot be used: the job becomes REJECTED
│     codes: not_dicom, no_pixel_data, truncated_pixel_data, missing_attribute, not_ct, localizer,
│     single_slice, too_few_slices, duplicate_positions, missing_slices, mixed_orientation,
│     mixed_spacing, mixed_frame_of_reference, mixed_series, unsupported_pixel_format,
│     undecodable_pixel_data, unsupported_geometry, several_stacks, several_phases,
│     projection_image, too_large
├── DistrictError             no body, or no district could be found: REJECTED
│     codes: no_body, unknown_segmenter, no_segmenter
│   └── SegmenterUnavailable  one segmenter of a chain cannot serve this CT: the next one is tried
├── GateRefusal               a gate refused: the job becomes HELD (output gate) or REJECTED (input gate)
├── DeviceError               (device.py) the GPU that the options name is not there: FAILED; code: device_missing
├── BundleError               the model bundle is missing, altered or does not fit: FAILED, an operator's matter
└── OutputError               an object could not be encoded: FAILED
"""

from __future__ import annotations

from pydantic import ValidationError


class PipelineError(Exception):
    """An error with a stable reason code for a machine and a sentence for a person.

    The text says what was being done, which thing, what was found and what was expected. It never holds a
    patient's name, ID or birth date: UIDs and positions are enough.
    """

    permanent = True

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        """Keep code and text when the error crosses from the engine's process."""
        return type(self), (self.code, self.text)


class UnsupportedSeries(PipelineError):
    """The CT series cannot be turned into a volume that we would stand for."""


class DistrictError(PipelineError):
    """No body or no district was found in the volume."""


class SegmenterUnavailable(DistrictError):
    """This segmenter has not what it needs (weights, a SEG in the study) or failed: the next of the chain may serve."""


class GateRefusal(PipelineError):
    """A gate found the input or the output implausible."""


class BundleError(PipelineError):
    """A model bundle is missing, altered, or made for something else."""


class OutputError(PipelineError):
    """A DICOM object could not be written."""


def listed(error: ValidationError, most: int) -> str:
    """What pydantic found, in one line: the key and the rule of the first `most` problems."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:most])
