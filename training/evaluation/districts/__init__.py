"""How well a segmenter finds the districts: phantoms over poses, coverage and scanner faults, and real series."""
