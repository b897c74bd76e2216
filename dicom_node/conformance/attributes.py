"""The attributes of every object that the software writes, found by comparing what it really wrote.

Words of PS3.2 annex N. Presence: ALWAYS (with a value), VNAP (value not always present), ANAP (attribute not always
present), EMPTY (always without a value). Source: FIXED, CONFIG (a key of `[output]`), COPY (from the CT), AUTO
(generated).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from pydicom import Dataset
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.uid import UID

from dicom_node.conformance.sample import Sample, Samples, Written

Path = tuple[int, ...]  # the tags from the data set down into its sequences

CODE_VALUE = tag_for_keyword("CodeValue")
CONTENT_SEQUENCE = tag_for_keyword("ContentSequence")
CONTENT_TREE = "the content tree"
_BULK = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_COPIED_VRS = frozenset({"AS", "CS", "DA", "DS", "LO", "PN", "SH", "ST", "TM", "UI"})  # by the same attribute
_TRACED_VRS = frozenset({"DA", "TM", "UI"})  # also by another one: these values meet by no accident
_ITEMS = "items"  # stands for the value of a sequence, whose items have rows of their own
_SHOWN = 96  # characters of a value


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """One row of an object's table."""

    path: Path
    vr: str
    presence: str
    source: str
    value: str

    @property
    def tag(self) -> str:
        """`(0008,0060)`, with one `>` for each sequence around it."""
        last = self.path[-1]
        return f"{'>' * (len(self.path) - 1)}({last >> 16:04X},{last & 0xFFFF:04X})"

    @property
    def keyword(self) -> str:
        return keyword_for_tag(self.path[-1])


def attributes_of(samples: Samples, kind: str) -> tuple[Attribute, ...]:
    """The table of one kind of object ("pet-sc"), in tag order. Raises KeyError when no sample has that kind."""
    seen = {
        name: [_texts(ds) for ds in getattr(samples, name).written[kind]]
        for name in ("full", "changed", "other", "bare")
    }
    evidence = _Evidence(seen=seen, full=samples.full, other=samples.other)
    return tuple(_attribute(path, evidence) for path in sorted(evidence.paths))


def shared_by(tables: Sequence[Sequence[Attribute]]) -> tuple[Attribute, ...]:
    """The rows that all of the tables have, in the order of the first."""
    common = set(tables[0]).intersection(*tables[1:])
    return tuple(row for row in tables[0] if row in common)


@dataclass(frozen=True, slots=True)
class _Value:
    """All occurrences of one path in one instance: several where it lies in the items of a sequence."""

    vr: str
    texts: list[str] = field(default_factory=list)


