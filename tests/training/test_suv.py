"""SUV factors of header variants, each worked out by hand.

The common patient: 70 kg, 350 MBq injected at 08:00:00 on 15 January 2024, F-18. One half-life (6586.2 s, that is
1 h 49 min 46.2 s) later it is 09:49:46.2 and 175 MBq are left. So, with 70,000 g:

    without decay   70,000 g / 350,000,000 Bq = 2e-4 g/Bq
    one half-life   70,000 g / 175,000,000 Bq = 4e-4 g/Bq
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from pydicom import DataElement, Dataset, config
from pydicom.datadict import dictionary_VR

from training.cases.suv import suv_scale
from training.errors import StudyError

NO_DECAY, ONE_HALF_LIFE = 2e-4, 4e-4


def header(**changes: Any) -> Dataset:
    """BQML, START, scanned one half-life after the injection. A value of None removes the element."""
    values: dict[str, Any] = {
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["DECY", "ATTN", "SCAT", "DTIM"],
        "PatientWeight": "70",
        "SeriesDate": "20240115",
        "SeriesTime": "094946.200000",
        "AcquisitionDate": "20240115",
        "AcquisitionTime": "094946.200000",
        "RadiopharmaceuticalStartTime": "080000.000000",
        "RadiopharmaceuticalStartDateTime": None,
        "RadionuclideTotalDose": "350000000",
        "RadionuclideHalfLife": "6586.2",
        **changes,
    }
    ds, medicine = Dataset(), Dataset()
    for keyword, value in values.items():
        target = medicine if keyword.startswith("Radio") else ds
        if value is not None:
            element = DataElement(keyword, dictionary_VR(keyword), value, validation_mode=config.IGNORE)
            target.add(element)
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "C-111A1", "SRT", "^18^Fluorine"
    medicine.RadionuclideCodeSequence = [code]
    ds.RadiopharmaceuticalInformationSequence = [medicine]
    return ds


def ge(ds: Dataset, scan: str) -> Dataset:
    ds.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", scan)
    return ds


def philips(ds: Dataset, **elements: str) -> Dataset:
    block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
    for place, value in elements.items():
        block.add_new(int(place.removeprefix("x"), 16), "DS", value)
    return ds


FACTORS: dict[str, tuple[Dataset, float]] = {
    # Series time 09:49:46.2, injected 08:00: one half-life.
    "siemens_start": (header(Manufacturer="SIEMENS"), ONE_HALF_LIFE),
    # CPS (the maker of Siemens' older PET) writes TM without a fraction; 09:49:46 is 0.2 s before one half-life:
    # 4e-4 * 2^(-0.2 / 6586.2) = 4e-4 * 0.999979 = 3.999916e-4.
    "cps_start": (
        header(Manufacturer="CPS", SeriesTime="094946", AcquisitionTime="095012", AcquisitionDate="20240115"),
        3.999916e-4,
    ),
    # Reprocessed at noon; GE's private scan time is the true reference: one half-life. Noon would be 1.09 more.
    "ge_start_private": (
        ge(header(Manufacturer="GE MEDICAL SYSTEMS", SeriesTime="120000"), "20240115094946.20"),
        ONE_HALF_LIFE,
    ),
    # The private scan time is not asked for where the series time is the first acquisition's.
    "ge_start_not_reprocessed": (ge(header(Manufacturer="GE MEDICAL SYSTEMS"), "20240115120000.00"), ONE_HALF_LIFE),
    # Reprocessed without a private time: the acquisition time, one half-life.
    "reprocessed_without_private": (header(SeriesTime="120000"), ONE_HALF_LIFE),
    # Reprocessed on the next day.
    "reprocessed_next_day": (header(SeriesDate="20240116", SeriesTime="080500"), ONE_HALF_LIFE),
    "philips_bqml": (header(Manufacturer="Philips Medical Systems"), ONE_HALF_LIFE),
    # Philips counts: 0.000551 is the factor itself, whatever weight and dose say.
    "philips_cnts_suv": (philips(header(Units="CNTS", PatientWeight=None), x00="0.000551"), 0.000551),
    "philips_cnts_both": (philips(header(Units="CNTS"), x00="0.000551", x09="2.5"), 0.000551),
    # 2.5 Bq/ml for a count, then as BQML: 2.5 * 4e-4 = 1e-3. An SUV factor of 0 is none.
    "philips_cnts_bqml": (philips(header(Units="CNTS"), x09="2.5"), 1e-3),
    "philips_cnts_zero": (philips(header(Units="CNTS"), x00="0", x09="2.5"), 1e-3),
    # 2.5 * 2e-4 = 5e-4: counts to Bq/ml, corrected to the administration.
    "philips_cnts_admin": (philips(header(Units="CNTS", DecayCorrection="ADMIN"), x09="2.5"), 5e-4),
    "gml": (header(Units="GML", SUVType="BW", PatientWeight=None), 1.0),
    "gml_without_type": (header(Units="GML", RadionuclideTotalDose=None), 1.0),
    # Corrected to the administration: 350 MBq count in full, no time is needed.
    "admin": (header(DecayCorrection="ADMIN", RadiopharmaceuticalStartTime=None), NO_DECAY),
    # Injected 23:00:00, scanned 00:49:46.2 the next day: one half-life, not minus 22 h.
    "midnight": (
        header(
            RadiopharmaceuticalStartTime="230000",
            SeriesTime="004946.2",
            AcquisitionTime="004946.2",
        ),
        ONE_HALF_LIFE,
    ),
    "midnight_with_date": (
        header(
            RadiopharmaceuticalStartTime="230000",
            RadiopharmaceuticalStartDateTime="20240114230000.000000",
            SeriesTime="004946.2",
            AcquisitionTime="004946.2",
        ),
        ONE_HALF_LIFE,
    ),
    # The full date and time counts before the time alone, which here is an hour off.
    "start_date_time_preferred": (
        header(RadiopharmaceuticalStartDateTime="20240115080000", RadiopharmaceuticalStartTime="070000"),
        ONE_HALF_LIFE,
    ),
    # 07:00 UTC is 08:00 of the data set's zone (+01:00).
    "date_time_with_zone": (
        header(
            RadiopharmaceuticalStartDateTime="20240115070000.000000+0000",
            RadiopharmaceuticalStartTime=None,
            TimezoneOffsetFromUTC="+0100",
        ),
        ONE_HALF_LIFE,
    ),
    # The data set has no zone of its own: the suffix is the zone of all its times.
    "date_time_with_zone_alone": (
        header(RadiopharmaceuticalStartDateTime="20240115080000.000000+0100", RadiopharmaceuticalStartTime=None),
        ONE_HALF_LIFE,
    ),
    # De-identified: the injection's date kept (2019), the scan's shifted. The times of day still tell 1 h 49 min.
    "only_one_date_shifted": (header(RadiopharmaceuticalStartDateTime="20190301080000"), ONE_HALF_LIFE),
    # 1 h: 2^(3600 / 6586.2) = 2^0.546597 = 1.460637; 82.5 kg and 298 MBq: 82500 / 2.98e8 * 1.460637 = 4.043710e-4.
    "an_hour": (
        header(
            PatientWeight="82.5",
            RadionuclideTotalDose="2.98e8",
            SeriesTime="090000",
            AcquisitionTime="090000",
        ),
        4.043710e-4,
    ),
    # The old spellings of DA and TM.
    "colons": (header(SeriesDate="2024.01.15", SeriesTime="09:49:46.2"), ONE_HALF_LIFE),
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_factor_is_the_one_worked_out_by_hand(name: str) -> None:
    ds, expected = FACTORS[name]
    assert suv_scale(ds).factor == pytest.approx(expected, rel=2e-6)


REFUSED: dict[str, tuple[Dataset, str, str]] = {
    "weight_missing": (header(PatientWeight=None), "weight_missing", "missing"),
    "weight_zero": (header(PatientWeight="0"), "weight_missing", "0"),
    "weight_in_grams": (header(PatientWeight="70000"), "suv_weight", "70000"),
    "weight_negative": (header(PatientWeight="-70"), "suv_weight", "-70"),
    "dose_missing": (header(RadionuclideTotalDose=None), "suv_dose", "missing"),
    "dose_zero": (header(RadionuclideTotalDose="0"), "suv_dose", "0"),
    "dose_in_mbq": (header(RadionuclideTotalDose="350"), "suv_dose", "MBq"),
    "dose_in_kbq": (header(RadionuclideTotalDose="350000"), "suv_dose", "Bq"),
    "half_life_missing": (header(RadionuclideHalfLife=None), "suv_half_life", "missing"),
    "half_life_in_minutes": (header(RadionuclideHalfLife="109.8"), "suv_half_life", "109.8"),
    "none": (header(DecayCorrection="NONE"), "suv_decay", "NONE"),
    "gml_none": (header(Units="GML", DecayCorrection="NONE"), "suv_decay", "NONE"),
    "no_decay_correction": (header(DecayCorrection=None), "suv_decay", "not given"),
    "not_attenuation_corrected": (header(CorrectedImage=["DECY", "SCAT"]), "suv_not_corrected", "ATTN"),
    "not_decay_corrected": (header(CorrectedImage=["ATTN"]), "suv_not_corrected", "DECY"),
    "nothing_corrected": (header(CorrectedImage=None), "suv_not_corrected", "ATTN and DECY"),
    "lean_body_mass": (header(Units="GML", SUVType="LBM"), "suv_type", "LBM"),
    "units": (header(Units="PROPCNTS"), "suv_units", "PROPCNTS"),
    "units_missing": (header(Units=None), "suv_units", "not given"),
    "counts_of_nobody": (header(Units="CNTS"), "suv_units", "7053"),
    "no_injection_time": (header(RadiopharmaceuticalStartTime=None), "suv_time", "injection"),
    "no_scan_time": (header(SeriesTime=None, AcquisitionTime=None), "suv_time", "series"),
    # Injected five minutes after the scan: by midnight's rule nearly a day before it.
    "clocks_differ": (header(RadiopharmaceuticalStartTime="095500"), "suv_time", "23.9 h"),
    "injected_after_the_scan": (
        header(RadiopharmaceuticalStartDateTime="20240115110000", RadiopharmaceuticalStartTime=None),
        "suv_time",
        "-1.2 h",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_suv_follows_from_is_refused_with_the_reason(name: str) -> None:
    ds, code, said = REFUSED[name]
    with pytest.raises(StudyError) as caught:
        suv_scale(ds)
    assert caught.value.code == code
    assert said in caught.value.text


def test_a_header_without_the_radiopharmaceutical_is_refused() -> None:
    ds = header()
    del ds.RadiopharmaceuticalInformationSequence
    with pytest.raises(StudyError, match="RadiopharmaceuticalInformationSequence"):
        suv_scale(ds)


def test_the_first_acquisition_of_all_slices_decides_whether_the_series_was_reprocessed() -> None:
    # This slice was acquired at 10:05, after the series time; but the first one began before it, at 09:49:46.2.
    ds = header(SeriesTime="100000", AcquisitionTime="100500")
    first = datetime(2024, 1, 15, 9, 49, 46, 200_000)
    scale = suv_scale(ds, earliest_acquisition=first)
    assert scale.factor == pytest.approx(ONE_HALF_LIFE, rel=1e-6)
    assert scale.scan_time == "AcquisitionTime of the first slice"


def test_a_private_number_whose_vr_was_lost_is_read() -> None:
    ds = header(Units="CNTS")
    ds.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "UN", b"0.000551")
    assert suv_scale(ds).factor == pytest.approx(0.000551)


def test_a_private_element_counts_by_its_creator_and_not_by_its_number() -> None:
    ds = header(Units="CNTS")
    ds.private_block(0x7053, "SOMEBODY ELSE", create=True).add_new(0x00, "DS", "0.9")
    philips(ds, x00="0.000551")  # lands in the second block: (7053,1100)
    assert suv_scale(ds).factor == pytest.approx(0.000551)


def test_the_record_tells_the_rule_and_where_the_times_came_from() -> None:
    record = suv_scale(ge(header(SeriesTime="120000"), "20240115094946.20")).record()
    assert record["rule"] == "BQML: START, decay from injection to the scan"
    assert record["scan_time"] == "GE (0009,100D)"
    assert record["injection_time"] == "RadiopharmaceuticalStartTime"
    assert record["delay_s"] == pytest.approx(6586.2)
    assert "weight_kg" in record
    assert "scan_time" not in suv_scale(header(Units="GML")).record()


def test_dates_that_cannot_be_true_leave_a_note() -> None:
    (note,) = suv_scale(header(RadiopharmaceuticalStartDateTime="20190301080000")).notes
    assert "only its time of day" in note


def test_a_half_life_in_minutes_is_refused_where_no_nuclide_is_named() -> None:
    ds = header(RadionuclideHalfLife="109.8")
    del ds.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence
    with pytest.raises(StudyError, match=r"109\.8"):
        suv_scale(ds)
