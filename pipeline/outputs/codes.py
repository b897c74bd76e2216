"""The coded terms of the output objects, taken from pydicom's copy of PS3.16.

Never typed in by hand: a validator does not notice a code that exists but means something else.
"""

from __future__ import annotations

from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.types import District

SYNTHESIZING_EQUIPMENT: Code = codes.DCM.SynthesizingEquipment  # PS3.3 C.12.1.1.5 names it for SyntheticData
PROCESSING_EQUIPMENT: Code = codes.DCM.ProcessingEquipment
SOURCE_IMAGE: Code = codes.DCM.SourceImageForImageProcessingOperation
SAME_ANATOMY: Code = codes.cid7210.SameAnatomy
SUV_BW: Code = codes.DCM.Suvbw
QUANTITY: Code = codes.SCT.Quantity
SUV_BW_UNITS: Code = codes.cid85.StandardizedUptakeValueBodyWeight  # g/ml{SUVbw}

RECUMBENT: Code = codes.cid19.Recumbent
SUPINE: Code = codes.cid20.Supine
PRONE: Code = codes.cid20.Prone
RIGHT_DECUBITUS: Code = codes.cid20.RightLateralDecubitus
LEFT_DECUBITUS: Code = codes.cid20.LeftLateralDecubitus
HEADFIRST: Code = codes.cid21.Headfirst
FEET_FIRST: Code = codes.cid21.FeetFirst

ANATOMICAL_STRUCTURE: Code = codes.cid7150.AnatomicalStructure
ARTIFICIAL_INTELLIGENCE: Code = codes.cid7162.ArtificialIntelligence
SEGMENTATION: Code = codes.cid7203.SegmentationImageDerivation

# Of the measurement report
PET: Code = codes.cid29.PositronEmissionTomography
CT_PROCEDURE: Code = codes.cid100.CTUnspecifiedBodyRegion  # what was done to the patient
MEAN: Code = codes.SCT.Mean
MAXIMUM: Code = codes.SCT.Maximum
VOLUME: Code = codes.SCT.Volume
MILLILITER = Code("mL", "UCUM", "milliliter")  # a UCUM unit is an expression: pydicom's lists hold examples
COMMENT: Code = codes.DCM.Comment

# The body regions as SegmentedPropertyTypeCodeSequence (0062,000F) names them
DISTRICT_CODES: dict[District, Code] = {
    District.HEAD: codes.SCT.Head,
    District.TRUNK: codes.SCT.Trunk,
    District.ARMS: codes.SCT.UpperLimb,
    District.LEGS: codes.SCT.LowerLimb,
}

# PatientPosition (PS3.3 C.7.3.1.1.2) -> (orientation modifier, gantry relationship)
PATIENT_POSITIONS: dict[str, tuple[Code, Code]] = {
    gantry_letters + posture_letters: (posture, gantry)
    for gantry_letters, gantry in (("HF", HEADFIRST), ("FF", FEET_FIRST))
    for posture_letters, posture in (
        ("S", SUPINE),
        ("P", PRONE),
        ("DR", RIGHT_DECUBITUS),
        ("DL", LEFT_DECUBITUS),
    )
}


def code_item(code: Code) -> Dataset:
    """One item of a code sequence (PS3.3 table 8.8-1)."""
    item = Dataset()
    item.CodeValue = code.value
    item.CodingSchemeDesignator = code.scheme_designator
    item.CodeMeaning = code.meaning
    return item
