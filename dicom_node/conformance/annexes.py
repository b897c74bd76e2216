"""The annexes of the statement: what is in every object, found by encoding samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pydicom.charset import python_encoding

from dicom_node.conformance.attributes import Attribute, attributes_of, content_tree, shared_by, written_kinds
from dicom_node.conformance.markdown import name_of, table, text
from dicom_node.conformance.sample import Samples

# What each kind of object is, in sending order; one with a model is told by what differs from it.
OBJECTS = {
    "pet-sc": 'The synthetic PET series, `encoding = "sc"`',
    "pet-pet": 'The synthetic PET series, `encoding = "pet"`',
    "mip-sc": "The MIP picture",
    "seg-sc": "The districts, on the planes of `sc`",
    "seg-pet": "The districts, on the planes of `pet`",
    "uncertainty-sc": "The uncertainty map",
    "sr-sc": "The measurement report",
    "gsps-sc": "The grayscale presentation state",
    "pcps-sc": "The pseudo-color presentation state",
    "rejection-kos": "The rejection note",
}
MODELS = {"pet-pet": "pet-sc", "seg-pet": "seg-sc", "uncertainty-sc": "pet-sc", "pcps-sc": "gsps-sc"}
TEMPLATES = {"sr-sc": "TID 1500", "rejection-kos": "TID 2010"}
APART = "rejection-kos"  # made long after the result, and of another kind


def annexes(samples: Samples) -> list[str]:
    """Annex A, the attributes of every object; B, the content of the structured ones; C, character sets."""
    return [*_objects(samples), *_content(samples), *_character_sets()]


def _objects(samples: Samples) -> list[str]:
    classes = written_kinds(samples.full.written)
    tables = {kind: attributes_of(samples, kind) for kind in OBJECTS}
    common = shared_by([tables[kind] for kind in OBJECTS if kind != APART])
    lines = [
        "## Annex A Information objects",
        "",
        *text(
            """Found by encoding samples of CT series, not typed in. Presence: ALWAYS with a value; VNAP value not
            always present; ANAP attribute not always present; EMPTY always without a value. Source: FIXED; CONFIG a
            key of `[output]`; COPY from the CT's lowest slice (the same attribute, or the one named); AUTO generated.
            `>` is one level of a sequence; a coded concept is one value. What this configuration does not send is
            here too: sections 1 and 7.4 say what it sends."""
        ),
        "### A.0 All objects but the rejection note",
        "",
        *_attributes(common),
    ]
    for number, (kind, title) in enumerate(OBJECTS.items(), start=1):
        lines += [f"### A.{number} {title}", "", f"{name_of(classes[kind])}, `{classes[kind]}`.", ""]
        if model := MODELS.get(kind):
            lines += _difference(tables[kind], tables[model], OBJECTS[model])
        else:
            lines += _attributes(_without(tables[kind], () if kind == APART else common))
    return lines


def _difference(rows: Sequence[Attribute], model: Sequence[Attribute], title: str) -> list[str]:
    paths = {row.path for row in rows}
    absent = [row for row in model if row.path not in paths and (len(row.path) == 1 or row.path[:-1] in paths)]
    names = ", ".join(f"{row.keyword} {row.tag}" for row in absent)
    lines = [f"As: {title[0].lower()}{title[1:]}. But:", "", *_attributes(_without(rows, model))]
    return [*lines, *(text(f"And without {names}.") if names else [])]


def _without(rows: Sequence[Attribute], known: Collection[Attribute]) -> list[Attribute]:
    """The rows that are not known yet, each below the sequences that it lies in."""
    new = {row.path for row in rows if row not in known}
    shown = {path[:depth] for path in new for depth in range(1, len(path) + 1)}
    return [row for row in rows if row.path in shown]


def _attributes(rows: Iterable[Attribute]) -> list[str]:
    columns = ("tag", "VR", "attribute", "presence", "source", "value")
    return table(columns, [(r.tag, r.vr, r.keyword, r.presence, r.source, r.value) for r in rows])


def _content(samples: Samples) -> list[str]:
    lines = ["## Annex B Structured report content", ""]
    for kind, template in TEMPLATES.items():
        lines += [f"{OBJECTS[kind]}, {template}; items that repeat are shown once:", ""]
        lines += [*content_tree(samples.full.written[kind][0]), ""]
    return lines


def _character_sets() -> list[str]:
    known = [f"`{term}`" for term in sorted(python_encoding) if term.startswith(("ISO_IR ", "ISO 2022 IR ", "GB"))]
    return [
        "## Annex C Character sets",
        "",
        *text(
            f"""Read in CT headers: the default repertoire, {", ".join(known)}. Written: as the CT has it; `ISO_IR 192`
            where any text of the result is not ASCII."""
        ),
    ]
