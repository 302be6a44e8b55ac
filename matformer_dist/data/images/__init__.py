"""Labelled images from folders, Parquet files, WebDataset's shards and scikit-learn's digits."""
