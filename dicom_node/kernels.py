"""What vendors call their reconstruction kernels, in one table: soft enough for a PET of soft tissue, or sharp.

(0018,1210) Convolution Kernel has no defined terms. The table was put together from the vendors' conformance
statements and from series as they occur; what it does not know is UNKNOWN, never sharp.
"""

from __future__ import annotations

import re
from enum import IntEnum


class Kernel(IntEnum):
    """Lower is better for us."""

    SOFT = 0
    UNKNOWN = 1
    SHARP = 2


# Siemens: a letter for the family (B body, I iterative, J ADMIRE, D dual energy, T, H head, Q quantitative, ...),
# perhaps a second one, then the sharpness from 10 to 99: B31f, Br40d, I70f, Qr36, Bl57, Hr60. 50 is "medium sharp".
_SIEMENS = re.compile(r"^[A-Z][A-Z]?(\d\d)[A-Z]{0,2}$")
_SIEMENS_SHARP = 50

# Toshiba and Canon: FC01-FC19 body, FC20-FC29 and FC40-FC49 brain, FC30-FC39 bone and ear, FC50 and up lung, bone
_CANON = re.compile(r"^FC(\d\d)")
_CANON_SHARP = (range(30, 40), range(50, 100))

# Philips: one or two letters
_PHILIPS_SOFT = frozenset({"A", "B", "C", "UA", "UB", "UC", "SA", "SB", "SC", "IA", "IB"})
_PHILIPS_SHARP = frozenset({"D", "E", "F", "L", "YA", "YB", "YC", "YD", "YE"})

# GE's names, and words that others use; sharp is looked for first ("HD LUNG", "BODY SHARP", "Standard+lung")
_SHARP_WORDS = ("LUNG", "BONE", "EDGE", "ULTRA", "SHARP", "HRCT", "PULMO", "KNOCHEN", "INNER EAR", "CORTEX")
_SOFT_WORDS = ("SOFT", "STANDARD", "STND", "STD", "SMOOTH", "BODY", "BRAIN", "DETAIL", "CHST", "ABDOMEN")


def classify_kernel(kernel: str, description: str = "") -> Kernel:
    """Soft or sharp, from (0018,1210), else from words in the series description.

    Several values ("Br38f\\3": kernel and strength of the iterative reconstruction) count by the first.
    """
    name = kernel.split("\\")[0].strip().upper()
    if (siemens := _SIEMENS.match(name)) and not name.startswith("FC"):
        return Kernel.SHARP if int(siemens[1]) >= _SIEMENS_SHARP else Kernel.SOFT
    if canon := _CANON.match(name):
        return Kernel.SHARP if any(int(canon[1]) in sharp for sharp in _CANON_SHARP) else Kernel.SOFT
    if name in _PHILIPS_SOFT:
        return Kernel.SOFT
    if name in _PHILIPS_SHARP:
        return Kernel.SHARP
    by_name = _by_words(name)
    return by_name if by_name is not Kernel.UNKNOWN else _by_words(description.upper())


def _by_words(text: str) -> Kernel:
    if any(word in text for word in _SHARP_WORDS):
        return Kernel.SHARP
    return Kernel.SOFT if any(word in text for word in _SOFT_WORDS) else Kernel.UNKNOWN
