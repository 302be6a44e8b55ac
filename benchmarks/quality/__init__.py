"""Does the nest deliver? The paper's claims at a size that fits two cores, with the losing cells.

python -m benchmarks.quality run [PART ...]     trains and measures what has no result yet
"""