Texts = Mapping[Path, _Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    """What was found, by sample and instance."""

    seen: Mapping[str, Sequence[Texts]]
    full: Sample
    other: Sample

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(chain.from_iterable(self.everywhere))

    @property
    def everywhere(self) -> tuple[Texts, ...]:
        return tuple(chain.from_iterable(self.seen.values()))

    def values(self, sample: str, path: Path) -> list[tuple[str, ...]]:
        """One entry for each instance of the sample; () where it has no such attribute."""
        return [tuple(one[path].texts) if path in one else () for one in self.seen[sample]]


def _texts(ds: Dataset) -> Texts:
    found: dict[Path, _Value] = {}
    for path, elem in _elements(ds, ()):
        found.setdefault(path, _Value(elem.VR)).texts.append(_text(elem))
    return found


def _elements(ds: Dataset, above: Path) -> Iterator[tuple[Path, DataElement]]:
    """Every element with its path. A coded concept and a content tree are one value, not a sequence to go into."""
    for elem in ds:
        path = (*above, int(elem.tag))
        yield path, elem
        if elem.VR == "SQ" and not _is_one_value(elem):
            for item in elem.value:
                yield from _elements(item, path)


def _is_one_value(elem: DataElement) -> bool:
    return elem.tag == CONTENT_SEQUENCE or any(CODE_VALUE in item for item in elem.value)


def _text(elem: DataElement) -> str:
    if elem.VR == "SQ":
        if elem.tag == CONTENT_SEQUENCE:
            return CONTENT_TREE
        if _is_one_value(elem):
            return ", ".join(code_text(item) for item in elem.value)
        return _ITEMS if elem.value else ""
    if elem.VR in _BULK:
        return f"{len(elem.value)} bytes" if elem.value else ""
    if elem.value is None:
        return ""
    values = elem.value if elem.VM > 1 else [elem.value]
    return "\\".join(str(value) for value in values)


def code_text(item: Dataset) -> str:
    """A coded concept as `(126401, DCM, "SUVbw")`."""
    return f'({item.CodeValue}, {item.CodingSchemeDesignator}, "{item.CodeMeaning}")'


def _attribute(path: Path, evidence: _Evidence) -> Attribute:
    vr = next(one[path].vr for one in evidence.everywhere if path in one)
    source, value = _source(path, vr, evidence)
    return Attribute(path=path, vr=vr, presence=_presence(path, evidence), source=source, value=value)


def _presence(path: Path, evidence: _Evidence) -> str:
    """Of an attribute in a sequence: beside the item that it lies in, which may itself be absent."""
    inside = [one for one in evidence.everywhere if len(path) == 1 or (path[:-1] in one and _has_items(path, one))]
    present = [path in one and len(one[path].texts) >= _items(path, one) for one in inside]
    valued = [all(one[path].texts) for one in inside if path in one]
    if not any(any(one[path].texts) for one in inside if path in one):
        return "EMPTY"
    if not all(present):
        return "ANAP"
    return "ALWAYS" if all(valued) else "VNAP"


def _has_items(path: Path, one: Texts) -> bool:
    return any(one[path[:-1]].texts)


def _items(path: Path, one: Texts) -> int:
    """At least how often an attribute occurs that is in every item: once for each sequence around it."""
    return sum(1 for text in one[path[:-1]].texts if text) if len(path) > 1 else 1


def _source(path: Path, vr: str, evidence: _Evidence) -> tuple[str, str]:
    """The source's word and what to say of the value; values of an imagined patient are never shown."""
    given = {name: {texts for texts in evidence.values(name, path) if any(texts)} for name in evidence.seen}
    different = set(chain.from_iterable(given.values()))
    one_text = len(set(chain.from_iterable(different))) <= 1 or len(different) == 1
    if vr == "SQ" and set(chain.from_iterable(different)) == {_ITEMS}:
        return "", ""  # its items have rows of their own
    copied = _copied_from(path, vr, evidence)
    if vr != "UI" and evidence.values("changed", path) != evidence.values("full", path):
        return "CONFIG", "the CT's" if copied else _shown(vr, given["full"] or different)
    in_both = given["full"] and given["other"]
    if vr not in _BULK and one_text and (in_both or not copied):
        return "FIXED", _shown(vr, different)
    if copied:
        default = _shown(vr, given["bare"]) if vr == "CS" else ""
        told = (f"of {keyword_for_tag(copied)}" if copied != path[-1] else "", f"else {default}" if default else "")
        return "COPY", ", ".join(filter(None, told))
    if vr == "UI":
        return "AUTO", _names(different)
    by_instance = any(len(texts) > 1 for texts in given.values())
    example = "" if vr in _BULK else _shown(vr, evidence.values("full", path)[:1])
    return "AUTO", ", ".join([*(["by instance"] if by_instance else []), *([f"e.g. {example}"] if example else [])])


def _copied_from(path: Path, vr: str, evidence: _Evidence) -> int | None:
    """The CT's attribute that this one repeats wherever it was written from a whole header."""
    if vr not in _COPIED_VRS or (len(path) > 1 and vr != "UI"):
        return None
    candidates = [path[-1]] + ([int(elem.tag) for elem in evidence.full.header] if vr in _TRACED_VRS else [])
    found = []
    sources = {"full": evidence.full, "other": evidence.other}
    if not any(any(texts) for name in sources for texts in evidence.values(name, path)):
        sources = {"changed": evidence.full}  # an option of the changed sample writes it
    for name, sample in sources.items():
        if texts := set(chain.from_iterable(evidence.values(name, path))) - {""}:
            found.append({tag for tag in candidates if _repeats(tag, texts, sample)})
    agreed = set.intersection(*found) if found else set()
    return next((tag for tag in candidates if tag in agreed), None)


def _repeats(tag: int, texts: set[str], sample: Sample) -> bool:
    """Whether these are the values of one attribute of the sample's CT."""
    return tag in sample.header and texts == {_text(sample.header[tag])}


def _shown(vr: str, given: Iterable[tuple[str, ...]]) -> str:
    """What the table shows of values: each once, cut to a line."""
    values = [text for text in dict.fromkeys(chain.from_iterable(given)) if text and text != _ITEMS]
    names = [f"{value} {UID(value).name}" if vr == "UI" and UID(value).name != value else value for value in values]
    text = ", ".join(names)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN].rstrip()} …"


def _names(given: Iterable[tuple[str, ...]]) -> str:
    """The names of registered UIDs; nothing for UIDs that are generated."""
    names = sorted({UID(text).name for text in chain.from_iterable(given) if UID(text).name != text})
    return " or ".join(names)


def content_tree(ds: Dataset, depth: int = 0) -> Iterator[str]:
    """The content of a structured report, one line an item: relationship, type and concept; repeated items once."""
    lines: dict[str, None] = {}
    for item in ds.get("ContentSequence", ()):
        concept = item.get("ConceptNameCodeSequence")
        name = code_text(concept[0]) if concept else ""
        own = " ".join(filter(None, (str(item.get("RelationshipType", "")), str(item.ValueType), name)))
        for line in (f"{'  ' * depth}- {own}", *content_tree(item, depth + 1)):
            lines.setdefault(line, None)
    yield from lines


def written_kinds(written: Written) -> dict[str, str]:
    """Each kind of object with its SOP class, in sending order."""
    return {kind: str(instances[0].SOPClassUID) for kind, instances in written.items()}
