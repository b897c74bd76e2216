"""What each lossless transfer syntax makes of a synthetic PET series: its size, and the time to encode and decode it.

    make demo && python benchmarks/compression.py demo-output/spool/outbox/*/pet-sc [--rounds 3]

FOLDER holds one series as the node wrote it: of the outbox, or of `dicom-node run`'s result. CPU time of this
process, median of the rounds, which are interleaved: on a busy machine read the ratios. Encoding is what a
delivery does once for each instance, parsing and rewriting the file included; decoding is what pydicom's reader
needs with its fastest plug-in, for comparison only: a viewer has decoders of its own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
from pydicom import dcmread

from dicom_node.net.compression import EXPLICIT, TRANSFER_SYNTAXES, compress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    files = [path.read_bytes() for path in sorted(asked.folder.glob("*.dcm"))]
    if not files:
        raise SystemExit(f"{asked.folder} holds no .dcm files")
    originals = [dcmread(BytesIO(data)).pixel_array for data in files]
    encoding, decoding, sizes = defaultdict(list), defaultdict(list), {}
    for _ in range(asked.rounds):
        for name in (EXPLICIT, *TRANSFER_SYNTAXES):
            begun = process_time()
            packed = files if name == EXPLICIT else [compress(data, name) for data in files]
            encoding[name].append(process_time() - begun)
            begun = process_time()
            pixels = [dcmread(BytesIO(data)).pixel_array for data in packed]
            decoding[name].append(process_time() - begun)
            sizes[name] = sum(map(len, packed))
            if not all(map(np.array_equal, pixels, originals)):
                raise SystemExit(f"{name}: the pixels changed")
    rows, columns = originals[0].shape[-2:]
    print(f"{len(files)} instances of {rows}x{columns}, median of {asked.rounds} rounds, CPU time\n")
    print("| transfer_syntax | MB | of explicit | encode, ms an instance | decode, ms an instance |")
    print("|---|---|---|---|---|")
    for name, size in sizes.items():
        encode, decode = (median(times[name]) / len(files) * 1000 for times in (encoding, decoding))
        print(f"| `{name}` | {size / 1e6:.2f} | {size / sizes[EXPLICIT]:.0%} | {encode:.1f} | {decode:.1f} |")


if __name__ == "__main__":
    main()
