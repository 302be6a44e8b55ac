"""Does the nest deliver? The paper's claims at a size that fits two cores, with the losing cells.

python -m benchmarks.quality run [PART ...] [--background]
    trains and measures what has no result yet; what was cut off goes on where it was
python -m benchmarks.quality draw
    tables and pictures of the results that are there
"""
